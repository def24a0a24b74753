"""What rounding costs, edge by edge, in one low type: `ranges.rounding` joined with the edges of the program."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import polars as pl
from calibcast.calib.rounding_edges import Edge
from calibcast.calib.rounding_table import OUTPUT

# Noise where something becomes NaN or Inf: more than any finite noise, but sums of it stay finite.
LOST = 1e30
# This many batches are told apart when noises are summed. The others count as one, where each edge has its worst noise.
MOST_BATCHES, OTHERS = 4, -1
_COLUMNS = ("node", "input", "output", "noise", "noise_worst", "worst_batch", "noise_by_output", "batches")


@dataclass(frozen=True, slots=True)
class MeasuredEdge:
    """An edge and the noise-to-signal power that rounding it alone makes at each output of the program.

    noise: at each of `outputs` outputs in the first batch, then at each in the next, and so on; one number where they
    were not told apart. weight: the largest of these.
    """

    edge: Edge
    noise: tuple[float, ...]
    weight: float
    outputs: int = 1

    @property
    def worst_output(self) -> int:
        return max(range(len(self.noise)), key=self.noise.__getitem__) % self.outputs

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node that, when low, rounds the edge: its reader, its maker, and the movers between."""
        made = () if self.edge.is_literal else (self.edge.input,)
        read = () if self.edge.node == OUTPUT else (self.edge.node,)
        return tuple(dict.fromkeys((*read, *made, *self.edge.movers)))


@dataclass(frozen=True)
class RoundingEvidence:
    """The edges of a program with their measured noise. missing: the nodes of edges that were not measured."""

    edges: tuple[MeasuredEdge, ...] = field(repr=False)
    missing: frozenset[str] = frozenset()

    def knows(self, node: str) -> bool:
        """Whether the measurement decides on `node`: all edges that it rounds were measured."""
        return node not in self.missing

    def with_noise(self, noises: Mapping[Edge, float], output: int) -> RoundingEvidence:
        """The same, where each edge also makes this noise at `output`, as if in one more batch. Edges that are not in
        `noises` make as much there as they do elsewhere.
        """
        return replace(self, edges=tuple(_seen_again(e, noises.get(e.edge, e.weight), output) for e in self.edges))


def _seen_again(measured: MeasuredEdge, noise: float, output: int) -> MeasuredEdge:
    row = [0.0] * measured.outputs
    row[output if output < measured.outputs else 0] = _finite(noise)
    return replace(measured, noise=(*measured.noise, *row), weight=max(measured.weight, *row))


def rounding_evidence(
    edges: Iterable[Edge], rounding: pl.DataFrame, low_type: str, integers: Collection[int] = ()
) -> RoundingEvidence | None:
    """The evidence for `low_type` ("float16"); None where rounding was not measured at all.

    integers: which outputs of the program are integers or booleans.
    """
    chosen = rounding.filter(pl.col("low_precision_type") == low_type).select(_COLUMNS)
    rows = {(row[0], row[1], row[2]): _Row(*row[3:]) for row in chosen.iter_rows()}
    if not rows:
        return None
    batches, outputs = _batches(rows.values()), max(len(row.by_output or [0]) for row in rows.values())
    found: list[MeasuredEdge] = []
    missing: set[str] = set()
    for edge in edges:
        row = rows.get(edge.key)
        if row is None or row.mean is None:
            missing.update(MeasuredEdge(edge, (), 0.0).nodes)
        else:
            noise = row.noise(batches, outputs, integers)
            found.append(MeasuredEdge(edge, noise, max(noise), outputs))
    return RoundingEvidence(tuple(found), frozenset(missing))


class _Row(NamedTuple):
    """What the table says of one edge."""

    mean: float | None
    worst: float | None
    worst_batch: int | None
    by_output: list[float] | None
    seen: int

    def noise(self, batches: Sequence[int], outputs: int, integers: Collection[int]) -> tuple[float, ...]:
        """The noise at each output in each of these batches: in the edge's worst batch as measured there, in the others
        the mean of the rest.

        For integers all batches count together: in the few elements of one batch a single change by chance is a large
        share. The share that changes counts like an amplitude, as noise twice as large flips twice as many comparisons.
        """
        assert self.mean is not None
        means = self.by_output if self.by_output is not None and len(self.by_output) == outputs else None
        given = [self.mean] * outputs if means is None else means
        found: list[float] = []
        for batch in batches:
            part = self._part(batch)
            found += [_finite(m * m if means and i in integers else m * part) for i, m in enumerate(given)]
        return tuple(found)

    def _part(self, batch: int) -> float:
        """The noise in one batch, as a factor of the mean."""
        if not self.mean or not math.isfinite(self.mean):
            return 1.0
        most = max(1.0, (self.worst or 0.0) / self.mean)
        if batch == self.worst_batch or batch == OTHERS or self.seen < 2:
            return most
        return max(0.0, (self.seen - most) / (self.seen - 1))


def _batches(rows: Iterable[_Row]) -> list[int]:
    """The batches in which edges have their worst noise, those with the most noise first; usually all of them."""
    totals: dict[int, float] = {}
    for row in rows:
        if row.worst is not None and row.worst_batch is not None:
            totals[row.worst_batch] = totals.get(row.worst_batch, 0.0) + _finite(row.worst)
    ordered = sorted(totals, key=lambda batch: -totals[batch])
    return [*ordered[:MOST_BATCHES], *([OTHERS] if len(ordered) > MOST_BATCHES else [])] or [OTHERS]


def _finite(noise: float) -> float:
    return min(noise, LOST) if noise == noise else LOST
