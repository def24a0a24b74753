"""What was measured on some batches, and how such parts are merged: shards, ranks, tables of other days."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from calibcast.calib.errors import MismatchError
from calibcast.calib.graph import TensorSpec
from calibcast.calib.graph_digests import first_difference
from calibcast.calib.input_sizes import merge_sizes
from calibcast.calib.range_schema import MAX_HASHES, Calibration, RangeData
from calibcast.calib.range_statistics import frames_of, specs_of, statistics_of
from calibcast.calib.rounding_statistics import RoundingRecord, record_of
from calibcast.calib.statistics import Statistics

# Measured on every batch. All other kinds are weights: measured once, and equal in every part.
_MOVING = frozenset({"input", "activation"})


@dataclass(frozen=True)
class Measured:
    """Statistics of some batches, before they become a table.

    specs: one per row. statistics: on the host. calibration: as in a `RangeTable`. rounding: the evidence so far.
    """

    specs: tuple[TensorSpec, ...]
    statistics: Statistics
    calibration: Calibration
    rounding: RoundingRecord

    @classmethod
    def of(cls, table: RangeData) -> Measured:
        """What a table was made from; sums are restored from means in float64."""
        return cls(tuple(specs_of(table.frame)), statistics_of(table), table.calibration, record_of(table.rounding))

    def data(self) -> RangeData:
        """The parts of a table."""
        frame, hidden = frames_of(self.specs, self.statistics)
        return RangeData(frame, self.calibration, hidden, self.rounding.frame())

    def numbered_from(self, first: int) -> Measured:
        """The same, with the batches numbered from `first` on instead of from 0."""
        skipped = tuple(index + first for index in self.calibration.skipped)
        return replace(
            self,
            statistics=self.statistics.numbered_from(first),
            calibration=replace(self.calibration, skipped=skipped),
            rounding=self.rounding.numbered_from(first),
        )


def merge_measured(parts: Sequence[Measured], noun: str) -> Measured:
    """Merge several parts. No two parts have a batch of the same number. noun: what a message calls a part.

    Counts, min, max and histograms are exact in any order of the parts; sums are within 1e-12 relative. Weights count
    once. Raises MismatchError for parts of different programs or weights.
    """
    first = parts[0]
    statistics, calibration, rounding = first.statistics.to("cpu", copy=True), first.calibration, first.rounding
    moving = torch.tensor([spec.kind in _MOVING for spec in first.specs], dtype=torch.bool)
    for number, part in enumerate(parts[1:], 1):
        _refuse_other(first, part, noun, number)
        if (statistics.histograms is None) != (part.statistics.histograms is None):
            statistics = replace(statistics, histograms=None)
            warnings.warn(f"one {noun} has no histograms, so what is merged has none", stacklevel=4)
        statistics.merge_rows(part.statistics, moving)
        calibration, rounding = _joined(calibration, part.calibration), rounding.merged(part.rounding)
    return Measured(first.specs, statistics, calibration, rounding)


def merge_tables(tables: Sequence[RangeData]) -> RangeData:
    """See `RangeTable.merge`."""
    first, parts = 0, []
    for table in tables:
        parts.append(Measured.of(table).numbered_from(first))
        first += table.calibration.batches + len(table.calibration.skipped)
    return merge_measured(parts, "table").data()


def _refuse_other(first: Measured, part: Measured, noun: str, number: int) -> None:
    difference = first_difference(first.calibration.digests, part.calibration.digests)
    if difference is not None:
        raise MismatchError(f"{noun} {number} is of another program than {noun} 0: {difference}")
    if part.calibration.weights != first.calibration.weights:
        raise MismatchError(f"{noun} {number} was measured with other weights than {noun} 0")
    rows, others = ([(spec.node, spec.output) for spec in one.specs] for one in (first, part))
    if rows != others:
        raise MismatchError(f"{noun} {number} has other rows than {noun} 0: one was filtered or changed by hand")


def _joined(mine: Calibration, theirs: Calibration) -> Calibration:
    return replace(
        mine,
        batches=mine.batches + theirs.batches,
        skipped=tuple(sorted(mine.skipped + theirs.skipped)),
        input_sizes=merge_sizes(mine.input_sizes, theirs.input_sizes),
        input_hashes=tuple(dict.fromkeys(mine.input_hashes + theirs.input_hashes))[:MAX_HASHES],
    )
