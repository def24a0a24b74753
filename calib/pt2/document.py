"""The JSON documents of a `.pt2`, checked field by field against torch's own schema.

torch does not check the values: text where a number belongs ends up in the Python that it writes and runs. Here each
value must have the type that the schema states, and each text must match the rule of its field. A field without a rule
of its own, also one that a later torch adds, accepts plain names only.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from calibcast.calib.pt2.expressions import check_expression, check_guard, check_symbol
from calibcast.calib.pt2.refusal import RefusedError, shown
from calibcast.calib.pt2.targets import check_target
from calibcast.calib.pt2.treespecs import check_key, check_treespec

Rule = Callable[[str], None]
_PLAIN = re.compile(r"[\w.\-:@/+<>=\[\]() ]{0,512}")
_INFINITE = frozenset({"Infinity", "-Infinity", "NaN"})
_MOST_TEXT = 1 << 24
# Lists for which torch takes time that grows with their length, or its square: what a program has, and plenty more.
_MOST_ITEMS = {
    ("TensorMeta", "sizes"): 64,
    ("TensorMeta", "strides"): 64,
    ("ExportedProgram", "range_constraints"): 10_000,
    ("ExportedProgram", "guards_code"): 10_000,
    ("GraphModule", "module_call_graph"): 100_000,
}


def parse_document(content: bytes, kind: str) -> dict[str, Any]:
    """The JSON of a document, as torch will parse it, checked against class `kind` of `torch._export.serde.schema`.

    Raises RefusedError.
    """
    from torch._export.serde import schema

    try:
        document = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"a {kind} that is no JSON: {shown(str(error))}") from error
    check_value(document, getattr(schema, kind))
    return dict(document)


def check_value(value: Any, kind: Any, rule: Rule | None = None) -> None:
    """Raise RefusedError unless `value`, from JSON, has the type `kind`, and its texts match their rules."""
    try:
        _check(value, kind, rule or plain)
    except RecursionError as error:
        raise RefusedError("a document that is nested too deeply") from error


def plain(text: str) -> None:
    """The rule of fields that have no rule of their own."""
    if not _PLAIN.fullmatch(text):
        raise RefusedError(f"the text {shown(text)} where a plain name belongs")


def identifier(text: str) -> None:
    """Names of nodes and inputs become variables of the Python that torch writes."""
    if text and not text.isidentifier():
        raise RefusedError(f"the name {shown(text)}, which is no identifier")


def attribute_path(text: str) -> None:
    """Names of parameters, buffers and constants: torch writes them between quotes, part by part."""
    check_key(text)
    if any(part.startswith("__") and part.endswith("__") for part in text.split(".")):
        raise RefusedError(f"the name {shown(text)}, which is Python's own")


def free(text: str) -> None:
    """Text that torch keeps and shows: stack traces, messages, and arguments, which it writes with `repr`."""
    if len(text) > _MOST_TEXT:
        raise RefusedError(f"a text of {len(text)} characters")


def _symbols_name(text: str) -> None:
    check_expression(text)
    if text.startswith(("u", "zuf")):
        check_symbol(text)


# By class and field of torch._export.serde.schema. `_RULES`: for texts and values of dicts; `_KEYS`: for keys of dicts.
_RULES: dict[tuple[str, str], Rule] = {
    ("SymExpr", "expr_str"): check_expression,
    ("Node", "target"): check_target,
    ("Argument", "as_operator"): check_target,
    ("Argument", "as_string"): free,
    ("Argument", "as_strings"): free,
    ("ConstantValue", "as_string"): check_key,
    ("ModuleCallSignature", "in_spec"): check_treespec,
    ("ModuleCallSignature", "out_spec"): check_treespec,
    ("ModuleCallSignature", "forward_arg_names"): identifier,
    ("ModuleCallEntry", "fqn"): attribute_path,
    ("ExportedProgram", "guards_code"): check_guard,
    ("Node", "metadata"): free,
    ("GraphModule", "metadata"): free,
    ("Node", "name"): identifier,
    ("NamedArgument", "name"): identifier,
    ("TensorArgument", "name"): identifier,
    ("TokenArgument", "name"): identifier,
    ("GraphArgument", "name"): identifier,
    ("CustomObjArgument", "name"): identifier,
    ("InputToConstantInputSpec", "name"): identifier,
    ("SymIntArgument", "as_name"): identifier,
    ("SymFloatArgument", "as_name"): identifier,
    ("SymBoolArgument", "as_name"): identifier,
    ("NamedTupleDef", "field_names"): identifier,
    ("InputToParameterSpec", "parameter_name"): attribute_path,
    ("InputToBufferSpec", "buffer_name"): attribute_path,
    ("InputToTensorConstantSpec", "tensor_constant_name"): attribute_path,
    ("InputToCustomObjSpec", "custom_obj_name"): attribute_path,
    ("BufferMutationSpec", "buffer_name"): attribute_path,
    ("ParameterMutationSpec", "parameter_name"): attribute_path,
    ("GradientToParameterSpec", "parameter_name"): attribute_path,
    ("GradientToUserInputSpec", "user_input_name"): identifier,
    ("UserInputMutationSpec", "user_input_name"): identifier,
}
_KEYS: dict[tuple[str, str], Rule] = {
    ("ExportedProgram", "range_constraints"): _symbols_name,
    ("Graph", "tensor_values"): identifier,
    ("Graph", "sym_int_values"): identifier,
    ("Graph", "sym_bool_values"): identifier,
    ("Graph", "sym_float_values"): identifier,
    ("Graph", "custom_obj_values"): identifier,
    ("Node", "metadata"): free,
    ("GraphModule", "metadata"): free,
    ("PayloadConfig", "config"): attribute_path,
}


def _check(value: Any, kind: Any, rule: Rule, keys: Rule = plain) -> None:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        _check(value, arguments[0], rule, keys)
    elif origin in (typing.Union, types.UnionType):
        if value is not None:
            _check(value, next(a for a in arguments if a is not type(None)), rule, keys)
    elif dataclasses.is_dataclass(kind):
        _check_record(value, typing.cast(type, kind))
    elif origin is list:
        for item in _of(list, value, kind):
            _check(item, arguments[0], rule, keys)
    elif origin is dict:
        for key, item in _of(dict, value, kind).items():
            keys(key)
            _check(item, arguments[1], rule, keys)
    else:
        _check_single(value, kind, rule)


def _check_single(value: Any, kind: Any, rule: Rule) -> None:
    if kind is str:
        rule(_of(str, value, kind))
    elif kind is float:
        if type(value) not in (int, float) and value not in _INFINITE:
            raise RefusedError(f"{shown(value)} where a number belongs")
    elif isinstance(kind, type) and issubclass(kind, enum.IntEnum):
        _of(int, value, kind)
    elif kind in (int, bool):
        _of(kind, value, kind)
    else:
        raise RefusedError(f"a field of a kind that this calibcast does not know: {kind}")


def _of(wanted: type, value: Any, kind: Any) -> Any:
    if type(value) is not wanted:
        raise RefusedError(f"{shown(value)} where {getattr(kind, '__name__', kind)} belongs")
    return value


def _check_record(value: Any, kind: type) -> None:
    _of(dict, value, kind)
    hints = _hints(kind)
    for name, item in value.items():
        if name in hints:  # torch ignores the others: fields of a later version
            place = (kind.__name__, name)
            if isinstance(item, (list, dict)) and len(item) > _MOST_ITEMS.get(place, len(item)):
                raise RefusedError(f"{len(item)} {name} of a {kind.__name__}, more than {_MOST_ITEMS[place]}")
            _check(item, hints[name], _RULES.get(place, plain), _KEYS.get(place, plain))


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    from torch._export.serde import schema

    hints = typing.get_type_hints(kind, globalns=vars(schema), include_extras=False)
    return {name: hint for name, hint in hints.items() if not name.startswith("_")}
