"""Rows of one operator in one module, of which one table has more: the longest runs are paired, up to a size."""

from __future__ import annotations

import polars as pl
import pytest
from calibcast.calib.alignment import _longest_runs


def rows(number: str, places: range) -> pl.DataFrame:
    """A row of another shape at each place."""
    shapes = [str(place) for place in places]
    return pl.DataFrame({number: range(len(shapes)), "shape": shapes, "before": "relu", "after": "relu"})


@pytest.mark.parametrize(("count", "by_shape"), [(750, True), (751, False)])
def test_up_to_1500_rows_are_paired_by_shape_and_more_in_order(count: int, by_shape: bool) -> None:
    """One new row at the start."""
    old, new = rows("old_row", range(1, count)), rows("new_row", range(count + (count == 750)))
    pairs = dict(_longest_runs(old, new))
    assert old.height + new.height == (1500 if by_shape else 1501)
    assert pairs == {row: row + by_shape for row in range(count - 1)}
