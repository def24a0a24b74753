"""Numbers of a range table times powers of two: each column, histograms bin by bin, and what cannot be moved."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from calibcast.calib import MismatchError
from calibcast.calib.range_scaling import _moved, _scaled, exponents_of, true_frame
from calibcast.calib.range_schema import SCHEMA, Calibration, RangeData, Rescaled


def bins(**counts: int) -> list[int]:
    return [counts.get(f"b{place}", 0) for place in range(256)]


@pytest.mark.parametrize(
    ("before", "k", "after"),
    [
        (bins(b127=3, b130=4), 0, bins(b127=3, b130=4)),
        (bins(b0=9, b127=3, b130=4, b255=8), 2, bins(b0=9, b125=3, b128=4, b255=8)),
        (bins(b0=9, b127=3, b130=4, b255=8), -2, bins(b0=9, b129=3, b132=4, b255=8)),
        (bins(b3=1, b254=2), 2, bins(b1=1, b252=2)),
        (bins(b1=1, b252=2), -2, bins(b3=1, b254=2)),
        (bins(b0=5), 300, bins(b0=5)),
        (bins(b255=5), -300, bins(b255=5)),
        (None, 3, None),
    ],
)
def test_bins_move_by_k_but_zeros_and_what_is_not_finite_stay(before: Any, k: int, after: Any) -> None:
    assert _moved(before, k) == after


@pytest.mark.parametrize(("place", "k"), [(2, 2), (1, 1), (253, -2), (254, -1), (127, 127), (127, -128)])
def test_what_would_leave_the_normal_numbers_is_refused(place: int, k: int) -> None:
    with pytest.raises(MismatchError, match=rf"normal numbers when scaled by 2\^-?{abs(k)}$"):
        _moved(bins(**{f"b{place}": 1}), k)


def frame(*nodes: str, histogram: bool = True) -> pl.DataFrame:
    row = {name: 8.0 for name, kind in SCHEMA.items() if kind == pl.Float64}
    same = row | {"output": 0, "elements": 4, "zeros": 1, "histogram": bins(b0=1, b130=3) if histogram else None}
    rows = [{**same, "node": node} for node in nodes]
    return pl.DataFrame({name: [one.get(name) for one in rows] for name in SCHEMA}, schema=SCHEMA)


def test_magnitudes_are_scaled_and_counts_are_not() -> None:
    found = _scaled(frame("a", "b", "c"), [0, 2, -1]).rows(named=True)
    for name in ("min", "max", "absmax", "smallest", "mean", "rms"):
        assert [row[name] for row in found] == [8.0, 2.0, 16.0]
    assert [(row["elements"], row["zeros"], row["node"]) for row in found] == [(4, 1, "a"), (4, 1, "b"), (4, 1, "c")]
    assert [row["histogram"] for row in found] == [bins(b0=1, b130=3), bins(b0=1, b128=3), bins(b0=1, b131=3)]
    bare = _scaled(frame("a", "b", histogram=False), [0, 2])
    assert (bare["absmax"].to_list(), bare["histogram"].null_count()) == ([8.0, 2.0], 2)
    same = frame("a")
    assert _scaled(same, [0]) is same


def test_exponents_are_those_of_the_record_and_0_elsewhere() -> None:
    record = Rescaled({"b:0": 2, "c:1": 3}, {})
    table = RangeData(frame("a", "b", "c"), Calibration({}, "", 1, rescaled=record))
    assert exponents_of(table) == [0, 2, 0]
    assert exponents_of(RangeData(frame("a", "b"), Calibration({}, "", 1))) == [0, 0]
    true = true_frame(table)
    assert true.select("absmax", "exponent", "stored_absmax").rows() == [(8.0, 0, 8.0), (32.0, 2, 8.0), (8.0, 0, 8.0)]
