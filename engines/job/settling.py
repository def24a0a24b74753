"""Have the ranges settled? It compares the statistics before and after the last tenth of the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import polars as pl
from calibcast.calib.checkpoint import Checkpoint
from calibcast.calib.ranges import RangeTable
from calibcast.calib.statistics import Statistics
from calibcast.passes.plan import PrecisionPlan

TAIL = 0.1
# Copies of the statistics are kept at positions that grow by this factor. So one copy is near nine tenths of any length
# (a stream does not tell its length in advance), and never more than four are held.
_GROWTH = 1.05


class Early:
    """Copies of the statistics at earlier positions. One of them is just before the last tenth."""

    def __init__(self, copies: Mapping[int, Statistics] | None = None) -> None:
        self.copies: dict[int, Statistics] = dict(copies or {})

    def note(self, position: int, total: Statistics) -> None:
        """Call it when `position` batches are finished: keeps a copy when one is due, and drops those that are too
        old."""
        newest = max(self.copies, default=0)
        if position >= newest * _GROWTH:
            self.copies[position] = total.to("cpu", copy=True)
        for old in [p for p in self.copies if p < before_tail(position, self.copies)]:
            del self.copies[old]


def before_tail(position: int, copies: Mapping[int, Any]) -> int:
    """The position of the latest copy that leaves out at least a tenth of `position` batches; 0 when there is none."""
    return max((p for p in copies if p <= (1 - TAIL) * position), default=0)


def early_part(checkpoint: Checkpoint) -> Checkpoint | None:
    """The checkpoint as it was before the last tenth; None when there were too few batches for that."""
    position = before_tail(checkpoint.position, checkpoint.early)
    if position == 0:
        return None
    return replace(checkpoint, statistics=checkpoint.early[position], position=position, early={})


@dataclass(frozen=True)
class Settling:
    """What the last batches changed.

    batches: how many there were. last: how many of them are the last part. tensors: how many were measured on data.
    growing: tensors whose peak grew in the last part, largest factor first, with the factor. moved: nodes whose
    decision changed.
    """

    batches: int
    last: int
    tensors: int
    growing: tuple[tuple[str, float], ...]
    moved: tuple[str, ...] = ()

    @property
    def growing_share(self) -> float:
        return len(self.growing) / self.tensors if self.tensors else 0.0

    def __str__(self) -> str:
        if not self.growing and not self.moved:
            return f"settled: in the last {self.last} of {self.batches} batches no tensor grew"
        shown = ", ".join(f"{name} x{factor:.5g}" for name, factor in self.growing[:3])
        moved = f": {', '.join(self.moved[:8])}{' ..' if len(self.moved) > 8 else ''}" if self.moved else ""
        return (
            f"in the last {self.last} of {self.batches} batches {len(self.growing)} of {self.tensors} tensors grew "
            f"({shown}), and {len(self.moved)} decisions moved{moved}"
        )

    def to_json(self) -> dict[str, Any]:
        """For the manifest: the twenty that grew most, by name; None as factor where a tensor grew from zero."""
        growing = {
            "tensors": self.tensors,
            "growing": len(self.growing),
            "furthest": {name: factor if math.isfinite(factor) else None for name, factor in self.growing[:20]},
        }
        return {"batches": self.batches, "last": self.last, **growing, "moved": list(self.moved)}


def settling(early: RangeTable, whole: RangeTable, before: PrecisionPlan, after: PrecisionPlan) -> Settling:
    """Compare the ranges and the decisions before the last tenth with those after it."""
    keys = ["node", "output"]
    data = whole.frame.filter(pl.col("kind").is_in(["input", "activation"]) & pl.col("absmax").is_not_null())
    both = data.join(early.frame.select([*keys, pl.col("absmax").alias("before")]), on=keys, maintain_order="left")
    grew = both.filter(pl.col("before").is_null() | (pl.col("absmax") > pl.col("before")))
    # Growth from zero, or from no value, counts as infinite.
    factor = pl.when(pl.col("before") > 0).then(pl.col("absmax") / pl.col("before")).otherwise(float("inf"))
    rows = grew.select("node", "output", factor.alias("factor")).sort("factor", descending=True, maintain_order=True)
    names = tuple((f"{node}[{output}]" if output else node, float(by)) for node, output, by in rows.iter_rows())
    moved = tuple(
        new.node for old, new in zip(before.decisions, after.decisions, strict=True) if old.precision != new.precision
    )
    batches, first = _batches(whole), _batches(early)
    return Settling(batches, batches - first, both.height, names, moved)


def _batches(table: RangeTable) -> int:
    """How many batches were measured, from the rows: the table's own count is of all data, also in an early table."""
    seen = table.frame.filter(pl.col("kind").is_in(["input", "activation"]))["batches"].max()
    return int(seen) if isinstance(seen, int) else 0
