"""The rules that look at tensors alone: `passes.rules` has the others.

They need no graph and no torch, so that two range tables are compared without waiting for torch to be imported.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from calibcast.calib.operators import COMPARES, READS_MASKS, SELECTS
from calibcast.passes.facts import NodeFacts, TensorFacts
from calibcast.passes.number_formats import NumberFormat
from calibcast.passes.verdict import Verdict

LEAST_SQNR_DB = 20.0  # of a tensor over its rounding: the noise is a tenth of it
DEFAULT_DATA_MAX = 512.0  # from the proposal that calibcast began with
HEADROOM = 4.0  # how much larger than measured a magnitude may get


@dataclass(frozen=True)
class Nonfinite:
    """NaN or Inf was measured in fp32 itself."""

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        for tensor in facts.tensors:
            if tensor.measured and tensor.nonfinite:
                where = "" if tensor.nonfinite_batch is None else f", first in batch {tensor.nonfinite_batch}"
                reason = f"{_role(facts, tensor)} has {tensor.nonfinite} NaN or Inf in fp32{where}"
                return Verdict("nonfinite", reason, float(tensor.nonfinite), 0.0)
        return None


@dataclass(frozen=True)
class DataMax:
    """A magnitude among the node's own inputs and outputs exceeds `limit`. Weights have `InitMax`.

    given: the user has set the limit. The default gives way where rounding was measured, to `Headroom`.
    """

    limit: float
    quantile: float = 1.0
    given: bool = True

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if self.limit == math.inf or (facts.rounding_known and not self.given):
            return None
        return _above("data_max", facts, [t for t in facts.judged if not t.is_weight], self.limit, self.quantile)


@dataclass(frozen=True)
class Headroom:
    """`factor` times the magnitude of an input or activation is more than the low type holds.

    Used where rounding was measured. That measurement finds what overflows on this data, and this rule what may
    overflow on other data. The usual spread of peaks between batches is well below 4.
    """

    factor: float = HEADROOM

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if not facts.rounding_known:
            return None
        limit = facts.low.max / self.factor
        # All inputs and outputs, also of a node that only moves data: if low, it would round what it moves.
        return _above("headroom", facts, [t for t in facts.tensors if not t.is_weight], limit)


@dataclass(frozen=True)
class InitMax:
    """A magnitude among the node's parameters, buffers and constants exceeds `limit`."""

    limit: float

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if self.limit == math.inf:
            return None
        return _above("init_max", facts, [t for t in facts.judged if t.is_weight], self.limit)


@dataclass(frozen=True)
class Storage:
    """Storing a tensor in the low type leaves less than `limit` dB between its variation and the rounding.

    Catches offsets (400.05 and 400.10 become equal) where a reader may remove the offset; a gate of 0.5 that is only
    multiplied is judged by its magnitude instead. A tensor that is faint as a whole (its peak is below four times the
    smallest normal value) must keep `faint` dB, as the rounding of subnormal values is not relative to them. Values
    that a division or a logarithm blows up must be normal, also those of weights, which are exempt otherwise, as
    constant tensors are. Nodes that `passes.needs` finds too noisy, such as a difference of nearly equal tensors, are
    kept high, too.
    """

    limit: float = LEAST_SQNR_DB
    faint: float = 40.0

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if facts.rounding_known:
            return None
        for tensor in facts.judged:
            if tensor.measured and (tensor.magnified or not tensor.is_weight):
                verdict = self._lost(facts, tensor)
                if verdict is not None:
                    return verdict
        return self._needed(facts)

    def _needed(self, facts: NodeFacts) -> Verdict | None:
        lost = facts.lost
        if lost is None or self.limit == -math.inf:
            return None
        whose = "its result" if lost.node == facts.name else f"{lost.node}, which is made of it,"
        reason = (
            f"{whose} would keep {lost.decibels:.3g} dB over the rounding of what it is made of in {facts.low.short}, "
            f"below {lost.least:g} dB"
        )
        return Verdict("storage", reason, lost.decibels, lost.least)

    def _lost(self, facts: NodeFacts, tensor: TensorFacts) -> Verdict | None:
        tiny = facts.low.smallest_normal
        if tensor.magnified and tensor.smallest is not None:
            reason = (
                f"{_role(facts, tensor)} has values down to {_number(tensor, tensor.smallest, 3)}, below {tiny:.3g}, "
                f"the smallest that {facts.low.short} holds in full, and a division or a logarithm blows them up"
            )
            return Verdict("storage", reason, tensor.smallest, tiny)
        if tensor.is_weight:
            return None
        limit = self.faint if tensor.absmax is not None and tensor.absmax < 4 * tiny else self.limit
        if keeps_surely(tensor, facts.low, limit):
            return None
        decibels = storage_sqnr(tensor, facts.low)
        if decibels is None or decibels >= limit:
            return None
        return Verdict("storage", self._reason(facts, tensor, decibels, limit), decibels, limit)

    def _reason(self, facts: NodeFacts, tensor: TensorFacts, decibels: float, limit: float) -> str:
        what, low = _role(facts, tensor), facts.low.short
        most = facts.low.max
        if tensor.absmax is not None and tensor.absmax > most:
            return f"{what} reached {_number(tensor, tensor.absmax)}, which becomes inf in {low} (it holds {most:g})"
        return (
            f"{what} would keep {decibels:.3g} dB of signal over rounding in {low}, below {limit:g} dB "
            f"(mean {tensor.mean:.4g}, rms {tensor.rms:.4g}{' as stored' if tensor.exponent else ''})"
        )


def storage_sqnr(tensor: TensorFacts, low: NumberFormat) -> float | None:
    """Predicted signal to quantisation noise ratio, dB, of storing `tensor` in `low`; None where it is constant.

    -inf where a value would overflow. Signal: the variance, rms^2 - mean^2, or rms^2 where no reader removes the
    mean. Noise of rounding to a grid of step u: u^2 / 12 per element. u is taken from each bin of the histogram;
    without a histogram the noise is bounded from rms.
    """
    if tensor.rms is None or tensor.mean is None or tensor.absmax is None or tensor.min == tensor.max:
        return None
    if tensor.absmax > low.max:
        return -math.inf  # becomes inf
    signal = _signal(tensor.rms, tensor.mean, tensor.offset_counts)
    noise = rounding_noise(tensor, low)
    if noise == 0.0:
        return None
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def keeps_surely(tensor: TensorFacts, low: NumberFormat, limit: float) -> bool:
    """Whether `storage_sqnr` is surely at least `limit`, by an upper bound of the noise that needs no histogram.

    That is enough for most tensors, and takes a tenth of the time. One dB allows for rounding in the sums.
    """
    if tensor.rms is None or tensor.mean is None or tensor.absmax is None or tensor.absmax > low.max:
        return False
    signal = _signal(tensor.rms, tensor.mean, tensor.offset_counts)
    return signal > 0 and 10 * math.log10(signal / most_noise(tensor.rms, low)) >= limit + 1


def _signal(rms: float, mean: float, offset_counts: bool) -> float:
    return rms**2 - (mean**2 if offset_counts else 0.0)


def rounding_noise(tensor: TensorFacts, low: NumberFormat, most: float = math.inf) -> float:
    """Mean squared error of storing a measured tensor: from its histogram, or without one an upper bound.

    most: elements of a larger magnitude are left out.
    """
    if tensor.histogram is None:
        return most_noise(min(tensor.rms or 0.0, most), low)
    if math.isinf(most):
        return _noise(tensor.histogram, low)
    last = min(254, max(1, math.frexp(most)[1] + 126))
    return _noise([*tensor.histogram[: last + 1], *[0] * (255 - last)], low)


def median_noise(tensor: TensorFacts, low: NumberFormat) -> float:
    """Mean squared error of rounding elements of median magnitude, so that a few outliers do not count."""
    if tensor.histogram is None:
        return most_noise(tensor.rms or 0.0, low)
    half, seen = sum(tensor.histogram[1:255]) / 2, 0
    for exponent in range(1, 255):
        seen += tensor.histogram[exponent]
        if seen > half:
            return _noise_by_bin(low)[exponent]
    return 0.0


def most_noise(rms: float, low: NumberFormat) -> float:
    """A bound of the mean squared rounding error: an element is off by at most half its own step, or half a
    subnormal's.
    """
    return (rms * low.eps) ** 2 / 12 + (low.smallest_normal * low.eps) ** 2 / 12


def _noise(histogram: Sequence[int], low: NumberFormat) -> float:
    finite = sum(histogram[:255])
    return float(sum(map(operator.mul, histogram, _noise_by_bin(low)))) / finite if finite else 0.0


@cache
def _noise_by_bin(low: NumberFormat) -> tuple[float, ...]:
    """The squared rounding error of an element of each bin; 0 for zeros and for what is not finite."""
    lows = [2.0 ** (exponent - 127) for exponent in range(1, 255)]
    steps = [max(least, low.smallest_normal) * low.eps for least in lows]
    # A value far below the step is lost entirely: the noise is its own square.
    return (0.0, *(min(step * step / 12, 4 * least * least) for least, step in zip(lows, steps, strict=True)), 0.0)


def _above(
    rule: str, facts: NodeFacts, tensors: list[TensorFacts], limit: float, quantile: float = 1.0
) -> Verdict | None:
    """A verdict on the largest of `tensors` when it exceeds `limit`."""
    worst, worst_seen = None, -math.inf
    for tensor in tensors:
        if not tensor.measured:
            continue
        seen = _seen(facts, tensor, quantile)
        if not seen <= limit and not (worst is not None and seen <= worst_seen):
            worst, worst_seen = tensor, seen
    if worst is None:
        return None
    batch = "" if worst.absmax_batch is None or worst.is_weight else f" in batch {worst.absmax_batch}"
    share = "" if quantile >= 1.0 else f" (quantile {quantile:g})"
    reached = "nothing finite" if math.isnan(worst_seen) else _number(worst, worst_seen)
    if _all_mask(worst) and worst.mask_min is not None:
        reached = f"nothing but mask values, down to {_number(worst, worst.mask_min)}"
    bound = f"above {rule} {limit:g}"
    if rule == "headroom":  # the name before the number would read as the headroom that is left
        bound = f"above {limit:g}, 1/{facts.low.max / limit:g} of what {facts.low.short} holds"
    return Verdict(rule, f"{_role(facts, worst)} reached {reached}{share}{batch}, {bound}", worst_seen, limit)


def _seen(facts: NodeFacts, tensor: TensorFacts, quantile: float) -> float:
    """The magnitude by which a node is judged. In a masked tensor, softmax and attention need only the upper end.

    A tensor of mask values alone counts as 0 where the low type holds them, such as `full(-inf)` of a causal mask. It
    counts as 0 for selections and comparisons, too: in a row with fewer than k valid scores, the k-th largest is a mask
    value.
    """
    if tensor.masked and facts.base in READS_MASKS:
        return max(0.0, tensor.max or 0.0)
    if _all_mask(tensor):
        held = tensor.mask_min is None or tensor.mask_min >= -facts.low.max
        if held or facts.base in SELECTS | COMPARES:
            return 0.0
    return tensor.magnitude(quantile)


def _all_mask(tensor: TensorFacts) -> bool:
    return tensor.masked > 0 and tensor.absmax is None and not tensor.nonfinite


def _role(facts: NodeFacts, tensor: TensorFacts) -> str:
    stored = f", stored as 2^{-tensor.exponent} of itself," if tensor.exponent else ""
    if tensor.is_weight:
        return f"its {tensor.kind} {tensor.name}{stored}"
    return f"its output{stored}" if tensor.name == facts.name else f"its input {tensor.name}{stored}"


def _number(tensor: TensorFacts, value: float, digits: int = 4) -> str:
    """A value of a tensor as it is stored, which is what a rule judges, and its true value where that is another."""
    true = f" as stored (truly {value * 2.0**tensor.exponent:.{digits}g})" if tensor.exponent else ""
    return f"{value:.{digits}g}{true}"
