"""Which change is told of a tensor between two tables, at each number where that turns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from calibcast.calib.range_diff import RangeDiff, _compared, _side, _times, headroom_text
from calibcast.calib.range_schema import SCHEMA

ROW: dict[str, Any] = {
    "node": "n", "output": 0, "op": "o", "module": "m", "source": "", "kind": "activation", "dtype": "float32",
    "shape": ["1"], "batches": 1, "elements": 1, "absmax": 100.0, "nan": 0, "posinf": 0, "neginf": 0, "zeros": 0,
    "masked": 0,
}  # fmt: skip


def compared(old: dict[str, Any] | None, new: dict[str, Any] | None, tolerance: float = 0.01) -> dict[str, Any]:
    def side(changed: dict[str, Any] | None, suffix: str) -> pl.DataFrame:
        row = ROW | (changed or {})
        frame = pl.DataFrame({name: [row.get(name)] for name in SCHEMA}, schema=SCHEMA)
        return _side(frame, pl.Series([None if changed is None else 0], dtype=pl.Int64), suffix)

    frame = pl.concat([side(new, "_new"), side(old, "_old")], how="horizontal")
    places = [name.removesuffix("_new") for name in frame.columns if frame.schema[name] == pl.String and "_new" in name]
    places += ["output", "shape"]
    named = [pl.coalesce(f"{name}_new", f"{name}_old").alias(name) for name in places if f"{name}_new" in frame.columns]
    return _compared(frame.with_columns(named), tolerance).row(0, named=True)


@pytest.mark.parametrize(
    ("old", "new", "change"),
    [
        (None, {}, "new"),
        ({}, None, "gone"),
        ({}, {}, "same"),
        ({}, {"absmax": 100.9}, "same"),
        ({}, {"absmax": 101.1}, "grew"),
        ({"absmax": 100.9}, {}, "same"),
        ({"absmax": 101.1}, {}, "shrank"),
        ({"absmax": 0.0}, {"absmax": 1.0}, "grew"),
        ({"absmax": 0.0}, {"absmax": 0.0}, "same"),
        ({}, {"absmax": 0.0}, "shrank"),
        ({}, {"nan": 1}, "grew"),
        ({}, {"posinf": 1}, "grew"),
        ({}, {"neginf": 1}, "grew"),
        ({"nan": 1}, {"neginf": 1}, "same"),
        ({"nan": 2}, {"neginf": 1}, "same"),
        ({"nan": 1}, {"nan": 2, "absmax": 50.0}, "grew"),
    ],
)
def test_changes(old: dict[str, Any] | None, new: dict[str, Any] | None, change: str) -> None:
    assert compared(old, new)["change"] == change


def test_a_tolerance_of_its_own() -> None:
    assert compared({}, {"absmax": 149.0}, 0.5)["change"] == "same"
    assert compared({}, {"absmax": 151.0}, 0.5)["change"] == "grew"
    assert compared({"absmax": 149.0}, {}, 0.5)["change"] == "same"
    assert compared({"absmax": 151.0}, {}, 0.5)["change"] == "shrank"


def test_headroom_is_up_to_what_float16_holds() -> None:
    row = compared({"absmax": 65504.0}, {"absmax": 32752.0})
    assert (row["growth"], row["headroom_old"], row["headroom_new"], row["headroom_lost"]) == (0.5, 1.0, 2.0, 0.5)
    row = compared({}, {"posinf": 1})
    assert (row["headroom_new"], row["headroom_lost"]) == (0.0, float("inf"))
    row = compared({"nan": 1}, {"nan": 1})
    assert (row["headroom_old"], row["headroom_lost"]) == (0.0, None)


def test_losses_are_above_one_percent_and_the_least_headroom_comes_first() -> None:
    frame = pl.DataFrame(
        {
            "n": ["a", "b", "c", "d", "e"],
            "headroom_lost": [1.01, 1.02, 3.0, 2.0, None],
            "headroom_new": [1.0, 5.0, 2.0, 2.0, 0.1],
        }
    )
    losses = lambda below: RangeDiff.losses(SimpleNamespace(frame=frame), below)["n"].to_list()  # type: ignore[arg-type] # noqa: E731
    assert losses(None) == ["c", "d", "b"]
    assert losses(5.0) == ["c", "d"]
    assert losses(5.1) == ["c", "d", "b"]
    assert losses(2.0) == []


@pytest.mark.parametrize(
    ("was", "now", "text"),
    [
        (12.0, 1.25, "m: 12x to 1.2x below 65504"),
        (12.0, 1.0, "m: 12x to 1x below 65504"),
        (1.0, 0.5, "m: 1x below to 2x above 65504"),
        (0.5, 0.1, "m: 2x to 10x above 65504"),
        (2.0, 0.0, "m: 2x below 65504 to NaN or Inf"),
    ],
)
def test_headroom_in_words(was: float, now: float, text: str) -> None:
    row: dict[str, object] = {"module": "m", "node": "n", "headroom_old": was, "headroom_new": now}
    assert headroom_text(row) == text
    assert headroom_text(row | {"module": ""}) == f"n{text[1:]}"


@pytest.mark.parametrize(
    ("factor", "text"), [(9.94, "9.9x"), (9.95, "10x"), (123.4, "123x"), (1.04, "1x"), (1.06, "1.1x")]
)
def test_factors_have_two_digits_below_ten(factor: float, text: str) -> None:
    assert _times(factor) == text
