"""How far the tensors of two runs are apart: a few float64 sums per tensor, for any number of batches."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import polars as pl
import torch

COLUMNS: dict[str, Any] = {
    "sqnr_db": pl.Float64,
    "rel_l2": pl.Float64,
    "changed": pl.Float64,
    "max_abs": pl.Float64,
    "absmax": pl.Float64,
    "absmax_reference": pl.Float64,
    "elements": pl.Int64,
    "nonfinite": pl.Int64,
    "nonfinite_reference": pl.Int64,
    "nonfinite_alone": pl.Int64,
    "first_nonfinite_batch": pl.Int64,
    "unlike": pl.Int64,
}
# Elements compared at a time, which bounds the float64 temporaries to some 50 MB.
_STEP = 1 << 20


class TensorErrors:
    """Running comparison of many tensors, a row each, kept on the device until `columns` is asked for.

    Differences are over elements that are finite in both. exact: rows of integers and booleans. These have the share of
    elements that differ, and no SQNR, as two indices have no distance.
    """

    def __init__(self, rows: int, device: torch.device, exact: Collection[int] = ()) -> None:
        def zeros(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((rows, width), dtype=dtype, device=device)

        self._sums = zeros(2, torch.float64)  # squares: of the difference, of the reference
        self._peaks = zeros(3, torch.float64)  # of the difference, of ours, of the reference
        self._counts = zeros(5, torch.int64)  # compared, nonfinite: ours, of the reference, ours alone; elements
        self._first = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self._changed = torch.zeros(rows, dtype=torch.int64, device=device)
        self._unlike, self._exact = [0] * rows, frozenset(exact)

    def update(
        self, row: int, ours: torch.Tensor, theirs: torch.Tensor, batch: int, masked_at_most: float | None = None
    ) -> None:
        """Add one tensor of one batch, without waiting for the device.

        masked_at_most: for a mask. Elements at or below it in both mean the same, so they count as equal.
        """
        if ours.shape != theirs.shape:
            self._unlike[row] += 1
            return
        if ours.is_complex() and theirs.is_complex():
            ours, theirs = torch.view_as_real(ours.resolve_conj()), torch.view_as_real(theirs.resolve_conj())
        for mine, other in _pieces(ours.detach(), theirs.detach()):
            if row in self._exact:
                self._changed[row] += (mine != other).sum()
            mine, other = mine.to(torch.float64), other.to(torch.float64)
            if masked_at_most is not None:
                meant = (mine > masked_at_most) | (other > masked_at_most) | mine.isnan() | other.isnan()
                mine, other = torch.where(meant, mine, 0), torch.where(meant, other, 0)
            sums, peaks, counts = _compared(mine, other)
            self._sums[row] += sums
            self._peaks[row] = torch.maximum(self._peaks[row], peaks)
            self._counts[row] += counts
        unseen = (self._first[row] < 0) & (self._counts[row, 3] > 0)
        self._first[row] = torch.where(unseen, batch, self._first[row])

    def compared(self, row: int) -> int:
        """How many elements were finite in both."""
        return int(self._counts[row, 0])

    def powers(self, row: int) -> tuple[float, float]:
        """Sums of squares over the elements that are finite in both: of the difference, and of the reference."""
        noise, signal = self._sums[row].tolist()
        return noise, signal

    def relative(self, row: int) -> float:
        """The relative L2 error of a row: 0 when equal, inf when only the reference is zero, NaN for no elements."""
        return _relative(*self.powers(row), self.compared(row))

    def columns(self) -> dict[str, list[Any]]:
        """`COLUMNS`, a list of one value per row each."""
        noise, signal = (self._sums[:, i].tolist() for i in range(2))
        compared, nonfinite, theirs, alone, elements = (self._counts[:, i].tolist() for i in range(5))
        max_abs, absmax, absmax_reference = (self._peaks[:, i].tolist() for i in range(3))
        rows = enumerate(zip(noise, signal, compared, strict=True))
        ratios = [None if row in self._exact else _relative(*sums) for row, sums in rows]
        changed = zip(self._changed.tolist(), elements, strict=True)
        return {
            "sqnr_db": [None if ratio is None else decibels(ratio) for ratio in ratios],
            "rel_l2": ratios,
            "changed": [
                n / (total or math.nan) if row in self._exact else None for row, (n, total) in enumerate(changed)
            ],
            "max_abs": max_abs,
            "absmax": absmax,
            "absmax_reference": absmax_reference,
            "elements": elements,
            "nonfinite": nonfinite,
            "nonfinite_reference": theirs,
            "nonfinite_alone": alone,
            "first_nonfinite_batch": [None if batch < 0 else batch for batch in self._first.tolist()],
            "unlike": list(self._unlike),
        }


def decibels(rel_l2: float) -> float:
    """SQNR of a relative L2 error: inf for 0, -inf for inf, NaN for NaN."""
    if rel_l2 == 0.0 or math.isinf(rel_l2):
        return math.inf if rel_l2 == 0.0 else -math.inf
    return -20 * math.log10(rel_l2)


def decibels_of_changed(share: float) -> float:
    """The SQNR that a share of changed integers counts as: the budget that just allows it, see `most_changed`.

    inf where none has changed, or there are none; 0.5% counts as 40 dB.
    """
    return -20 * math.log10(2 * share) if share > 0 else math.inf


def most_changed(min_sqnr_db: float) -> float:
    """The share of integer results that may differ: half the error amplitude that the budget allows in others.

    Rounding decides a comparison of nearly equal values, and of thousands of pixels a few always compare such values.
    """
    return float(0.5 * 10 ** (-min_sqnr_db / 20))


def rounding_db(dtype: torch.dtype) -> float:
    """The least SQNR that rounding to `dtype` leaves: the errors at 1 are uniform over a step of eps, so their rms is
    eps / sqrt(12).

    71 dB for float16, 53 dB for bfloat16. Subnormals, which lose more, are not counted as rounding.
    """
    return decibels(torch.finfo(dtype).eps / math.sqrt(12))


def _relative(noise: float, signal: float, compared: int) -> float:
    if not compared:
        return math.nan
    if noise == 0.0:
        return 0.0
    return math.sqrt(noise / signal) if signal else math.inf


def _compared(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums, peaks and counts of one pair of flat float64 pieces."""
    finite, finite_theirs = torch.isfinite(ours), torch.isfinite(theirs)
    both = finite & finite_theirs
    difference = torch.where(both, ours - theirs, 0).abs_()
    reference = torch.where(both, theirs, 0)
    sums = torch.stack([torch.dot(difference, difference), torch.dot(reference, reference)])
    peaks = torch.stack(
        [
            difference.max(),
            torch.where(finite, ours, 0).abs_().max(),
            torch.where(finite_theirs, theirs, 0).abs_().max(),
        ]
    )
    alone = (~finite & finite_theirs).sum()
    size = torch.full_like(alone, ours.numel())
    return sums, peaks, torch.stack([both.sum(), (~finite).sum(), (~finite_theirs).sum(), alone, size])


def _pieces(ours: torch.Tensor, theirs: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Flat pieces of both, with the same elements in each pair, copied only where memory has gaps."""
    size = ours.numel()
    if size == 0:
        return
    if size <= _STEP:
        yield ours.reshape(-1), theirs.reshape(-1)
        return
    widest = max(range(ours.dim()), key=ours.size)
    rows = max(1, ours.size(widest) * _STEP // size)
    for mine, other in zip(torch.split(ours, rows, widest), torch.split(theirs, rows, widest), strict=True):
        yield from _pieces(mine, other)
