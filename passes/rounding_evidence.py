"""What rounding costs, edge by edge, in one low type: `ranges.rounding` joined with the edges of the program."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import polars as pl
from calibcast.calib.rounding_edges import Edge
from calibcast.calib.rounding_table import OUTPUT

# Noise where something becomes NaN or Inf: above all that is finite, and sums of it are finite still.
LOST = 1e30
_COLUMNS = ("node", "input", "output", "noise", "noise_worst", "noise_by_output", "nonfinite", "steps")


@dataclass(frozen=True, slots=True)
class MeasuredEdge:
    """An edge and the noise-to-signal power that rounding it alone makes at each output of the program.

    noise: of the worst batch; one number for all outputs where they were not told apart. weight: the largest of them.
    """

    edge: Edge
    noise: tuple[float, ...]
    weight: float

    @property
    def worst_output(self) -> int:
        return max(range(len(self.noise)), key=self.noise.__getitem__)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node that rounds it when it is low: the reader, the maker, and the movers between. Others are none."""
        made = () if self.edge.is_literal else (self.edge.input,)
        read = () if self.edge.node == OUTPUT else (self.edge.node,)
        return tuple(dict.fromkeys((*read, *made, *self.edge.movers)))


@dataclass(frozen=True)
class RoundingEvidence:
    """The edges of a program with what was measured of them. missing: nodes of edges of which nothing was."""

    edges: tuple[MeasuredEdge, ...] = field(repr=False)
    missing: frozenset[str] = frozenset()

    def knows(self, node: str) -> bool:
        """Whether the measurement decides on `node`: all edges that it rounds were measured."""
        return node not in self.missing


def rounding_evidence(edges: Iterable[Edge], rounding: pl.DataFrame, low_type: str) -> RoundingEvidence | None:
    """The evidence for `low_type` ("float16"); None where rounding was not measured at all."""
    rows = _rows(rounding, low_type)
    if not rows:
        return None
    found: list[MeasuredEdge] = []
    missing: set[str] = set()
    for edge in edges:
        noise = rows.get((edge.node, edge.input, edge.output))
        if noise is None:
            missing.update(MeasuredEdge(edge, (), 0.0).nodes)
        else:
            found.append(MeasuredEdge(edge, noise, max(noise)))
    return RoundingEvidence(tuple(found), frozenset(missing))


def _rows(rounding: pl.DataFrame, low_type: str) -> Mapping[tuple[str, str, int], tuple[float, ...] | None]:
    chosen = rounding.filter(pl.col("low_precision_type") == low_type).select(_COLUMNS)
    return {
        (node, maker, output): None if noise is None else _worst(noise, worst, by_output, lost)
        for node, maker, output, noise, worst, by_output, lost, _ in chosen.iter_rows()
    }


def _worst(mean: float, worst: float | None, by_output: list[float] | None, lost: int | None) -> tuple[float, ...]:
    """The noise at each output in the worst batch, as far as the table tells batches apart there."""
    if by_output is None or len(by_output) == 1:
        return (_finite(max(mean, worst or 0.0)),)
    share = worst / mean if worst is not None and mean > 0 and math.isfinite(mean) else 1.0
    return tuple(_finite(value * max(1.0, share)) for value in by_output)


def _finite(noise: float) -> float:
    return min(noise, LOST) if noise == noise else LOST
