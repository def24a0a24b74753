"""Small host tensors, measured many at a time.

A call into torch costs a microsecond or more, however few elements it reads, and `HostKernel` needs about fifty calls.
On a network of thousands of small tensors, measuring took fifteen times as long as running. So small tensors are copied
into one buffer once their node has run, where a later in-place write cannot change them, and measured together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from calibcast.calib.statistic_names import BINS, COUNTS, VALUES

# Above about this many elements, `HostKernel` is faster: it makes fewer passes over them.
MOST = 1 << 14
# How many elements the buffer has: few enough that it and its temporaries stay in the caches. How many rows: few enough
# that their histograms do.
_ELEMENTS, _ROWS = 1 << 16, 1 << 9
_TYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_MAGNITUDE, _INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)


class SmallStatistics(NamedTuple):
    """Statistics of R tensors: their rows, `VALUES` as float64 [R, 5], `COUNTS` as int64 [R, 6], int64 [R, 256]."""

    rows: list[int]
    values: torch.Tensor
    counts: torch.Tensor
    histograms: torch.Tensor | None


class SmallTensors:
    """A buffer of small tensors. Put them in, one row each, and take the statistics of all when it is full."""

    def __init__(self, histogram: bool) -> None:
        self._histogram = histogram
        self._buffer = torch.empty(_ELEMENTS, dtype=torch.float32)
        self._rows: list[int] = []
        self._starts: list[int] = []
        self._filled = 0

    def clear(self) -> None:
        """Forget what was put in."""
        self._rows, self._starts, self._filled = [], [], 0

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is of the kind that is measured here."""
        return 0 < tensor.numel() <= MOST and tensor.dtype in _TYPES and tensor.device.type == "cpu"

    def has_room(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor still fits in before the next `take`."""
        return self._filled + tensor.numel() <= _ELEMENTS and len(self._rows) < _ROWS

    def put(self, row: int, tensor: torch.Tensor) -> None:
        """Copy the elements of a tensor with any strides; an expanded element is copied every time it appears."""
        size = tensor.numel()
        self._buffer[self._filled : self._filled + size].view(tensor.shape).copy_(tensor)
        self._rows.append(row)
        self._starts.append(self._filled)
        self._filled += size

    def take(self) -> SmallStatistics | None:
        """Statistics of what was put in since the last call; None if that was nothing."""
        if not self._rows:
            return None
        x, starts = self._buffer[: self._filled].numpy(), np.array(self._starts)
        sizes = np.diff(starts, append=self._filled)
        magnitude = x.view(np.int32) & _MAGNITUDE
        found = SmallStatistics(
            self._rows,
            torch.from_numpy(_values(x, magnitude, starts)),
            torch.from_numpy(_counts(x, magnitude, starts, sizes)),
            torch.from_numpy(_histograms(magnitude, sizes)) if self._histogram else None,
        )
        self.clear()
        return found


def _values(x: np.ndarray, magnitude: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """float64 [R, 5]: least, largest, smallest nonzero magnitude, sum and sum of squares of the finite elements."""
    finite = magnitude < _INFINITY
    # Subtracting one and clearing the sign bit makes a zero the largest integer; the rest keep their order.
    order = (magnitude - np.int32(1)) & _MAGNITUDE
    if finite.all():
        low = high = x
        wide = x.astype(np.float64)
    else:
        low, high = np.where(finite, x, np.float32(np.inf)), np.where(finite, x, np.float32(-np.inf))
        wide = np.where(finite, x, np.float32(0)).astype(np.float64)
        order = np.where(finite, order, _MAGNITUDE)
    least = np.minimum.reduceat(order, starts)
    smallest = np.where(least == _MAGNITUDE, _INFINITY, least + (least != _MAGNITUDE)).astype(np.int32)
    found = np.empty((len(starts), len(VALUES)))
    found[:, 0] = np.minimum.reduceat(low, starts)
    found[:, 1] = np.maximum.reduceat(high, starts)
    found[:, 2] = smallest.view(np.float32)
    found[:, 3] = np.add.reduceat(wide, starts)
    found[:, 4] = np.add.reduceat(np.square(wide, out=wide), starts)
    return found


def _counts(x: np.ndarray, magnitude: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64 [R, 6], as in `COUNTS`; nothing is masked."""
    found = np.zeros((len(starts), len(COUNTS)), dtype=np.int64)
    found[:, 0] = sizes
    special = {1: magnitude > _INFINITY, 2: x == np.inf, 3: x == -np.inf, 4: magnitude == 0}
    for column, is_so in special.items():
        if is_so.any():
            found[:, column] = np.add.reduceat(is_so, starts, dtype=np.int64)
    return found


def _histograms(magnitude: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64 [R, 256]: how often each biased exponent occurs."""
    keys = (magnitude >> np.int32(23)) + np.repeat(np.arange(len(sizes), dtype=np.int32) * BINS, sizes)
    return np.bincount(keys, minlength=len(sizes) * BINS).astype(np.int64, copy=False).reshape(-1, BINS)
