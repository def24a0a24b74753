"""Text that torch would run, in a small grammar: what is in it, what is not, and each limit from both sides."""

from __future__ import annotations

import json
from typing import Any

import pytest
from calibcast.calib.pt2.document import check_value
from calibcast.calib.pt2.expressions import (
    FUNCTIONS,
    MOST_BITS,
    MOST_CHARACTERS,
    MOST_PRECISION,
    MOST_UNBACKED,
    check_expression,
    check_guard,
    check_symbol,
)
from calibcast.calib.pt2.refusal import RefusedError
from calibcast.calib.pt2.treespecs import check_key, check_treespec


@pytest.mark.parametrize("function", sorted(FUNCTIONS - {"Symbol", "Float"}))
def test_known_functions_of_sympy_pass(function: str) -> None:
    check_expression(f"{function}(Symbol('s0', integer=True), Integer(2))")


@pytest.mark.parametrize(
    "text",
    [
        "s0", "2*s0 + 1", "Float('1.5', precision=53)", "Symbol('s77', positive=True, integer=True)", "-s0 // 3 % 4",
        "Float('1e400')", "Float('-inf')", "OpaqueUnaryFn_sqrt(s0)", "BitwiseFn_bitwise_and(s0, 3)", "s0 & 3 | 1 ^ 2",
        "s0 < 3", "s0 << 3", "True", "1.5", "Pow(s0, 2)", "s0**2", "u0", "zuf3", "(s0, s1)", "s0 if s0 > 2 else 1",
        " s0 ", "~s0", "not s0", "s0 >= 1 and s0 != 4", "Rational(1, 2)",
    ],
)  # fmt: skip
def test_shape_expressions_pass(text: str) -> None:
    check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "eval(s0)", "s0.foo", "s0[0]", "__import__('os')", "Symbol('__x')", "Symbol('a b')", "'text'", "Add('text', 1)",
        "Float('x')", "Float('1' * 3)", "lambda: 1", "[s0]", "{s0}", "f'{s0}'", "Symbol('s0', evaluate=True)",
        "Symbol('s0', integer=s1)", "Symbol('s0', **{})", "(x := 3)", "OpaqueUnaryFn_(1)", "OpaqueUnaryFn_A(1)",
        "(lambda: 1)()", "b'x'", "None", "...", "1j", "s0 +", "", "x" * 65, "s0 in s1", "s0 @ s1", "*s0",
        "Float('1.5', precision='53')", "await s0", "a; b", "Integer('3')",
    ],
)  # fmt: skip
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(RefusedError):
        check_expression(text)


def passes(check: Any, text: str) -> bool:
    try:
        check(text)
    except RefusedError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        (f"Float('1.5', precision={MOST_PRECISION})", True),
        (f"Float('1.5', precision={MOST_PRECISION + 1})", False),
        ("1" + " " * (MOST_CHARACTERS - 1), True),
        ("1" + " " * MOST_CHARACTERS, False),
        ("2**2048", True),  # a 2 counts as two bits
        ("2**2049", False),
        ("Pow(2, 2048)", True),
        ("Pow(2, 2049)", False),
        ("1 << 4094", True),
        ("1 << 4095", False),
        ("LShift(1, 4094)", True),
        ("LShift(1, 4095)", False),
        ("s0**2048", True),
        ("s0**2049", False),
        ("FloatPow(s0, 2049)", False),
        ("PowByNatural(s0, 2049)", False),
        ("Mul(s0, 2049)", True),
        ("1.5**64", True),
        ("1.5**65", False),
        ("2**(64 + 64)", False),  # of several numbers, all that their bits could give
        ("2**(8 + 8)", True),
        ("2**(1 + 1)", True),
        ("2**s0", True),
        ("2**-2049", False),
        ("((3**30)**30)**3", False),
        ("(3**30)**30", True),
        ("+".join(["(1 << 1000)"] * 4), True),
        ("+".join(["(1 << 1000)"] * 5), False),
        (f"{1 << (MOST_BITS - 1)}", True),
        (f"{1 << MOST_BITS}", False),
    ],
)
def test_constants_may_grow_to_4096_bits(text: str, fine: bool) -> None:
    assert passes(check_expression, text) is fine


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("*".join(f"(s{i} + 1)" for i in range(9)), True),
        ("*".join(f"(s{i} + 1)" for i in range(10)), False),
        ("(s0 + s1 + 1)**6", True),
        ("(s0 + s1 + 1)**7", False),
        ("Mul(" + ", ".join(f"Add(Symbol('s{i}'), Integer(1))" for i in range(10)) + ")", False),
        (" + ".join(f"s{i}*s0" for i in range(200)), True),
    ],
)
def test_products_of_sums_are_not_multiplied_out_without_end(text: str, fine: bool) -> None:
    assert passes(check_expression, text) is fine


@pytest.mark.parametrize(("text", "fine"), [("2**2047 == 1", True), ("2**2049 == 1", False), ("1 << 4095 == 1", False)])
def test_constants_of_guards_grow_no_further(text: str, fine: bool) -> None:
    assert passes(check_guard, text) is fine


@pytest.mark.parametrize(
    ("name", "fine"),
    [
        ("s0", True), ("_s", True), ("s" * 64, True), ("s" * 65, False), ("0s", False), ("", False), ("__s", False),
        ("a.b", False), (f"u{MOST_UNBACKED}", True), (f"u{MOST_UNBACKED + 1}", False), ("u00000001", False),
        ("u0000001", True), (f"zuf{MOST_UNBACKED + 1}", False), (f"s{MOST_UNBACKED + 1}", True),
    ],
)  # fmt: skip
def test_symbols_have_plain_names_and_small_numbers(name: str, fine: bool) -> None:
    assert passes(check_symbol, name) is fine


@pytest.mark.parametrize(
    "text",
    [
        "L['x'].size()[0] <= 8", "L['a'].b[-1].stride() == 1", "len(L['x']) >= 2", "math.floor(L['x'].item()) == 3",
        "L['x'].dim() == 2 and not L['x'].numel() == 0", "Eq(Mod(L['x'].size()[0], 2), 0)", "L['x'] is None",
        "math.sqrt(L['x'].item()) > math.pi", "L['x'] == inf", "abs(L['x'].storage_offset()) < 1.5",
    ],
)  # fmt: skip
def test_guards_of_sizes_pass(text: str) -> None:
    check_guard(text)


@pytest.mark.parametrize(
    "text",
    [
        "L['x'].__class__", "L['x']._data", "math.factorial(3)", "math.e", "os.system('x')", "L['x'].numpy()",
        "L['x'].size(0)", "x == 3", "eval('1')", "len(L['x'], key=1)", "L['x']\n", 'L["x"]', "L['x\\n']", "{1}", "# x",
        "L[x]", "L['x'][1:2]", "3 .real", "(1, 2)[0]", "max(L, key=len)", "len(*L)", "lambda: 1", "b'x'", "1j", "...",
        "math.floor.real", "L()()", "x()['a']", "'a'.size()", "L['x'].size",
    ],
)  # fmt: skip
def test_other_guards_are_refused(text: str) -> None:
    fine = {"L['x'].size", "L()()"}  # attributes of an input, which nothing calls; `L` is a dict, so calling it fails
    assert passes(check_guard, text) is (text == "L['x'].size") or text in fine


def spec(kind: Any = None, context: Any = None, *children: Any) -> dict[str, Any]:
    return {"type": kind, "context": context, "children_spec": list(children)}


def treespec(content: Any, protocol: Any = 1) -> str:
    return json.dumps([protocol, content])


LEAF = spec()


def call(names: Any, first: str = "builtins.tuple") -> dict[str, Any]:
    return spec("builtins.tuple", "null", spec(first, "null", LEAF), spec("builtins.dict", names, LEAF))


@pytest.mark.parametrize(
    "content",
    [
        LEAF,
        spec("builtins.list", "null", LEAF, LEAF),
        spec("builtins.dict", '["a", "b c"]', LEAF, LEAF),
        spec("x", "{}", LEAF),
        spec("x", "not json", LEAF),
        spec("x", {"default_factory_module": "builtins", "default_factory_name": "list"}),
        spec("x", {"__enum__": True, "fqn": "enum:IntFlag"}),
        spec("x", 5),
        call('["x", "y"]'),
        call('["no identifier"]', "builtins.list"),
        spec("builtins.tuple", "null", spec("builtins.tuple"), spec("builtins.list", '["a b"]')),
        spec("builtins.tuple", "null", spec("builtins.tuple"), spec("builtins.dict", '["a b"]'), LEAF),
        spec("builtins.list", "null", spec("builtins.tuple"), spec("builtins.dict", '["a b"]')),
    ],
)
def test_plain_nestings_pass(content: Any) -> None:
    check_treespec(treespec(content))


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"type": None, "context": None},
        {**LEAF, "more": 1},
        spec(5),
        {**LEAF, "children_spec": {}},
        spec("x", '["quote\'"]'),
        spec("x", '["back\\\\slash"]'),
        spec("x", '{"key\'": 1}'),
        spec("x", ["line\n"]),
        spec("x", [["deep'"]]),
        spec("x", {"a": "deep'"}),
        spec("x", {"default_factory_module": "os", "default_factory_name": "list"}),
        spec("x", {"default_factory_module": "builtins", "default_factory_name": "eval"}),
        spec("x", {"default_factory_name": "list"}),
        spec("x", {"default_factory_module": "builtins"}),
        spec("x", {"__enum__": True, "fqn": "antigravity:Class"}),
        spec("x", {"__enum__": True, "fqn": "json:JSONDecoder"}),
        spec("x", {"__enum__": True, "fqn": 5}),
        spec("x", {"__enum__": True}),
        spec("x", "null", {}),
        call('["no identifier"]'),
        call("[1]"),
        call('"no identifier"'),
        5,
        None,
    ],
)
def test_other_nestings_are_refused(content: Any) -> None:
    with pytest.raises(RefusedError):
        check_treespec(treespec(content))


@pytest.mark.parametrize("text", ["", "{", "5", "[1]", '["x", {}]', "null", "[1, 2, 3]"])
def test_what_is_no_nesting_is_refused(text: str) -> None:
    with pytest.raises(RefusedError):
        check_treespec(text)


@pytest.mark.parametrize(("depth", "fine"), [(100, True), (101, False)])
def test_nestings_are_a_hundred_deep_at_most(depth: int, fine: bool) -> None:
    content = LEAF
    for _ in range(depth):
        content = spec("builtins.list", "null", content)
    assert passes(check_treespec, treespec(content)) is fine
    inner: Any = "a"
    for _ in range(depth):
        inner = [inner]
    assert passes(check_treespec, treespec(spec("x", inner))) is fine
    assert passes(check_treespec, treespec(spec("x", json.dumps(inner)))) is fine


@pytest.mark.parametrize(
    ("key", "fine"), [("a", True), ("", True), ("a b", True), ("a'", False), ('a"', False), ("\x07", False)]
)
def test_keys_can_stand_between_quotes(key: str, fine: bool) -> None:
    assert passes(check_key, key) is fine


@pytest.mark.parametrize(
    ("record", "name", "most", "item"),
    [
        ("TensorMeta", "sizes", 64, {"as_int": 1}),
        ("TensorMeta", "strides", 64, {"as_int": 1}),
        ("ExportedProgram", "guards_code", 10_000, "True"),
        ("GraphModule", "module_call_graph", 100_000, {"fqn": "a"}),
    ],
)
def test_lists_that_cost_torch_time_have_an_end(record: str, name: str, most: int, item: Any) -> None:
    from torch._export.serde import schema

    check_value({name: [item] * most}, getattr(schema, record))
    with pytest.raises(RefusedError, match=f"^.*{most + 1} {name} of a {record}, more than {most}"):
        check_value({name: [item] * (most + 1)}, getattr(schema, record))


def test_ranges_of_symbols_have_an_end() -> None:
    from torch._export.serde import schema

    ranges = {f"s{number}": {"min_val": 2, "max_val": None} for number in range(10_000)}
    check_value({"range_constraints": ranges}, schema.ExportedProgram)
    with pytest.raises(RefusedError, match="10001 range_constraints of a ExportedProgram, more than 10000"):
        check_value({"range_constraints": {**ranges, "u0": {}}}, schema.ExportedProgram)


@pytest.mark.parametrize(
    ("value", "kind", "passed"),
    [
        (1, int, True), (True, int, False), (1.0, int, False), (True, bool, True), (1, bool, False), (1.5, float, True),
        (2, float, True), ("Infinity", float, True), ("NaN", float, True), ("1.5", float, False), (True, float, False),
        ("plain", str, True), ("a'b", str, False), (3, str, False), ([1, 2], list[int], True),
        ([1, "2"], list[int], False),
        ((1,), list[int], False), ({"a": 1}, dict[str, int], True), ({"a'": 1}, dict[str, int], False),
        ({"a": "x"}, dict[str, int], False), (None, int | None, True), (3, int | None, True), ("3", int | None, False),
        (3, bytes, False), ("x" * 512, str, True), ("x" * 513, str, False),
    ],
)  # fmt: skip
def test_values_of_a_document_have_their_type(value: Any, kind: Any, passed: bool) -> None:
    assert passes(lambda one: check_value(one, kind), value) is passed
