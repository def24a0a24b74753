"""Rounding evidence, summed over batches: a few numbers per edge and low type, and how they merge."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import polars as pl
import torch
from calibcast.calib.errors import MismatchError
from calibcast.calib.rounding_edges import Edge
from calibcast.calib.rounding_table import (
    LOW_TYPE_NAMES,
    METHODS,
    ROUNDING_KEY,
    ROUNDING_SCHEMA,
    SCALED,
    empty_rounding,
)

# How a statistic merges, by name.
_SUM, _WORST = {"merge": "sum"}, {"merge": "worst"}
_NO_BATCH = torch.iinfo(torch.int64).max
NOT_REACHED = "no batch reached it"


@dataclass(eq=False)
class RoundingStatistics:
    """Sums over batches, a row per edge and low type (the types of an edge are next to each other).

    noise: float64 [rows, columns], a column for each output or one for all. worst: float64 [rows], with its batch.
    local: float64 [rows], noise to signal at the reader. The rest int64 [rows]: `ran` counts batches that needed a run
    of their own, `estimated` those in whose place a rescaled program has an estimate.
    missing: by row, why a batch gave nothing.
    """

    noise: torch.Tensor = field(metadata=_SUM)
    worst: torch.Tensor = field(metadata=_WORST)
    worst_batch: torch.Tensor = field(metadata=_WORST)
    local: torch.Tensor = field(metadata=_SUM)
    nonfinite: torch.Tensor = field(metadata=_SUM)
    steps: torch.Tensor = field(metadata=_SUM)
    batches: torch.Tensor = field(metadata=_SUM)
    ran: torch.Tensor = field(metadata=_SUM)
    estimated: torch.Tensor = field(metadata=_SUM)
    missing: dict[int, str] = field(default_factory=dict)

    @classmethod
    def empty(cls, edges: int, columns: int) -> RoundingStatistics:
        """Nothing yet: the neutral element of `merge`."""
        rows = edges * len(LOW_TYPE_NAMES)

        def counts() -> torch.Tensor:
            return torch.zeros(rows, dtype=torch.int64)

        return cls(
            noise=torch.zeros(rows, columns, dtype=torch.float64),
            worst=torch.zeros(rows, dtype=torch.float64),
            worst_batch=torch.full((rows,), _NO_BATCH),
            local=torch.zeros(rows, dtype=torch.float64),
            nonfinite=counts(),
            steps=counts(),
            batches=counts(),
            ran=counts(),
            estimated=counts(),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoundingStatistics):
            return NotImplemented
        theirs = other.arrays()
        same = all(torch.equal(array, theirs[name]) for name, array in self.arrays().items())
        return same and self.missing == other.missing

    def merge(self, other: RoundingStatistics) -> None:
        """Add the statistics of other batches. Of two worst batches that are equal, the earlier one is kept."""
        worse = (other.worst > self.worst) | ((other.worst == self.worst) & (other.worst_batch < self.worst_batch))
        for item in fields(self):
            if item.metadata.get("merge") == "sum":
                getattr(self, item.name).add_(getattr(other, item.name))
            elif item.metadata.get("merge") == "worst":
                mine = getattr(self, item.name)
                mine.copy_(torch.where(worse, getattr(other, item.name), mine))
        self.missing = {**other.missing, **self.missing}

    def numbered_from(self, first: int) -> RoundingStatistics:
        """A copy whose batch numbers start at `first` instead of 0."""
        moved = torch.where(self.worst_batch < _NO_BATCH, self.worst_batch + first, self.worst_batch)
        return replace(self, worst_batch=moved)

    def widened(self, columns: int) -> RoundingStatistics:
        """A copy with this many columns: a frame in which nothing was measured does not say how many there are."""
        missing = columns - self.noise.shape[1]
        return replace(self, noise=torch.nn.functional.pad(self.noise, (0, missing)))

    def copy(self) -> RoundingStatistics:
        """A copy that later batches do not change."""
        return replace(
            self, missing=dict(self.missing), **{name: array.clone() for name, array in self.arrays().items()}
        )

    def arrays(self) -> dict[str, torch.Tensor]:
        """The arrays by name: all fields but `missing`."""
        return {item.name: getattr(self, item.name) for item in fields(self) if "merge" in item.metadata}


@dataclass(frozen=True, eq=False)
class RoundingRecord:
    """Evidence so far. edges: of the rows of `statistics`. apart: each column is one output. seen: batches so far."""

    edges: tuple[Edge, ...] = ()
    apart: bool = True
    statistics: RoundingStatistics = field(default_factory=lambda: RoundingStatistics.empty(0, 1))
    seen: int = 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoundingRecord):
            return NotImplemented
        same = self.has_edges_of(other) and (self.apart, self.seen) == (other.apart, other.seen)
        return same and self.statistics == other.statistics

    def has_edges_of(self, other: RoundingRecord) -> bool:
        """Whether the rows of both are of the same edges."""
        return [edge.key for edge in self.edges] == [edge.key for edge in other.edges]

    def copy(self) -> RoundingRecord:
        """A copy that later batches do not change."""
        return replace(self, statistics=self.statistics.copy())

    def numbered_from(self, first: int) -> RoundingRecord:
        """A copy whose batch numbers start at `first` instead of 0."""
        return replace(self, statistics=self.statistics.numbered_from(first))

    def merged(self, other: RoundingRecord) -> RoundingRecord:
        """One record of two sets of batches, whose numbers differ. A record without edges leaves the other unchanged.

        Raises MismatchError where the edges differ.
        """
        if not self.edges or not other.edges:
            return (self if self.edges else other).copy()
        if not self.has_edges_of(other):
            raise MismatchError("they have other edges of rounding: one was changed, or made by another version")
        columns = max(record.statistics.noise.shape[1] for record in (self, other))
        total = self.statistics.copy().widened(columns)
        total.merge(other.statistics.widened(columns))
        return RoundingRecord(self.edges, self.apart and other.apart, total, self.seen + other.seen)

    def frame(self) -> pl.DataFrame:
        """The evidence as `ranges.rounding`; see `calib.rounding_table`."""
        if not self.edges:
            return empty_rounding()
        found, some = self.statistics, self.statistics.batches.clamp_min(1)
        means, local = (found.noise / some[:, None]).tolist(), (found.local / some).tolist()
        keys = [(edge, low) for edge in self.edges for low in LOW_TYPE_NAMES]
        rows = [
            {"node": edge.node, "input": edge.input, "output": edge.output, "low_precision_type": low}
            | _measured(found, row, means[row], local[row], self.apart)
            for row, (edge, low) in enumerate(keys)
        ]
        return pl.DataFrame(rows, schema=ROUNDING_SCHEMA)


def _measured(found: RoundingStatistics, row: int, noise: list[float], local: float, apart: bool) -> dict[str, Any]:
    counts = {name: int(getattr(found, name)[row]) for name in ("nonfinite", "steps", "batches")}
    if not counts["batches"]:
        nothing = dict.fromkeys(ROUNDING_SCHEMA.keys() - set(ROUNDING_KEY))
        return {**nothing, **counts, "why_missing": found.missing.get(row, NOT_REACHED)}
    return {
        "noise": sum(noise),
        "noise_worst": float(found.worst[row]),
        "worst_batch": int(found.worst_batch[row]),
        "noise_by_output": noise if apart else None,
        "local_sqnr_db": -10 * math.log10(local) if local else math.inf,
        "method": SCALED if found.estimated[row] else METHODS[int(found.ran[row] > 0)],
        "why_missing": None,
        **counts,
    }


def _statistics_of(frame: pl.DataFrame) -> RoundingStatistics:
    """The statistics that a frame was made from, sums restored from means in float64."""
    by_output = frame["noise_by_output"].drop_nulls()
    columns = max(by_output.list.len().to_list(), default=1)
    found = RoundingStatistics.empty(len(frame) // len(LOW_TYPE_NAMES), columns)
    for row, entry in enumerate(frame.iter_rows(named=True)):
        batches = entry["batches"]
        if not batches:
            found.missing[row] = entry["why_missing"]
            continue
        found.noise[row] = torch.tensor(entry["noise_by_output"] or [entry["noise"]], dtype=torch.float64) * batches
        found.worst[row], found.worst_batch[row] = entry["noise_worst"], entry["worst_batch"]
        found.local[row] = 10 ** (-entry["local_sqnr_db"] / 10) * batches
        for name in ("nonfinite", "steps", "batches"):
            getattr(found, name)[row] = entry[name]
        found.ran[row] = int(entry["method"] == METHODS[1])
        found.estimated[row] = batches * int(entry["method"] == SCALED)
    return found


def record_of(frame: pl.DataFrame) -> RoundingRecord:
    """What `ranges.rounding` was made from. How many batches were shown is not in it."""
    rows = frame.select(ROUNDING_KEY).rows()[:: len(LOW_TYPE_NAMES)]
    edges = tuple(Edge(node, name, output) for node, name, output, _ in rows)
    apart = bool(frame["noise_by_output"].is_not_null().any() or not frame["batches"].sum())
    return RoundingRecord(edges, apart, _statistics_of(frame))
