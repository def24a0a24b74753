"""The running statistics of many tensors, and the one way in which two sets of them merge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from calibcast.calib.statistic_names import BINS, COUNTS, HIDDEN, NO_BATCH, NO_HIDDEN, NOTHING, VALUES


@dataclass(frozen=True)
class Statistics:
    """Statistics of R tensors, one row each. The arrays are updated in place, and are all there is to a merge.

    values: float64 [R, 5] as in `VALUES`; counts: int64 [R, 6] as in `COUNTS`; histograms: int64 [R, 256] or None;
    batches, absmax_batch, nonfinite_batch: int64 [R]; hidden: float64 [R, 3] as in `HIDDEN`.
    """

    values: torch.Tensor
    counts: torch.Tensor
    histograms: torch.Tensor | None
    batches: torch.Tensor
    absmax_batch: torch.Tensor
    nonfinite_batch: torch.Tensor
    hidden: torch.Tensor

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

    def clear(self) -> None:
        """Back to `empty`, without a new allocation."""
        for column, nothing in enumerate(NOTHING):
            self.values[:, column].fill_(nothing)  # a copy from the host would wait for the device
        for column, nothing in enumerate(NO_HIDDEN):
            self.hidden[:, column].fill_(nothing)
        for array in (self.counts, self.histograms, self.batches):
            if array is not None:
                array.zero_()
        self.absmax_batch.fill_(NO_BATCH)
        self.nonfinite_batch.fill_(NO_BATCH)

    def merge(self, other: Statistics, rows: slice | torch.Tensor | None = None) -> None:
        """Take in `other`: counts and histograms add, min and max extend, sums add in float64.

        Of two batches with the same peak, and of two that are not finite, the earlier counts, in any order of merging.
        """
        if rows is not None:
            other = other.at(rows)
        peak, new = self.absmax(), other.absmax()
        taken = torch.where(new == peak, other.absmax_batch < self.absmax_batch, new > peak)
        self.absmax_batch.copy_(torch.where(taken, other.absmax_batch, self.absmax_batch))
        torch.minimum(self.nonfinite_batch, other.nonfinite_batch, out=self.nonfinite_batch)
        mine, theirs = self.values, other.values
        mine[:, 0] = torch.minimum(mine[:, 0], theirs[:, 0])
        mine[:, 1] = torch.maximum(mine[:, 1], theirs[:, 1])
        mine[:, 2] = torch.minimum(mine[:, 2], theirs[:, 2])
        mine[:, 3:] += theirs[:, 3:]
        self.hidden[:, 0] = torch.maximum(self.hidden[:, 0], other.hidden[:, 0])
        self.hidden[:, 1:] = torch.minimum(self.hidden[:, 1:], other.hidden[:, 1:])
        self.counts.add_(other.counts)
        self.batches.add_(other.batches)
        if self.histograms is not None and other.histograms is not None:
            self.histograms.add_(other.histograms)

    def at(self, rows: slice | torch.Tensor) -> Statistics:
        """The chosen rows, as a copy or a view."""
        return Statistics(
            self.values[rows],
            self.counts[rows],
            None if self.histograms is None else self.histograms[rows],
            self.batches[rows],
            self.absmax_batch[rows],
            self.nonfinite_batch[rows],
            self.hidden[rows],
        )

    def absmax(self) -> torch.Tensor:
        """Largest finite magnitude of each row, float64 [R]; -inf where nothing was finite."""
        return torch.maximum(self.values[:, 1], -self.values[:, 0])

    def nonfinite(self) -> torch.Tensor:
        """How many NaN and Inf each row has seen, int64 [R]."""
        first = COUNTS.index("nan")
        return self.counts[:, first : first + 3].sum(1)

    def finite(self) -> torch.Tensor:
        """How many finite, unmasked elements each row has seen, int64 [R]."""
        return self.counts[:, 0] - self.counts[:, 1:4].sum(1) - self.counts[:, COUNTS.index("masked")]

    def to(self, device: torch.device | str) -> Statistics:
        """The same statistics on another device."""
        return Statistics(
            self.values.to(device),
            self.counts.to(device),
            None if self.histograms is None else self.histograms.to(device),
            self.batches.to(device),
            self.absmax_batch.to(device),
            self.nonfinite_batch.to(device),
            self.hidden.to(device),
        )


assert HIDDEN[0] == "hidden_max", "merge takes the largest of column 0, and the least of the others"
assert VALUES[3:] == ("sum", "sum_of_squares"), "merge adds the columns from 3 on"
