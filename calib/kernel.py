"""Range statistics of one tensor: two ways of computing the same numbers.

On the host, reading a result costs nothing, so the kernel branches: it does not search for what finite, nonzero,
well-scaled data cannot have. On a device, each reading would wait for the device, so the kernel has no branches and
leaves its results there. A test checks that both give the same.

The statistics of a tensor are `VALUES` (float64) and `COUNTS` (int64), and a histogram of the 256 biased exponents
of fp32 (IEEE 754: bin 0 zeros and subnormals, bin 255 Inf and NaN, bin e the magnitudes [2^(e-127), 2^(e-126))).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from calibcast.calib.memory_layout import pieces, without_repeats
from calibcast.calib.statistic_names import BINS, COUNTS, NOTHING

# Elements per step. On the host, 2 MB of input and as much of scratch stay in the caches between the passes; on a
# device it bounds the temporaries to some hundred MB, and keeps counts in fp32 exact below 2^24.
_HOST_STEP = 1 << 19
_DEVICE_STEP = 1 << 23

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
# Squares of fp32 values between these neither overflow nor vanish when summed in fp32 over one step.
_SQUARES_SAFE = (1e-15, 1e15)


@dataclass(slots=True)
class Tally:
    """Statistics of one tensor in one batch, on the host."""

    values: list[float] = field(default_factory=lambda: list(NOTHING))
    counts: list[int] = field(default_factory=lambda: [0] * len(COUNTS))
    histogram: torch.Tensor | None = None  # int64 [256]
    mask_min: float = math.inf  # lowest finite mask value

    def _add(self, values: tuple[float, float, float, float, float], times: int) -> None:
        mine = self.values
        mine[0] = min(mine[0], values[0])
        mine[1] = max(mine[1], values[1])
        mine[2] = min(mine[2], values[2])
        mine[3] += values[3] * times
        mine[4] += values[4] * times


class HostKernel:
    """Measures host tensors. Owns the scratch memory, so use one per thread."""

    def __init__(self, histogram: bool) -> None:
        self._histogram = histogram
        self._scratch = torch.empty(_HOST_STEP, dtype=torch.int32)
        self._counter = ExponentCounter() if histogram else None

    def measure(self, tensor: torch.Tensor, mask_at_most: float | None = None) -> Tally:
        """Statistics of a floating-point host tensor of any shape, strides and width.

        Values at or below `mask_at_most` are mask values: counted in `masked`, and left out of everything else.
        """
        tally = Tally(histogram=torch.zeros(BINS, dtype=torch.int64) if self._histogram else None)
        dense, times = without_repeats(tensor)
        tally.counts[0] = dense.numel() * times
        for piece in pieces(dense, _HOST_STEP):
            if mask_at_most is not None:
                piece = _without_mask(piece, mask_at_most, tally, times)
                if not piece.numel():
                    continue
            if piece.dtype == torch.float64:
                self._double(piece, tally, times)
            else:
                self._step(piece if piece.dtype == torch.float32 else piece.float(), tally, times)
        if self._counter is not None and tally.histogram is not None:
            tally.histogram.add_(self._counter.take(), alpha=times)
        return tally

    def _step(self, x: torch.Tensor, tally: Tally, times: int) -> None:
        low, high = (float(bound) for bound in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = _count_nonfinite(x, tally, times)
            if tally.histogram is not None:
                tally.histogram[BINS - 1] += (x.numel() - finite.numel()) * times
            if finite.numel():
                self._step(finite, tally, times)
            return
        smallest = self._smallest(x, low, high, tally, times)
        total, squares = _moments(x, low, high)
        tally._add((low, high, smallest, total, squares), times)

    def _smallest(self, x: torch.Tensor, low: float, high: float, tally: Tally, times: int) -> float:
        """Smallest nonzero magnitude of `x`, which is finite. It also counts zeros and collects exponents."""
        scratch = self._scratch[: x.numel()]
        if self._counter is not None:
            torch.bitwise_and(x.view(torch.int32), _MAGNITUDE, out=scratch)
            self._counter.add(scratch.bitwise_right_shift_(23))
        if low > 0 or high < 0:
            return min(abs(low), abs(high))
        smallest, has_zero = _smallest_nonzero(x.view(torch.int32), scratch)
        if has_zero:
            tally.counts[4] += _count_zeros(x, scratch) * times
        return smallest

    def _double(self, x: torch.Tensor, tally: Tally, times: int) -> None:
        """Measure float64, exactly but slowly. Magnitudes beyond fp32's range count in its last finite or first bin."""
        finite = _count_nonfinite(x, tally, times)
        magnitude = finite.abs()
        nonzero = magnitude[magnitude > 0]
        tally.counts[4] += (finite.numel() - nonzero.numel()) * times
        if tally.histogram is not None:
            tally.histogram[BINS - 1] += (x.numel() - finite.numel()) * times
            tally.histogram[0] += (finite.numel() - nonzero.numel()) * times
            exponents = (torch.frexp(nonzero).exponent + 126).clamp(0, BINS - 2)
            tally.histogram.add_(torch.bincount(exponents, minlength=BINS), alpha=times)
        if finite.numel():
            low, high = (float(bound) for bound in torch.aminmax(finite))
            smallest = float(nonzero.min()) if nonzero.numel() else math.inf
            tally._add((low, high, smallest, float(finite.sum()), float(torch.dot(finite, finite))), times)


class ExponentCounter:
    """A histogram of exponents, which are collected as bytes and counted in pairs.

    `torch.bincount` is slow where neighbours are equal (0.95 ns per element on the output of a ReLU), since its steps
    then wait for each other. Counting pairs in 65536 bins halves the steps and takes 0.45 ns; the two marginals add up
    to the histogram. This is faster from a quarter of a million elements on.
    """

    _CAPACITY = 1 << 21
    _PAIRS_FROM = 1 << 18

    def __init__(self) -> None:
        self._bytes = torch.empty(self._CAPACITY, dtype=torch.uint8)
        self._keys = torch.empty(self._CAPACITY // 2, dtype=torch.int32)
        self._filled = 0
        self._total = torch.zeros(BINS, dtype=torch.int64)

    def add(self, exponents: torch.Tensor) -> None:
        """Take int32 exponents in 0..255, at most as many as one step has."""
        if self._filled + exponents.numel() > self._CAPACITY:
            self._count()
        self._bytes[self._filled : self._filled + exponents.numel()].copy_(exponents)
        self._filled += exponents.numel()

    def take(self) -> torch.Tensor:
        """The counts since the last call, int64 [256]."""
        self._count()
        total, self._total = self._total, torch.zeros(BINS, dtype=torch.int64)
        return total

    def _count(self) -> None:
        filled, self._filled = self._bytes[: self._filled], 0
        paired = filled.numel() & ~1 if filled.numel() >= self._PAIRS_FROM else 0
        if paired:
            keys = self._keys[: paired // 2].copy_(filled[:paired].view(torch.int16)).bitwise_and_(0xFFFF)
            pairs = torch.bincount(keys, minlength=BINS * BINS).view(BINS, BINS)
            self._total += pairs.sum(0) + pairs.sum(1)
        self._total += torch.bincount(filled[paired:], minlength=BINS)


DeviceTally = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]


def measure_on_device(tensor: torch.Tensor, histogram: bool, mask_at_most: float | None = None) -> DeviceTally:
    """Statistics of a floating-point tensor, without waiting for the device.

    Returns `VALUES` as float64 [5], `COUNTS` as int64 [6], the histogram as int64 [256] or None, and the lowest finite
    mask value as float64 [], on the tensor's device.
    """
    dense, times = without_repeats(tensor)
    device = tensor.device
    low = torch.full((), math.inf, dtype=torch.float64, device=device)
    values = [low, -low, low.clone(), torch.zeros_like(low), torch.zeros_like(low)]
    counts = torch.zeros(len(COUNTS), dtype=torch.int64, device=device)
    bins = torch.zeros(BINS, dtype=torch.int64, device=device) if histogram else None
    mask_min = low.clone()
    for piece in pieces(dense, _DEVICE_STEP):
        masked = None if mask_at_most is None else piece <= mask_at_most
        if masked is not None:
            lowest = torch.where(masked & torch.isfinite(piece), piece, math.inf).amin()
            mask_min = torch.minimum(mask_min, lowest.double())
        found, counted = _device_step(piece, masked)
        values[0] = torch.minimum(values[0], found[0])
        values[1] = torch.maximum(values[1], found[1])
        values[2] = torch.minimum(values[2], found[2])
        values[3] = values[3] + found[3] * times
        values[4] = values[4] + found[4] * times
        counts += counted * times
        if bins is not None:
            bins.add_(_device_histogram(piece, masked), alpha=times)
    counts[0].fill_(dense.numel() * times)  # `counts[0] = number` would wait for the device
    return torch.stack(values), counts, bins, mask_min


def _device_step(x: torch.Tensor, masked: torch.Tensor | None) -> tuple[list[torch.Tensor], torch.Tensor]:
    if x.element_size() == 1:  # torch has few operators for float8
        x = x.float()
    none = torch.zeros((), dtype=torch.int64, device=x.device)
    hidden = none if masked is None else masked.sum()
    finite = torch.isfinite(x)
    neginf = x == -math.inf
    if masked is not None:
        finite, neginf = finite & ~masked, neginf & ~masked
    magnitude = x.abs()
    kept = torch.where(finite, x, 0)
    nonzero = finite & (magnitude > 0)
    found = [
        torch.where(finite, x, math.inf).amin(),
        torch.where(finite, x, -math.inf).amax(),
        torch.where(nonzero, magnitude, math.inf).amin(),
        kept.sum(dtype=torch.float64),
        kept.double().square_().sum(),
    ]
    counted = [none, torch.isnan(x).sum(), (x == math.inf).sum(), neginf.sum(), (magnitude == 0).sum(), hidden]
    return [value.double() for value in found], torch.stack(counted)


def _device_histogram(x: torch.Tensor, masked: torch.Tensor | None) -> torch.Tensor:
    if x.dtype == torch.float64:
        exponents = (torch.frexp(x).exponent + 126).clamp(0, BINS - 2)
        exponents = torch.where(x == 0, 0, torch.where(torch.isfinite(x), exponents, BINS - 1))
    else:
        exponents = (x.float().view(torch.int32) & _MAGNITUDE) >> 23
    # bincount would wait for the device to learn its size; histc with given bounds does not.
    places = exponents.float() + 0.5
    if masked is not None:
        places = torch.where(masked, -1.0, places)  # outside the bounds, so not counted
    return torch.histc(places, bins=BINS, min=0, max=BINS).long()


def _without_mask(x: torch.Tensor, at_most: float, tally: Tally, times: int) -> torch.Tensor:
    """Count mask values, note the lowest finite one, and give the rest."""
    masked = x <= at_most
    hidden = x[masked]
    if not hidden.numel():
        return x
    tally.counts[5] += hidden.numel() * times
    finite = hidden[torch.isfinite(hidden)]
    if finite.numel():
        tally.mask_min = min(tally.mask_min, float(finite.min()))
    return x[~masked]


def _count_nonfinite(x: torch.Tensor, tally: Tally, times: int) -> torch.Tensor:
    """Count NaN, +Inf and -Inf, and give the finite rest."""
    finite = torch.isfinite(x)
    rest = x[~finite]
    nan, posinf = int(torch.isnan(rest).sum()), int((rest == math.inf).sum())
    tally.counts[1] += nan * times
    tally.counts[2] += posinf * times
    tally.counts[3] += (rest.numel() - nan - posinf) * times
    return x[finite]


def _moments(x: torch.Tensor, low: float, high: float) -> tuple[float, float]:
    """Sum and sum of squares of finite fp32 values.

    fp32 accumulation is enough for well-scaled data. Far from zero (values like 400.05 and 400.10) it would lose the
    variance. So values are taken relative to the middle of their range, and the shift is undone in float64.
    """
    peak, spread = max(abs(low), abs(high)), high - low
    if peak == 0.0:
        return 0.0, 0.0
    if not _SQUARES_SAFE[0] < peak < _SQUARES_SAFE[1]:
        wide = x.double()
        return float(wide.sum()), float(torch.dot(wide, wide))
    if spread > 0.25 * peak:
        return float(x.sum()), float(torch.dot(x, x))
    middle = float(torch.tensor((low + high) / 2, dtype=torch.float32))
    offset = x - middle  # exact: within a factor of two of each other (Sterbenz)
    count, shifted, squares = x.numel(), float(offset.sum()), float(torch.dot(offset, offset))
    return shifted + count * middle, squares + 2 * middle * shifted + count * middle * middle


def _smallest_nonzero(bits: torch.Tensor, scratch: torch.Tensor) -> tuple[float, bool]:
    """Smallest nonzero magnitude of fp32 bit patterns, and whether there is a zero.

    After subtracting one and clearing the sign, both zeros become the largest integer, and the rest keep their order.
    """
    torch.sub(bits, 1, out=scratch)
    least, most = torch.aminmax(scratch.bitwise_and_(_MAGNITUDE))
    return _as_float(int(least) + 1), int(most) == _MAGNITUDE


def _count_zeros(x: torch.Tensor, scratch: torch.Tensor) -> int:
    # torch.count_nonzero takes 4.6 ns an element on mixed data, this 0.26; the sum is exact below 2^24 elements.
    return int(torch.eq(x, 0, out=scratch.view(torch.float32)).sum())


def _as_float(pattern: int) -> float:
    """The magnitude with this fp32 bit pattern; inf for a larger pattern, which stands for "none"."""
    if pattern >= _INFINITY:
        return math.inf
    return float(torch.tensor(pattern, dtype=torch.int32).view(torch.float32))
