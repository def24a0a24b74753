"""Values from JSON against the types that they are read as: each kind of type, taken and refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from calibcast.calib.json_types import fields_of, require_keys, require_types


@dataclass(frozen=True)
class Inner:
    size: int
    name: str = ""


@dataclass(frozen=True)
class Outer:
    inner: Inner
    many: tuple[Inner, ...] = ()
    by_name: dict[str, Inner] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (str, "text"), (bool, False), (float, 1.5), (float, 40), (Any, object()), (int, 2**63 - 1), (int, -(2**63) + 1),
        (int | None, None), (int | None, 3), (None | int, 3), (list[int], []), (list[int], [1, 2]),
        (tuple[str, ...], ["a"]), (dict[str, int], {"a": 1}), (Mapping[str, float], {"a": 1}),
        (list[Any], [1, "a", None]),
        (dict[str, Any] | None, {"a": object()}), (Inner, {"size": 3}), (Inner, {}), (Inner, {"other": 1}),
        (Outer, {"inner": {"size": 1}, "many": [{"size": 2}], "by_name": {"x": {"size": 3}}}),
        (list[list[int]], [[1], [], [2, 3]]),
    ],
)  # fmt: skip
def test_what_has_its_type_is_taken(hint: Any, value: Any) -> None:
    require_types({"a": value}, {"a": hint, "missing": int})


@pytest.mark.parametrize(
    ("hint", "value", "said"),
    [
        (str, 1, "a is a int, and a str belongs there"),
        (str, None, "a is a NoneType, and a str belongs there"),
        (bool, 1, "a is a int, and a bool belongs there"),
        (int, True, "a is a bool, and a int belongs there"),
        (int, 1.0, "a is a float, and a int belongs there"),
        (float, True, "a is a bool, and a float belongs there"),
        (float, "1.5", "a is a str, and a float belongs there"),
        (int, 2**63, "a is a number of more than 64 bits"),
        (int, -(2**63), "a is a number of more than 64 bits"),
        (float, 2**63, "a is a number of more than 64 bits"),
        (int | None, "3", "a is a str, and a int belongs there"),
        (None | int, "3", "a is a str, and a int belongs there"),
        (list[int], "12", "a is a str, and a list belongs there"),
        (list[int], [1, "2", 3], "a[1] is a str, and a int belongs there"),
        (tuple[str, ...], ["a", 2], "a[1] is a int, and a str belongs there"),
        (dict[str, int], [1], "a is a list, and a dict belongs there"),
        (dict[str, int], {"x": 1, "y": "z"}, "a.y is a str, and a int belongs there"),
        (list[list[int]], [[1], [2, None]], "a[1][1] is a NoneType, and a int belongs there"),
        (Inner, [3], "a is a list, and a dict belongs there"),
        (Inner, {"size": "3"}, "a.size is a str, and a int belongs there"),
        (Outer, {"many": [{"size": 1}, {"size": None}]}, "a.many[1].size is a NoneType, and a int belongs there"),
        (Outer, {"by_name": {"x": {"name": 1}}}, "a.by_name.x.name is a int, and a str belongs there"),
    ],
)
def test_what_has_not_is_refused_by_its_place(hint: Any, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=r"^a") as caught:
        require_types({"a": value}, {"first": str, "a": hint})
    assert str(caught.value) == said


def test_a_place_is_named_by_80_characters_at_most() -> None:
    with pytest.raises(ValueError, match=f"^{'k' * 80} is a str"):
        require_types({"k" * 81: ""}, {"k" * 81: int})
    with pytest.raises(ValueError, match=r"^plan\.a is a str"):
        require_types({"a": ""}, {"a": int}, "plan.")


def test_keys_must_be_there() -> None:
    require_keys({"a": 1, "b": None}, ["a", "b"])
    with pytest.raises(KeyError, match="b"):
        require_keys({"a": 1, "c": 1}, ["a", "b", "c"])


def test_fields_are_a_copy() -> None:
    fields_of(Inner).clear()
    assert fields_of(Inner) == {"size": int, "name": str}
