"""Whether values from JSON have the types of the dataclass, list or dict that they are read as.

Python does not check them: a text where a list belongs is read letter by letter, and a number that is a text fails
hours later, somewhere else.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

_LARGEST = 2**63 - 1  # what polars and torch hold


def require_types(content: Mapping[str, Any], hints: Mapping[str, Any], place: str = "") -> None:
    """Raise ValueError, naming the first place, unless each of `content` has the type that `hints` says.

    A key that is missing is left to the reader. Types: str, bool, int (of 64 bits), float, Any, lists and tuples, dicts
    with text for keys, dataclasses, and unions with None.
    """
    for name, hint in hints.items():
        if name in content:
            _require(content[name], hint, f"{place}{name}")


def require_keys(content: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise KeyError for the first of these keys that is missing."""
    for name in names:
        content[name]


def fields_of(kind: type) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    return dict(_fields(kind))


@functools.cache
def _fields(kind: type) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)


def _require(value: Any, hint: Any, place: str) -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is not None:
            _require(value, next(one for one in arguments if one is not type(None)), place)
    elif origin in (list, tuple):
        for number, item in enumerate(_of(list, value, place)):
            _require(item, arguments[0], f"{place}[{number}]")
    elif origin is not None:  # a dict or a Mapping
        for key, item in _of(dict, value, place).items():
            _require(item, arguments[1], f"{place}.{key}")
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        require_types(_of(dict, value, place), _fields(hint), f"{place}.")
    elif hint is not Any:
        _require_single(value, hint, place)


def _require_single(value: Any, hint: type, place: str) -> None:
    if hint is not float or type(value) is not int:  # JSON writes 40.0 as 40, too
        _of(hint, value, place)
    if type(value) is int and abs(value) > _LARGEST:
        raise ValueError(f"{place} is a number of more than 64 bits")


def _of(kind: type, value: Any, place: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{place[:80]} is a {type(value).__name__}, and a {kind.__name__} belongs there")
    return value
