"""No `.pt2` runs code when calibcast loads it, and usual programs still load."""

from __future__ import annotations

import copyreg
import json
import os
import pickle
import random
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibcast.calib.artifacts import load_program
from calibcast.calib.errors import ArtifactError

from tests.calib.hostile_files import (
    CONSTANTS,
    MODEL,
    SAMPLES,
    WEIGHTS,
    Commands,
    changed_json,
    rewritten,
    save_net,
    saved,
    with_pickle,
)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("usual") / "net.pt2"
    save_net(path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; code that ran leaves a file PWNED in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(path: Path, *words: str) -> str:
    with pytest.raises(ArtifactError) as caught:
        load_program(path).module()
    assert not Path("PWNED").exists()
    message = str(caught.value)
    assert path.name in message
    assert "is not loaded, since" in message
    for word in words:
        assert word in message
    return message


def test_a_usual_program_loads_and_runs_as_before(here: Path) -> None:
    program, args = save_net(here / "net.pt2")
    found, expected = load_program("net.pt2").module()(*args), program.module()(*args)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("member", [SAMPLES, "data/weights/model.pt", "data/constants/model.pt"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hidden_pickle_is_refused(usual: Path, here: Path, member: str, protocol: int) -> None:
    content = saved(((Commands("touch PWNED"),), {}), protocol)
    refused(rewritten(usual, here / "evil.pt2", {member: content}))


def _pickles() -> dict[str, bytes]:
    system = f"c{os.system.__module__}\nsystem\n".encode()
    argument = b"X\x0b\x00\x00\x00touch PWNED\x85"
    return {
        "global": b"\x80\x02" + system + argument + b"R.",
        "stack_global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + argument + b"R.",
        "inst": b"(X\x0b\x00\x00\x00touch PWNEDiposix\nsystem\n.",
        "obj": b"(" + system + b"X\x0b\x00\x00\x00touch PWNEDo.",
        "newobj": b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85\x81.",
        "newobj_ex": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93)}\x92.",
        "build": b"\x80\x02ccollections\nOrderedDict\n)R}X\x0c\x00\x00\x00__setstate__" + system + b"sb.",
        "memo": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x940h\x00h\x01\x93" + argument + b"R.",
        "ext1": b"\x80\x02\x82\x01" + argument + b"R.",
        "getattr": b"\x80\x02c__builtin__\ngetattr\nctorch\nos\nX\x06\x00\x00\x00system\x86R" + argument + b"R.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93" + argument + b"R.",
        "persid": b"Pstorage\n.",
        "next_buffer": b"\x80\x05\x97.",
        "call what was made": b"\x80\x02ccollections\nOrderedDict\n)R" + argument + b"R.",
        "no end": b"\x80\x02}",
        "underflow": b"\x80\x02R.",
        "unhashable": b"\x80\x02}]K\x01s.",
        "python 2": b"\x80\x02c__builtin__\neval\n" + argument + b"R.",
        "other module": b"\x80\x02ctorch.storage\npickle\n.",
        "storage that is none": b"\x80\x02ctorch\nnn.StorageStorage\n.",
    }


@pytest.mark.parametrize("name", _pickles())
def test_no_opcode_leads_out_of_tensors(usual: Path, here: Path, name: str) -> None:
    copyreg.add_extension("posix", "system", 1)
    try:
        refused(rewritten(usual, here / "evil.pt2", {SAMPLES: with_pickle(_pickles()[name])}), "pickle")
    finally:
        copyreg.remove_extension("posix", "system", 1)


def test_a_class_is_allowed_by_name_only(usual: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rewritten(usual, here / "net.pt2", {SAMPLES: saved(((pickle.PickleError("text"),), {}))})
    message = refused(path, "CALIBCAST_ALLOW=pickle.PickleError", "add_safe_globals")
    assert "If the file is yours" in message
    monkeypatch.setenv("CALIBCAST_ALLOW", "pickle.PickleError")
    assert load_program(path).example_inputs is not None


def _huge(meta: Any) -> None:
    meta["sizes"], meta["strides"] = [{"as_int": 1 << 40}], [{"as_int": 1}]


def _each(config: Any, change: Callable[[Any], None]) -> None:
    for entry in config["config"].values():
        change(entry)


EXPRESSION = "__import__('os').system('touch PWNED')"


def _first_node(document: Any) -> Any:
    return document["graph_module"]["graph"]["nodes"][0]


def _signature(document: Any) -> Any:
    return document["graph_module"]["module_call_graph"][0]["signature"]


def _sym(document: Any, text: str) -> None:
    for meta in document["graph_module"]["graph"]["tensor_values"].values():
        for size in meta["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = text


def _rename(value: Any, old: str, new: str) -> Any:
    """Every text `old` in a document, also as a key, becomes `new`."""
    if isinstance(value, dict):
        return {_rename(k, old, new): _rename(v, old, new) for k, v in value.items()}
    if isinstance(value, list):
        return [_rename(item, old, new) for item in value]
    return new if value == old else value


def _call(document: Any, target: str, **argument: Any) -> None:
    node = _first_node(document)
    node["target"] = target
    node["inputs"] = [{"name": "", "arg": argument or {"as_string": "touch PWNED"}, "kind": 1}]


def _in_spec(document: Any, old: str, new: str) -> None:
    spec = _signature(document)["in_spec"]
    assert old in spec
    _signature(document)["in_spec"] = spec.replace(old, new)


def _dict_of(keys: Any) -> str:
    return json.dumps({"type": "builtins.dict", "context": json.dumps(keys)})[:-1]


ENUM = _dict_of([{"__enum__": True, "fqn": "evil:X", "name": "a"}])
DICT = _dict_of(["a b"])
DEFAULTDICT = (
    '{"type": "collections.defaultdict", "context": {"default_factory_module": "evil", '
    '"default_factory_name": "x", "dict_context": ["a b"]}'
)

CHANGES: dict[str, Callable[[Any], None]] = {
    "sympy": lambda d: _sym(d, EXPRESSION),
    "sympy attribute": lambda d: _sym(d, "Symbol('s0').__class__"),
    "sympy lambda": lambda d: _sym(d, "(lambda: 1)()"),
    "sympy name": lambda d: _sym(d, "Symbol('s0 + __import__(1)')"),
    "sympy function": lambda d: _sym(d, "preview(Symbol('s0'))"),
    "sympy power": lambda d: _sym(d, "9**9**9**9"),
    "sympy Pow": lambda d: _sym(d, "Pow(Integer(9), Pow(Integer(9), Integer(9)))"),
    "sympy shift": lambda d: _sym(d, "LShift(Integer(1), Integer(999999999999))"),
    "sympy precision": lambda d: _sym(d, "Float('1.5', precision=999999999)"),
    "sympy factorial": lambda d: _sym(d, "99999999!"),
    "sympy depth": lambda d: _sym(d, "(" * 900 + "1" + ")" * 900),
    "range": lambda d: d["range_constraints"].update({EXPRESSION: {"min_val": 0, "max_val": 1}}),
    "range counted to": lambda d: d["range_constraints"].update({f"u{10**12}": {"min_val": 0, "max_val": 1}}),
    "ranges without end": lambda d: d["range_constraints"].update(
        {f"s{i}": {"min_val": 0, "max_val": 1} for i in range(10_001)}
    ),
    "guards without end": lambda d: d["guards_code"].extend(["1 == 1"] * 10_001),
    "dimensions without end": lambda d: next(iter(d["graph_module"]["graph"]["tensor_values"].values())).update(
        sizes=[{"as_int": 1}] * 65, strides=[{"as_int": 1}] * 65
    ),
    "guard": lambda d: d["guards_code"].append(EXPRESSION),
    "guard by torch": lambda d: d["guards_code"].append("torch.os.system('touch PWNED')"),
    "guard by type": lambda d: d["guards_code"].append("L['pair'].__class__.__base__"),
    "guard text": lambda d: d["guards_code"].append("1 == 1, \"\") or print(\""),
    "target": lambda d: _call(d, "torch.os.system"),
    "target hub": lambda d: _call(d, "torch.hub.load"),
    "target library": lambda d: _call(d, "torch.ops.load_library"),
    "target dunder": lambda d: _call(d, "torch.ops.load_library.__self__.x"),
    "target operator": lambda d: _call(d, "_operator.methodcaller"),
    "target classes": lambda d: _call(d, "torch.classes.load_library"),
    "target save": lambda d: _call(d, "torch.ops.aten.save.default"),
    "target file": lambda d: _call(d, "torch.ops.aten.from_file.default"),
    "target delegate": lambda d: _call(d, "torch.ops.higher_order.aoti_call_delegate"),
    "target extension": lambda d: _call(d, "#torch:x"),
    "target math": lambda d: _call(d, "math.sys"),
    "target unknown": lambda d: _call(d, "torch.ops.nobody.knows.it"),
    "operator as argument": lambda d: _call(d, "torch.ops.higher_order.cond", as_operator="torch.os.system"),
    "argument name": lambda d: _first_node(d)["inputs"][0].update(name="x=print(1),y"),
    "number that is text": lambda d: _first_node(d)["inputs"][0].update(arg={"as_int": EXPRESSION}),
    "literal input": lambda d: d.update(_rename(d, "fast", "' + str(print(1)) + '")),
    "parameter name": lambda d: d.update(_rename(d, "linear.weight", 'linear.w"), print(1), getattr(self, "w')),
    "node name": lambda d: d.update(_rename(d, "linear", "linear = print(1); linear")),
    "argument list": lambda d: _signature(d).update(forward_arg_names=["pair=print(1)", "more", "mode"]),
    "key": lambda d: _in_spec(d, "a b", "a'b"),
    "enumeration": lambda d: _in_spec(d, DICT, ENUM),
    "defaultdict": lambda d: _in_spec(d, DICT, DEFAULTDICT),
    "depth": lambda d: d.update(guards_code=["(" * 300 + "1" + ")" * 300]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_document_with_code_in_it_is_refused(usual: Path, here: Path, name: str) -> None:
    (here / "evil.py").write_text("open('PWNED', 'w')\n")
    refused(changed_json(usual, here / "evil.pt2", CHANGES[name]))


WEIGHT_CHANGES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "pickled": (WEIGHTS, lambda c: _each(c, lambda e: e.update(use_pickle=True))),
    "custom object": (
        CONSTANTS,
        lambda c: c["config"].update(
            x={"path_name": "custom_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        ),
    ),
    "opaque object": (
        CONSTANTS,
        lambda c: c["config"].update(
            x={"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
        ),
    ),
    "path": (WEIGHTS, lambda c: _each(c, lambda e: e.update(path_name="../../x"))),
    "declared size": (WEIGHTS, lambda c: _each(c, lambda e: _huge(e["tensor_meta"]))),
    "text for a size": (WEIGHTS, lambda c: _each(c, lambda e: e["tensor_meta"].update(sizes=[{"as_int": "9"}]))),
    "stride": (WEIGHTS, lambda c: _each(c, lambda e: e["tensor_meta"].update(storage_offset={"as_int": 1 << 50}))),
}


@pytest.mark.parametrize("name", WEIGHT_CHANGES)
def test_weights_are_plain_bytes_of_their_declared_size(usual: Path, here: Path, name: str) -> None:
    member, change = WEIGHT_CHANGES[name]
    refused(changed_json(usual, here / "evil.pt2", change, member))


@pytest.mark.parametrize(
    "member",
    [
        "data/constants/opaque_obj_0", "data/constants/custom_obj_0", "data/aotinductor/model/x.so",
        "models/other.json",
        "data/executorch/x.pte", "data/weights/weight_0.pkl", "../../escape", "x/../../escape", "link",
    ],
)  # fmt: skip
def test_members_that_torch_would_run_are_refused(usual: Path, here: Path, member: str) -> None:
    refused(rewritten(usual, here / "evil.pt2", {member: b"x"}), "member")


def _appended(source: Path, target: Path, name: str, content: bytes = b"x", **entry: Any) -> Path:
    target.write_bytes(source.read_bytes())
    with zipfile.ZipFile(target, "a") as archive:
        info = zipfile.ZipInfo(name)
        for key, value in entry.items():
            setattr(info, key, value)
        archive.writestr(info, content)
    return target


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("archive/models/model.json", {}),
        ("archive/models/MODEL.json", {}),
        ("/etc/passwd", {}),
        ("other/models/model.json", {}),
        ("archive/extra/link", {"external_attr": (stat.S_IFLNK | 0o777) << 16}),
        ("archive/extra/folder/", {}),
        ("archive/extra/bomb", {"compress_type": zipfile.ZIP_DEFLATED}),
        ("version", {}),
    ],
)
def test_an_archive_that_two_readers_could_read_differently_is_refused(
    usual: Path, here: Path, name: str, entry: dict[str, Any]
) -> None:
    with zipfile.ZipFile(usual) as archive:
        root = archive.namelist()[0].split("/")[0]
    refused(_appended(usual, here / "evil.pt2", name.replace("archive/", f"{root}/", 1), b"0" * 99, **entry))


def test_a_huge_declared_size_is_refused(usual: Path, here: Path) -> None:
    content = bytearray(usual.read_bytes())
    at = content.rindex(b"PK\x01\x02")  # the last entry of the directory
    content[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    path = here / "evil.pt2"
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        load_program(path)


def test_random_damage_is_refused_or_harmless(usual: Path, here: Path) -> None:
    """Bytes of the documents and pickles are changed at random: an ArtifactError, or a program; nothing else."""
    chance = random.Random(0)
    content = usual.read_bytes()
    outcomes = set()
    for _ in range(40):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 3, 20])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        Path("damaged.pt2").write_bytes(damaged)
        try:
            load_program("damaged.pt2")
            outcomes.add("loaded")
        except ArtifactError:
            outcomes.add("refused")
    assert "refused" in outcomes


def test_a_damaged_directory_of_the_archive_is_one_error(usual: Path, here: Path) -> None:
    """Names that are no UTF-8, an unknown version of zip, an encrypted member: whatever the zip reader raises."""
    content = usual.read_bytes()
    place = content.index(b"PK\x01\x02")
    for at, value in ((6, b"\xff\0"), (8, b"\xff\0"), (8, b"\x01\0"), (10, b"\x63\x00"), (46, b"\x9a\x9a")):
        changed = bytearray(content)
        changed[place + at : place + at + 2] = value
        changed[place + 8 : place + 10] = value if at == 8 else b"\x00\x08"  # names in UTF-8
        Path("damaged.pt2").write_bytes(changed)
        with pytest.raises(ArtifactError, match=r"damaged\.pt2 (cannot be|is not) loaded"):
            load_program("damaged.pt2")


@pytest.mark.parametrize("seed", range(3))
def test_random_pickles_are_described_or_refused_but_never_run(seed: int) -> None:
    from calibcast.calib.pt2.pickles import read_pickle
    from calibcast.calib.pt2.refusal import RefusedError

    chance = random.Random(seed)
    content = pickle.dumps({"a": [1, 2.5, "text"], "b": ({"c": None}, b"bytes")}, protocol=4)
    for _ in range(2000):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 2, 5])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            read_pickle(bytes(damaged), lambda named: False)
        except RefusedError:
            continue


def test_the_document_is_the_one_that_was_checked(usual: Path, here: Path) -> None:
    """JSON with one key twice means the same to the check as to torch: both take the last."""
    with zipfile.ZipFile(usual) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(MODEL)]
        document = json.loads(archive.read(name))
    text = json.dumps(document)
    guards = f'"guards_code": [{json.dumps(EXPRESSION)}]'
    refused(rewritten(usual, here / "evil.pt2", {MODEL: f"{text[:-1]}, {guards}}}".encode()}), "guard")


@pytest.mark.parametrize("name", ["net (1).pt2", "a,b & 'c'.pt2", "größe.pt2"])
def test_a_file_may_be_called_anything(here: Path, name: str) -> None:
    save_net(here / name)
    assert load_program(here / name).graph_signature.user_inputs


def test_only_classes_can_be_allowed(usual: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALIBCAST_ALLOW", "posix.system")
    content = saved(((Commands("touch PWNED"),), {}))
    refused(rewritten(usual, here / "evil.pt2", {SAMPLES: content}), "no class")
