"""How much of a tensor a low type would lose, from its histogram: exact at powers of two, bounds elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import polars as pl
import torch

_BIAS = 127  # bin e of a histogram holds the magnitudes [2^(e-127), 2^(e-126))
_FINITE_BINS = 255


def losses(frame: pl.DataFrame, low_type: torch.dtype) -> pl.DataFrame:
    """Per row of a range table: how many of its `finite` elements the low type overflows or underflows.

    overflow, overflow_at_least: the upper and the lower bound of how many round to inf. In fp16 these are magnitudes
    from 65520 on, which lies inside a bin: the upper bound counts all of that bin where the peak reaches so far.
    underflow: nonzero elements below the smallest normal value; exact, as that is a power of two. Without a histogram
    it is an upper bound, and `underflow_at_least` the lower one, both from the peak and the smallest magnitude alone.
    """
    info = torch.finfo(low_type)
    exponent = math.frexp(info.max)[1] - 1  # 15 for fp16
    to_inf = info.max + 2.0**exponent * info.eps / 2  # half a step above the largest value; a tie rounds to even: inf
    top, least = exponent + _BIAS, int(math.log2(info.smallest_normal)) + _BIAS
    bins = pl.col("histogram").list
    certain = bins.slice(top + 1, _FINITE_BINS - top - 1).list.sum()
    reaches = pl.col("absmax").fill_null(0.0) >= to_inf
    faint = pl.col("smallest").fill_null(math.inf) < info.smallest_normal
    finite = pl.col("elements") - pl.sum_horizontal("nan", "posinf", "neginf", "masked")
    tiny = bins.slice(0, least).list.sum() - pl.col("zeros")
    known = pl.col("histogram").is_not_null()
    some = pl.when(reaches)
    return frame.select(
        "node",
        "output",
        "kind",
        finite=finite,
        overflow=some.then(pl.when(known).then(certain + bins.get(top)).otherwise(finite)).otherwise(0),
        overflow_at_least=some.then(pl.max_horizontal(pl.when(known).then(certain).otherwise(1), 1)).otherwise(0),
        underflow=pl.when(known).then(tiny).when(faint).then(finite - pl.col("zeros")).otherwise(0),
        underflow_at_least=pl.when(known).then(tiny).when(faint).then(1).otherwise(0),
    )


@dataclass(frozen=True)
class Shares:
    """Bounds of the share of elements that overflow and underflow; NaN where there is no element."""

    overflow: float
    overflow_at_least: float
    underflow: float
    underflow_at_least: float


class LossTable:
    """The losses of a table's inputs and activations in one low type, to be added up over any set of tensors."""

    _COLUMNS = ("overflow", "overflow_at_least", "underflow", "underflow_at_least", "finite")

    def __init__(self, frame: pl.DataFrame, low_type: torch.dtype) -> None:
        moving = losses(frame, low_type).filter(pl.col("kind").is_in(["input", "activation"]))
        keys = zip(moving["node"], moving["output"], strict=True)
        self._row = {key: row for row, key in enumerate(keys)}
        self._counts = torch.tensor([moving[name].to_list() for name in self._COLUMNS], dtype=torch.int64)

    def of(self, tensors: frozenset[tuple[str, int]]) -> Shares:
        """Shares over all elements of these tensors. Tensors that were not measured do not count."""
        rows = [self._row[key] for key in tensors if key in self._row]
        *parts, whole = self._counts[:, rows].sum(1).tolist()
        return Shares(*(part / whole if whole else math.nan for part in parts))
