"""The running statistics of many tensors, and the one way in which two sets of them merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from calibcast.calib.statistic_names import (
    BINS,
    COUNTS,
    HIDDEN,
    HIDDEN_MERGES,
    NO_BATCH,
    NO_HIDDEN,
    NOTHING,
    VALUE_MERGES,
    VALUES,
)

_MERGES: Mapping[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "least": torch.minimum,
    "largest": torch.maximum,
}
# How the array of a field merges: all of it by one name, or column by column.
_SUM, _EARLIEST = {"merge": "sum", "nothing": 0}, {"merge": "least", "nothing": NO_BATCH}
_OF_PEAK = {"merge": "of the larger peak", "nothing": NO_BATCH}


@dataclass(frozen=True)
class Statistics:
    """Statistics of R tensors, one row each. The arrays are updated in place; a merge needs nothing else.

    values: float64 [R, 5] as in `VALUES`; counts: int64 [R, 6] as in `COUNTS`; histograms: int64 [R, 256] or None;
    batches, absmax_batch, nonfinite_batch: int64 [R]; hidden: float64 [R, 3] as in `HIDDEN`.
    """

    values: torch.Tensor = field(metadata={"columns": VALUE_MERGES})
    counts: torch.Tensor = field(metadata=_SUM)
    histograms: torch.Tensor | None = field(metadata=_SUM)
    batches: torch.Tensor = field(metadata=_SUM)
    absmax_batch: torch.Tensor = field(metadata=_OF_PEAK)
    nonfinite_batch: torch.Tensor = field(metadata=_EARLIEST)
    hidden: torch.Tensor = field(metadata={"columns": HIDDEN_MERGES})

    @classmethod
    def empty(cls, rows: int, histogram: bool, device: torch.device | str = "cpu") -> Statistics:
        """Statistics of nothing yet: the neutral element of `merge`."""

        def integers(*shape: int, fill: int = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=torch.int64, device=device)

        return cls(
            values=torch.tensor(NOTHING, dtype=torch.float64, device=device).repeat(rows, 1),
            counts=integers(rows, len(COUNTS)),
            histograms=integers(rows, BINS) if histogram else None,
            batches=integers(rows),
            absmax_batch=integers(rows, fill=NO_BATCH),
            nonfinite_batch=integers(rows, fill=NO_BATCH),
            hidden=torch.tensor(NO_HIDDEN, dtype=torch.float64, device=device).repeat(rows, 1),
        )

    def column(self, name: str) -> torch.Tensor:
        """The column of `values`, `counts` or `hidden` that has this name: a view, [R]."""
        for array, names in ((self.values, VALUES), (self.counts, COUNTS), (self.hidden, HIDDEN)):
            if name in names:
                return array[:, names.index(name)]
        raise KeyError(name)

    def clear(self) -> None:
        """Back to `empty`, without a new allocation."""
        for array, nothing in ((self.values, NOTHING), (self.hidden, NO_HIDDEN)):
            for column, number in enumerate(nothing):
                array[:, column].fill_(number)  # a copy from the host would wait for the device
        for item in fields(self):
            array = getattr(self, item.name)
            if array is not None and "merge" in item.metadata:
                array.fill_(item.metadata["nothing"])

    def merge(self, other: Statistics) -> None:
        """Merge `other` into this, each statistic by the merge that it names.

        Of two batches with the same peak, or two that are not finite, the earlier is kept, in any order of merging.
        """
        self._merge_peak_batches(other)
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if mine is None or theirs is None:
                continue
            for column, merge in enumerate(item.metadata.get("columns", {}).values()):
                _MERGES[merge](mine[:, column], theirs[:, column], out=mine[:, column])
            if item.metadata.get("merge") in _MERGES:
                _MERGES[item.metadata["merge"]](mine, theirs, out=mine)

    def _merge_peak_batches(self, other: Statistics) -> None:
        """Keep the batch of the larger peak. This must be done before the peaks themselves are merged."""
        peak, new = self.absmax(), other.absmax()
        taken = torch.where(new == peak, other.absmax_batch < self.absmax_batch, new > peak)
        self.absmax_batch.copy_(torch.where(taken, other.absmax_batch, self.absmax_batch))

    def merge_rows(self, other: Statistics, rows: torch.Tensor) -> None:
        """Merge only these rows (bool [R]) of `other`; all others stay as they are."""
        part = self.at(rows)
        part.merge(other.at(rows))
        for name, array in self.arrays():
            array[rows] = getattr(part, name)

    def numbered_from(self, first: int) -> Statistics:
        """A copy whose batch numbers start at `first` instead of 0."""

        def moved(batches: torch.Tensor) -> torch.Tensor:
            return torch.where(batches < NO_BATCH, batches + first, batches)

        return replace(self, absmax_batch=moved(self.absmax_batch), nonfinite_batch=moved(self.nonfinite_batch))

    def arrays(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The arrays by field name, without `histograms` where that is None."""
        for item in fields(self):
            array = getattr(self, item.name)
            if array is not None:
                yield item.name, array

    def at(self, rows: slice | torch.Tensor) -> Statistics:
        """The chosen rows, as a copy or a view."""
        return replace(self, **{name: array[rows] for name, array in self.arrays()})

    def to(self, device: torch.device | str, copy: bool = False) -> Statistics:
        """The same statistics on another device. copy: copy them even if they are there already."""
        return replace(self, **{name: array.to(device, copy=copy) for name, array in self.arrays()})

    def absmax(self) -> torch.Tensor:
        """Largest finite magnitude of each row, float64 [R]; -inf where nothing was finite."""
        return torch.maximum(self.column("max"), -self.column("min"))

    def nonfinite(self) -> torch.Tensor:
        """How many NaN and Inf each row has seen, int64 [R]."""
        return self.column("nan") + self.column("posinf") + self.column("neginf")

    def finite(self) -> torch.Tensor:
        """How many finite, unmasked elements each row has seen, int64 [R]."""
        return self.column("elements") - self.nonfinite() - self.column("masked")
