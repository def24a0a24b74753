"""The rules. Any rule that is met keeps a node in its exported type; each says which number met which limit.

A rule is a frozen dataclass called with one `NodeFacts`, answering a `Verdict` or None for "no opinion". It counts
because it is in the tuple; its id is its class name in snake case. Comparisons are strict and written so that NaN
keeps the node high; a limit of inf switches a rule off.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from calib.operators import ATTENTION, SOFTMAX
from passes import op_table
from passes.facts import NodeFacts, TensorFacts, holds


@dataclass(frozen=True)
class Verdict:
    """Why a node stays high: the rule's id, a sentence, the number that was seen and the limit it was held to."""

    rule: str
    reason: str
    evidence: float | None = None
    limit: float | None = None


Rule = Callable[[NodeFacts], Verdict | None]


def rule_id(rule: Any) -> str:
    """`data_max` for a `DataMax(512)`; a function's own name."""
    name = getattr(rule, "__name__", None) or type(rule).__name__
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@dataclass(frozen=True)
class Legality:
    """No target runs the operator in half precision, or nothing is known of it (a custom op)."""

    allow_custom: bool = False

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if op_table.never_low(facts.base):
            return Verdict("legality", f"{facts.op} has no half-precision implementation")
        if facts.custom and not self.allow_custom:
            return Verdict(
                "legality", f"{facts.op} is a custom op, of which nothing is known; include it if its kernels take half"
            )
        return None


@dataclass(frozen=True)
class NodesToExclude:
    """The user's patterns, `re.match`ed on the node name and on the dotted module path."""

    patterns: tuple[str, ...]

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        pattern = matched(self.patterns, facts.name, facts.module)
        return None if pattern is None else Verdict("nodes_to_exclude", f"it matches nodes_to_exclude {pattern!r}")


@dataclass(frozen=True)
class TargetsToExclude:
    """The user's operators, by full name (`aten.add.Tensor`) or without overload (`aten.add`)."""

    targets: frozenset[str]

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        for name in (facts.op, facts.op.rpartition(".")[0]) if self.targets else ():
            if name in self.targets:
                return Verdict("targets_to_exclude", f"its operator {name} is in targets_to_exclude")
        return None


@dataclass(frozen=True)
class Unmeasured:
    """A tensor of the node is not in the range table. Missing evidence never means safe."""

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if not facts.has_ranges:
            return None
        for tensor in facts.tensors:
            if not tensor.measured:
                return Verdict("unmeasured", f"calibration has not measured {tensor.name}")
        return None


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
    """A magnitude among the node's own inputs and outputs exceeds `limit`. Weights have `InitMax`."""

    limit: float
    quantile: float = 1.0

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if self.limit == math.inf:
            return None
        return _above("data_max", facts, [t for t in facts.judged if not t.is_weight], self.limit, self.quantile)


@dataclass(frozen=True)
class Mask:
    """It computes with finite mask values, as `scores + mask` does.

    Where a whole row is masked, the low type would round its scores to the spacing of -65504 instead of losing them all
    alike, as fp32 does with -1e9. Softmax and attention, which only read masks, are not concerned: what they get is
    saturated when it is cast.
    """

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if facts.base not in op_table.MASK_ARITHMETIC:
            return None
        lowest = min((t.mask_min for t in facts.inputs if t.mask_min is not None), default=None)
        if lowest is None:
            return None
        reason = f"it computes with mask values down to {lowest:.4g}, which {_short(facts)} would round or overflow"
        return Verdict("mask", reason, lowest, -float(torch.finfo(facts.low_type).max))


@dataclass(frozen=True)
class InitMax:
    """A magnitude among the node's parameters, buffers and constants exceeds `limit`."""

    limit: float

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if self.limit == math.inf:
            return None
        return _above("init_max", facts, [t for t in facts.judged if t.is_weight], self.limit)


@dataclass(frozen=True)
class LiteralRange:
    """A number in the graph becomes a tensor value, and the low type does not hold it. Its id is `literal`."""

    __name__ = "literal"

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        limit = torch.finfo(facts.low_type).max
        for literal in facts.literals:
            if literal.name == "min" and _never_reached(facts, literal.value):
                continue
            if not holds(literal.value, facts.low_type):
                stored = float(torch.tensor(literal.value, dtype=torch.float64).to(facts.low_type))
                reason = f"its literal {literal.name}={literal.value:g} becomes {stored:g} in {_short(facts)}"
                return Verdict("literal", reason, literal.value, limit if abs(literal.value) > 1 else _least(facts))
        return None


@dataclass(frozen=True)
class MaxDepthOfReduction:
    """More than `limit` terms are summed into one output element."""

    limit: int

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if facts.depth is None or facts.depth <= self.limit:
            return None
        reason = f"it sums {facts.depth} terms into each element, above max_depth_of_reduction {self.limit}"
        return Verdict("max_depth_of_reduction", reason, float(facts.depth), float(self.limit))


@dataclass(frozen=True)
class Interior:
    """A value that the op hides passes the largest finite low value, or its epsilon vanishes in the low type.

    The value is the largest that calibration measured along the reduced dimensions, or without that a bound from the
    peaks at the inputs. `wide`: operators (`layer_norm`) that the backend is known to accumulate in fp32 anyway.
    """

    wide: frozenset[str] = frozenset()

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if not facts.has_ranges or facts.base in self.wide:
            return None
        limit = torch.finfo(facts.low_type).max
        for hidden in facts.hidden:
            if not hidden.bound <= limit:
                most = f"above {limit:g}, the most that {_short(facts)} holds"
                reason = f"its {hidden.name} reaches up to {hidden.bound:.3g}, {most}"
                return Verdict("interior", reason, hidden.bound, limit)
        return self._lost_epsilon(facts)

    def _lost_epsilon(self, facts: NodeFacts) -> Verdict | None:
        """An eps that vanishes does no harm where what it is added to is always larger than the low type's least."""
        if facts.epsilon is None or holds(facts.epsilon, facts.low_type):
            return None
        spread, tiny = facts.least_spread, float(torch.finfo(facts.low_type).smallest_normal)
        if spread is not None and spread >= tiny:
            return None
        seen = "" if spread is None else f", and a variance of {spread:.3g} needs it"
        return Verdict("interior", f"its eps {facts.epsilon:g} is lost in {_short(facts)}{seen}", facts.epsilon, tiny)


@dataclass(frozen=True)
class Storage:
    """Storing a tensor in the low type leaves less than `limit` dB between its variation and the rounding.

    Catches offsets (400.05 and 400.10 become equal), where a reader may take the offset away; a gate of 0.5 that is
    only multiplied is held to its magnitude instead. A tensor that is faint as a whole, its peak below four times the
    smallest normal value, must keep `faint` dB, as the rounding of subnormal values is not relative to them; and what
    a division or a logarithm blows up must be normal. Weights and constant tensors are exempt.
    """

    limit: float = 20.0
    faint: float = 40.0

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        for tensor in facts.judged:
            if tensor.measured and not tensor.is_weight:
                verdict = self._lost(facts, tensor)
                if verdict is not None:
                    return verdict
        return None

    def _lost(self, facts: NodeFacts, tensor: TensorFacts) -> Verdict | None:
        tiny = float(torch.finfo(facts.low_type).smallest_normal)
        if tensor.magnified and tensor.smallest is not None:
            reason = (
                f"{_role(facts, tensor)} has values down to {tensor.smallest:.3g}, below {tiny:.3g}, the smallest that "
                f"{_short(facts)} holds in full, and a division or a logarithm blows them up"
            )
            return Verdict("storage", reason, tensor.smallest, tiny)
        limit = self.faint if tensor.absmax is not None and tensor.absmax < 4 * tiny else self.limit
        if keeps_surely(tensor, facts.low_type, limit):
            return None
        decibels = storage_sqnr(tensor, facts.low_type)
        if decibels is None or decibels >= limit:
            return None
        return Verdict("storage", self._reason(facts, tensor, decibels, limit), decibels, limit)

    def _reason(self, facts: NodeFacts, tensor: TensorFacts, decibels: float, limit: float) -> str:
        what, low = _role(facts, tensor), _short(facts)
        most = torch.finfo(facts.low_type).max
        if tensor.absmax is not None and tensor.absmax > most:
            return f"{what} reached {tensor.absmax:.4g}, which becomes inf in {low} (it holds {most:g})"
        return (
            f"{what} would keep {decibels:.3g} dB of signal over rounding in {low}, below {limit:g} dB "
            f"(mean {tensor.mean:.4g}, rms {tensor.rms:.4g})"
        )


@dataclass(frozen=True)
class Follows:
    """An op that only moves data takes the type of its inputs: high if any of them is."""

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if not facts.moves:
            return None
        high = [tensor for tensor in facts.inputs if tensor.precision == "high"]
        return Verdict("follows", f"it only moves data, and its input {high[0].name} is high") if high else None


def storage_sqnr(tensor: TensorFacts, low_type: torch.dtype) -> float | None:
    """Predicted signal to quantisation noise ratio, dB, of storing `tensor` in `low_type`; None where it is constant.

    -inf where a value would overflow. Signal: the variance, rms^2 - mean^2, or rms^2 where no reader takes the mean
    away. Noise of rounding to a grid of step u: u^2 / 12 per element, with u taken
    from each bin of the histogram, or without one bounded from rms.
    """
    if tensor.rms is None or tensor.mean is None or tensor.absmax is None or tensor.min == tensor.max:
        return None
    if tensor.absmax > torch.finfo(low_type).max:
        return -math.inf  # becomes inf
    signal = _signal(tensor.rms, tensor.mean, tensor.offset_counts)
    noise = _most_noise(tensor.rms, low_type) if tensor.histogram is None else _noise(tensor.histogram, low_type)
    if noise == 0.0:
        return None
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def keeps_surely(tensor: TensorFacts, low_type: torch.dtype, limit: float) -> bool:
    """Whether `storage_sqnr` is `limit` at least without a look at the histogram, by the noise that there is at most.

    That is so of most tensors, and costs a tenth. One dB is for rounding in the sums that both are made of.
    """
    if tensor.rms is None or tensor.mean is None or tensor.absmax is None or tensor.absmax > torch.finfo(low_type).max:
        return False
    signal = _signal(tensor.rms, tensor.mean, tensor.offset_counts)
    return signal > 0 and 10 * math.log10(signal / _most_noise(tensor.rms, low_type)) >= limit + 1


def _signal(rms: float, mean: float, offset_counts: bool) -> float:
    return rms**2 - (mean**2 if offset_counts else 0.0)


def _most_noise(rms: float, low_type: torch.dtype) -> float:
    """Bound of the mean squared rounding error: of an element at most half a step of its own, or of a subnormal."""
    info = torch.finfo(low_type)
    return (rms * info.eps) ** 2 / 12 + (info.smallest_normal * info.eps) ** 2 / 12


def _noise(histogram: Sequence[int], low_type: torch.dtype) -> float:
    finite = sum(histogram[:255])
    return float(sum(map(operator.mul, histogram, _noise_by_bin(low_type)))) / finite if finite else 0.0


@cache
def _noise_by_bin(low_type: torch.dtype) -> tuple[float, ...]:
    """The squared rounding error that an element of each bin makes; none of zeros, nor of what is not finite."""
    info = torch.finfo(low_type)
    lows = [2.0 ** (exponent - 127) for exponent in range(1, 255)]
    steps = [max(low, info.smallest_normal) * info.eps for low in lows]
    # A value far below the step is lost whole: its own square is all the noise that it makes.
    return (0.0, *(min(step * step / 12, 4 * low * low) for low, step in zip(lows, steps, strict=True)), 0.0)


def matched(patterns: tuple[str, ...], name: str, module: str) -> str | None:
    """The first pattern that matches the node name or the module path."""
    if not patterns:
        return None
    return next((p for p in patterns if re.match(p, name) or (module and re.match(p, module))), None)


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
    seen_text = "nothing finite" if math.isnan(worst_seen) else f"{worst_seen:.4g}"
    return Verdict(
        rule, f"{_role(facts, worst)} reached {seen_text}{share}{batch}, above {rule} {limit:g}", worst_seen, limit
    )


def _never_reached(facts: NodeFacts, bound: float) -> bool:
    """Whether a small positive lower bound, such as the 1e-12 of a normalisation, is below all that was measured."""
    lows = [t.min for t in facts.inputs]
    return 0 < bound < 1 and bool(lows) and all(low is not None and low > 100 * bound for low in lows)


def _seen(facts: NodeFacts, tensor: TensorFacts, quantile: float) -> float:
    """The magnitude that a node answers for: of a masked tensor, softmax and attention care for the upper end alone."""
    if tensor.masked and (facts.base in SOFTMAX or facts.base in ATTENTION):
        return max(0.0, tensor.max or 0.0)
    return tensor.magnitude(quantile)


def _role(facts: NodeFacts, tensor: TensorFacts) -> str:
    if tensor.is_weight:
        return f"its {tensor.kind} {tensor.name}"
    return "its output" if tensor.name == facts.name else f"its input {tensor.name}"


def _short(facts: NodeFacts) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(facts.low_type, str(facts.low_type))


def _least(facts: NodeFacts) -> float:
    """The smallest positive value of the low type, subnormals included."""
    info = torch.finfo(facts.low_type)
    return float(info.smallest_normal * info.eps)
