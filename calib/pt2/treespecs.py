"""How the inputs and outputs of a program are nested: JSON from which torch imports modules and writes Python."""

from __future__ import annotations

import enum
import json
import sys
from typing import Any

from calibcast.calib.pt2.refusal import RefusedError, shown

_FACTORIES = frozenset({"list", "dict", "set", "int", "float", "str", "tuple", "bool"})
_UNQUOTABLE = frozenset("'\"\\")
_MOST_DEPTH = 100


def check_treespec(text: str) -> None:
    """Raise RefusedError unless a serialised TreeSpec holds plain keys only, and imports nothing."""
    try:
        protocol, spec = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise RefusedError(f"the nesting of inputs {shown(text)}, which is no JSON") from error
    if not isinstance(protocol, int):
        raise RefusedError(f"the nesting of inputs {shown(text)}")
    _check_spec(spec, 0)
    _check_keywords(spec)


def check_key(key: str) -> None:
    """Raise RefusedError unless a key can stand between quotes in the Python that torch writes."""
    if not key.isprintable() or _UNQUOTABLE & set(key):
        raise RefusedError(f"the key {shown(key)} in the nesting of inputs or outputs")


def _check_spec(spec: Any, depth: int) -> None:
    if not isinstance(spec, dict) or set(spec) != {"type", "context", "children_spec"} or depth > _MOST_DEPTH:
        raise RefusedError(f"the nesting of inputs {shown(spec)}")
    kind, context, children = spec["type"], spec["context"], spec["children_spec"]
    if not isinstance(kind, str | None) or not isinstance(children, list):
        raise RefusedError(f"the nesting of inputs {shown(spec)}")
    if isinstance(context, str):
        context = _decoded(context)
    _check_context(context, 0)
    for child in children:
        _check_spec(child, depth + 1)


def _decoded(context: str) -> Any:
    """A context is JSON within JSON, unless its class has a format of its own."""
    try:
        return json.loads(context)
    except ValueError:
        return context
    except RecursionError as error:
        raise RefusedError("the nesting of inputs, which is too deep") from error


def _check_context(value: Any, depth: int) -> None:
    if depth > _MOST_DEPTH:
        raise RefusedError("the nesting of inputs, which is too deep")
    if isinstance(value, str):
        check_key(value)
    elif isinstance(value, list):
        for item in value:
            _check_context(item, depth + 1)
    elif isinstance(value, dict):
        _check_mapping(value)
        for key, item in value.items():
            check_key(key)
            _check_context(item, depth + 1)


def _check_mapping(value: dict[str, Any]) -> None:
    """torch imports the module that a `defaultdict` or an enumeration names, which runs the module."""
    if "default_factory_module" in value or "default_factory_name" in value:
        module, name = value.get("default_factory_module"), value.get("default_factory_name")
        if module != "builtins" or name not in _FACTORIES:
            raise RefusedError(f"a defaultdict of {shown(module)}.{shown(name)}, no plain container")
    if "__enum__" in value and not _is_known_enum(value.get("fqn")):
        name = shown(value.get("fqn"))
        raise RefusedError(f"the enumeration {name}, which is not imported: import the package that defines it first")


def _is_known_enum(name: Any) -> bool:
    """Whether `package.module:Class` is an enumeration of a module that this process has imported already."""
    if not isinstance(name, str):
        return False
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    return isinstance(found, type) and issubclass(found, enum.Enum)


def _check_keywords(spec: dict[str, Any]) -> None:
    """Keyword arguments become the parameters of a function that torch writes."""
    children = spec["children_spec"]
    if spec["type"] != "builtins.tuple" or len(children) != 2 or children[1]["type"] != "builtins.dict":
        return
    if children[0]["type"] != "builtins.tuple":
        return
    context = children[1]["context"]
    names = _decoded(context) if isinstance(context, str) else context
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or not name.isidentifier():
            raise RefusedError(f"the keyword argument {shown(name)}")
