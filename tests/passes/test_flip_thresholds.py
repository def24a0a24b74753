"""At which `data_max` nodes flip where they depend on one another: thresholds pass on until none rises any more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from calibcast.passes.flips import _later, _settled, low_at


@pytest.mark.parametrize(
    ("thresholds", "later"),
    [([], 0.0), ([3.0], 3.0), ([3.0, 5.0, 4.0], 5.0), ([3.0, None], None), ([None], None), ([0.5, 0.25], 0.5)],
)
def test_the_last_of_several_flips_at_the_largest(thresholds: list[float | None], later: float | None) -> None:
    assert _later(thresholds) == later


def settled(
    flips: dict[str, float | None], followed: dict[str, list[str]], *ties: tuple[list[str], bool]
) -> dict[str, float | None]:
    named: Any = [(SimpleNamespace(pinned="a result" if pinned else None), members) for members, pinned in ties]
    return dict(_settled(dict(flips), followed, named))


def test_what_follows_is_low_once_all_that_it_follows_are() -> None:
    flips: dict[str, float | None] = {"a": 2.0, "b": 5.0, "view": 0.0, "never": None, "other": 1.0}
    found = settled(flips, {"view": ["a", "b"]})
    assert found == flips | {"view": 5.0}
    assert settled(flips, {"view": ["a", "never"], "other": ["view"]}) == flips | {"view": None, "other": None}
    # Against the order of the graph it takes a second round.
    assert settled(flips, {"other": ["view"], "view": ["b"]}) == flips | {"view": 5.0, "other": 5.0}
    assert settled(flips | {"view": 7.0}, {"view": ["a"]})["view"] == 7.0


def test_tied_nodes_flip_together() -> None:
    flips: dict[str, float | None] = {"a": 2.0, "b": 5.0, "c": 1.0, "d": 0.0}
    assert settled(flips, {}, (["a", "b"], False)) == flips | {"a": 5.0, "b": 5.0}
    assert settled(flips, {}, (["a", "b"], True)) == flips | {"a": None, "b": None}  # tied to a result in fp32
    assert settled(flips, {}, (["a", "kept"], False)) == flips | {"a": None}
    # A tie raises what follows, and another tie.
    assert settled(flips, {"d": ["a"]}, (["a", "b"], False)) == flips | {"a": 5.0, "b": 5.0, "d": 5.0}
    chained = settled(flips, {}, (["c", "a"], False), (["a", "b"], False))
    assert chained == flips | {"a": 5.0, "b": 5.0, "c": 5.0}


def test_low_from_its_threshold_on() -> None:
    flips = {"a": 2.0, "never": None, "b": 0.0, "off": float("inf")}
    assert [low_at(flips, limit) for limit in (1.9, 2.0, float("inf"))] == [["b"], ["a", "b"], ["a", "b", "off"]]
