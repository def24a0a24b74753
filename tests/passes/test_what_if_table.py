"""The table of `what_if` as text, whole: how each number is written, which columns there are, what stands below."""

from __future__ import annotations

import math
from typing import Any

import polars as pl
import pytest
from calibcast.passes.what_if_table import SCHEMA, Alternatives

ROW: dict[str, Any] = {
    "low_precision_type": "float16", "data_max": 512.0, "range_quantile": 1.0, "min_sqnr_db": None,
    "predicted_sqnr_db": None, "nodes_low": 7, "nodes_high": 3, "nodes_share": 0.7, "work_low": 900,
    "work_share": 0.9004, "activation_bytes_low": 12300, "activation_share": 0.25, "casts": 4, "bytes_cast": 12300,
    "overflow": 0.0123, "overflow_at_least": 0.001, "underflow": 0.0, "underflow_at_least": 0.0, "to_low": [],
    "to_high": [],
}  # fmt: skip
MODULES = {"linear": "encoder.0", "add": ""}
END = "shares are of the nodes that a plan decides on"


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def lines(*changed: dict[str, Any], base: str | None = None) -> list[str]:
    frame = Alternatives.of([ROW | one for one in changed], MODULES, "the plan")
    return (str(frame) if base is None else frame.table(base)).split("\n")


def test_by_rules() -> None:
    assert lines({}, {"data_max": 1e-3, "range_quantile": 0.999, "nodes_low": 10, "nodes_high": 0, "casts": 0}) == [
        "type    limit quantile nodes low  work activ. casts    cast overflow underfl. flips",
        "float16   512        1   7 of 10 90.0%  25.0%     4 12.3 kB  <=0.012        0 +0 -0",
        "float16 0.001    0.999  10 of 10 90.0%  25.0%     0 12.3 kB  <=0.012        0 +0 -0",
        f"flips: nodes that become low (+) or stop being low (-), compared with the plan; {END}",
    ]


def test_by_a_budget() -> None:
    """A quantile that is the same in all rows is left out; a plan below its budget is marked."""
    met = {"min_sqnr_db": 40.0, "data_max": None, "predicted_sqnr_db": 40.0}
    unmet = {"min_sqnr_db": 62.5, "predicted_sqnr_db": 57.25, "bytes_cast": 999}
    assert lines(met, unmet, base="yesterday") == [
        "type           limit pred. dB nodes low  work activ. casts    cast overflow underfl. flips",
        "float16        40 dB     40.0   7 of 10 90.0%  25.0%     4 12.3 kB  <=0.012        0 +0 -0",
        "float16 62.5 dB, 512    57.2!   7 of 10 90.0%  25.0%     4   999 B  <=0.012        0 +0 -0",
        "! below the budget: the noise comes from all over the program, and no few nodes are to blame",
        f"flips: nodes that become low (+) or stop being low (-), compared with yesterday; {END}",
    ]
    # A quantile that differs is shown, and what was not predicted has no number.
    heading, first, second = lines(met, {"range_quantile": 0.5})[:3]
    assert heading.split()[:5] == ["type", "limit", "quantile", "pred.", "dB"]
    assert first.split()[:6] == ["float16", "40", "dB", "1", "40.0", "7"]
    assert second.split()[:5] == ["float16", "512", "0.5", "7", "of"]


@pytest.mark.parametrize(
    ("most", "least", "text"),
    [(0.25, 0.25, "0.25"), (0.25, 0.2, "<=0.25"), (0.0, 0.0, "0"), (math.nan, math.nan, "-"), (0.126, 0.126, "0.13")],
)
def test_a_bound_says_that_it_is_one(most: float, least: float, text: str) -> None:
    row = lines({"overflow": most, "overflow_at_least": least})[1]
    assert row.split()[-4] == text
    row = lines({"underflow": most, "underflow_at_least": least})[1]
    assert row.split()[-3] == text


def test_nodes_that_flip_are_named_with_their_modules() -> None:
    both = {"to_low": ["linear"], "to_high": ["add", "linear", "mul"], "range_quantile": 0.99}
    many = {"to_low": [f"n{i}" for i in range(8)], "min_sqnr_db": 40.0}
    _, first, second, _, *flips = lines(both, many)
    assert (first.split()[-2:], second.split()[-2:]) == (["+1", "-3"], ["+8", "-0"])
    assert flips == [
        "  float16, data_max 512, quantile 0.99: 1 node low now: linear (encoder.0)",
        "  float16, data_max 512, quantile 0.99: 3 nodes no longer low: add, linear (encoder.0), mul",
        "  float16, budget 40 dB, data_max 512: 8 nodes low now: n0, n1, n2, n3, n4, n5 and 2 more",
    ]


@pytest.mark.parametrize(
    ("width", "gone"),
    [
        (83, []),
        (82, ["activ."]),
        (76, ["activ."]),
        (75, ["activ.", "casts"]),
        (70, ["activ.", "casts"]),
        (69, ["activ.", "casts", "cast"]),
        (62, ["activ.", "casts", "cast"]),
        (61, ["activ.", "casts", "cast", "quantile"]),
        (53, ["activ.", "casts", "cast", "quantile"]),
        (52, ["activ.", "casts", "cast", "quantile", "underfl."]),
    ],
)
def test_columns_go_in_this_order_where_the_terminal_is_narrow(
    width: int, gone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    heading = lines({})[0]
    words = ["type", "limit", "quantile", "nodes low", "work", "activ.", "casts", "cast", "overflow", "underfl."]
    assert heading.replace("nodes low", "nodes_low").split() == [
        *(word.replace(" ", "_") for word in words if word not in gone),
        "flips",
    ]


def test_what_polars_makes_of_it_prints_as_polars_does() -> None:
    frame = Alternatives.of([ROW], MODULES, "the plan")
    assert frame.schema == SCHEMA
    part = frame.select("casts", "bytes_cast")
    assert str(part) == repr(part) == str(pl.DataFrame(part))
    assert repr(frame) == str(frame)
    assert str(frame.clone()).startswith("type ")
