"""The rules. Any rule that is met keeps a node in its exported type; each says which number met which limit.

`mask`, `literal`, `storage` and `follows` guess what rounding does. They give way where it was measured: see
`passes.rounding_plan`.

A rule is a frozen dataclass called with one `NodeFacts`, answering a `Verdict` or None for "no opinion". It applies
when it is in the judge's tuple; its id is its class name in snake case. Comparisons are strict and written so that NaN
keeps the node high; a limit of inf switches a rule off.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from calibcast.calib.operators import MASK_ARITHMETIC, operator_of
from calibcast.passes.facts import Literal, NodeFacts
from calibcast.passes.low_types import LOW_TYPES
from calibcast.passes.number_formats import NumberFormat, format_of
from calibcast.passes.verdict import Verdict


def rule_id(rule: Any) -> str:
    """`data_max` for a `DataMax(512)`; a function's own name."""
    name = getattr(rule, "__name__", None) or type(rule).__name__
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@dataclass(frozen=True)
class Legality:
    """No target runs the operator in half precision, or nothing is known of it (a custom op)."""

    allow_custom: bool = False

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if operator_of(facts.base).never_low:
            return Verdict("legality", f"{facts.op} has no half-precision implementation")
        if facts.custom and not self.allow_custom:
            why = f"{facts.op} is a custom operator, and nothing is known about it"
            return Verdict("legality", f"{why}; include it if its kernels take half precision")
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
class Raised:
    """Nodes that must be in fp32, as a run of the plan has shown, each with its verdict."""

    verdicts: Mapping[str, Verdict]

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        return self.verdicts.get(facts.name)


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
class Mask:
    """It computes with finite mask values, as `scores + mask` does, and a whole row may be masked.

    Where a whole row is masked, fp32 loses all its scores alike in -1e9; the low type would round them to the spacing
    of -65504 instead. A mask that the program itself fixes and that leaves each row a value, such as a causal one, is
    none of these. Softmax and attention, which only read masks, are not concerned: what they get is saturated when it
    is cast.
    """

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if facts.rounding_known or facts.base not in MASK_ARITHMETIC or not facts.rows_masked:
            return None
        lowest = min((t.mask_min for t in facts.inputs if t.mask_min is not None), default=None)
        if lowest is None:
            return None
        reason = f"it computes with mask values down to {lowest:.4g}, which {facts.low.short} would round or overflow"
        return Verdict("mask", reason, lowest, -facts.low.max)


@dataclass(frozen=True)
class LiteralRange:
    """A number in the graph becomes a tensor value, and the low type does not hold it. Its id is `literal`."""

    __name__ = "literal"

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        limit = facts.low.max
        for literal in () if facts.rounding_known else facts.literals:
            if literal.name == "min" and _never_reached(facts, literal.value):
                continue
            if _is_absorbed(facts, literal):
                continue
            if not holds(literal.value, facts.low):
                stored = rounded(literal.value, facts.low)
                reason = f"its literal {literal.name}={literal.value:g} becomes {stored:g} in {facts.low.short}"
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
    """A value inside the operator passes the largest finite low value, or its epsilon vanishes in the low type.

    The value is the largest that calibration measured along the reduced dimensions, or if it measured none, a bound
    from the peaks at the inputs. `wide`: operators (`layer_norm`) that the backend is known to accumulate in fp32
    anyway.
    """

    wide: frozenset[str] = frozenset()

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if not facts.has_ranges or facts.base in self.wide:
            return None
        limit = facts.low.max
        for hidden in facts.hidden:
            if not hidden.bound <= limit:
                most = f"above {limit:g}, the most that {facts.low.short} holds"
                reason = f"its {hidden.name} reaches up to {hidden.bound:.3g}, {most}"
                return Verdict("interior", reason, hidden.bound, limit)
        return self._lost_epsilon(facts)

    def _lost_epsilon(self, facts: NodeFacts) -> Verdict | None:
        """An eps that becomes zero does no harm where what it is added to is always above the low type's smallest
        value.
        """
        if facts.epsilon is None or holds(facts.epsilon, facts.low):
            return None
        spread, tiny = facts.least_spread, facts.low.smallest_normal
        if spread is not None and spread >= tiny:
            return None
        seen = "" if spread is None else f", and a variance of {spread:.3g} needs it"
        return Verdict("interior", f"its eps {facts.epsilon:g} is lost in {facts.low.short}{seen}", facts.epsilon, tiny)


@dataclass(frozen=True)
class Follows:
    """An op that only moves data takes the type of its inputs: high if any of them is."""

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        if facts.rounding_known or not facts.moves:
            return None
        high = [tensor for tensor in facts.inputs if tensor.precision == "high"]
        return Verdict("follows", f"it only moves data, and its input {high[0].name} is high") if high else None


def matched(patterns: tuple[str, ...], name: str, module: str) -> str | None:
    """The first pattern that matches the node name or the module path."""
    if not patterns:
        return None
    return next((p for p in patterns if _compiled(p).match(name) or (module and _compiled(p).match(module))), None)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """`re` itself caches only 512 patterns; with more, it would compile every pattern again for every node."""
    return re.compile(pattern)


def _never_reached(facts: NodeFacts, bound: float) -> bool:
    """Whether a small positive lower bound, such as the 1e-12 of a normalisation, is below all that was measured."""
    lows = [t.min for t in facts.inputs]
    return 0 < bound < 1 and bool(lows) and all(low is not None and low > 100 * bound for low in lows)


def _is_absorbed(facts: NodeFacts, literal: Literal) -> bool:
    """Whether a number loses less than the rounding of the tensor that it is added to. The eps of an RMS norm does,
    where min(x) >= 2^11 eps in fp16, even if it becomes 0."""
    entry, lows = operator_of(facts.base), [t.min for t in facts.inputs]
    if not (entry.adds and not entry.subtracts) or literal.name != "other" or len(lows) != 1 or lows[0] is None:
        return False
    lost = abs(rounded(literal.value, facts.low) - literal.value)
    return lost <= facts.low.eps / 2 * (lows[0] + min(literal.value, 0.0))


def _least(facts: NodeFacts) -> float:
    """The smallest positive value of the low type, subnormals included."""
    return facts.low.smallest_normal * facts.low.eps


@lru_cache(maxsize=4096)
def holds(value: float, low_type: torch.dtype | NumberFormat) -> bool:
    """Whether the low type holds `value`: not as inf, not as zero, and within 1%.

    A subnormal may have a single significant bit: in fp16, 8e-8 becomes 1e-7.
    """
    if value == 0 or not math.isfinite(value):
        return True
    stored = rounded(value, format_of(low_type))
    return math.isfinite(stored) and abs(stored - value) <= 0.01 * abs(value)


def rounded(value: float, low: NumberFormat) -> float:
    """`value` as the format stores it."""
    return float(torch.tensor(value, dtype=torch.float64).to(LOW_TYPES[low.name]))
