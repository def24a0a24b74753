"""What a rule may know about a node, as data that `passes.outlines` and `passes.fact_reader` read from the program.

It does not import torch, which takes seconds: comparing two tables does not need it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from calibcast.passes.number_formats import NumberFormat, format_of

if TYPE_CHECKING:
    import torch

WEIGHT_KINDS = frozenset({"parameter", "buffer", "constant"})


@dataclass(frozen=True)
class TensorFacts:
    """What was measured of one tensor. `measured` is False where nothing was; the numbers here then mean nothing.

    masked, mask_min: how many mask values it has, and the lowest finite one; no other number here counts them.
    magnified: it has values that the low type does not hold in full, and they end up under a division or a logarithm.
    offset_counts: a reader may subtract its mean, so that its variation must survive rounding.
    precision: how the node that made it was decided, or None for an input, a weight or a kept node.
    exponent: k, where the tensor is stored as 2^-k times its true value, and all numbers here are of what is stored.
    """

    name: str
    kind: str = "activation"
    measured: bool = True
    min: float | None = None
    max: float | None = None
    absmax: float | None = None
    smallest: float | None = None
    mean: float | None = None
    rms: float | None = None
    nonfinite: int = 0
    masked: int = 0
    mask_min: float | None = None
    magnified: bool = False
    offset_counts: bool = True
    absmax_batch: int | None = None
    nonfinite_batch: int | None = None
    histogram: Sequence[int] | None = field(default=None, repr=False)
    precision: str | None = None
    exponent: int = 0

    @property
    def is_weight(self) -> bool:
        """Whether it is a parameter, buffer or constant."""
        return self.kind in WEIGHT_KINDS

    def magnitude(self, quantile: float = 1.0) -> float:
        """The magnitude that a share `quantile` of the elements stays within; NaN when nothing finite was seen.

        Below 1 it comes from the histogram, so it is the upper end of a power-of-two bin: never too small.
        """
        if self.absmax is None:
            return math.nan
        if quantile >= 1.0 or self.histogram is None:
            return self.absmax
        wanted, seen = quantile * sum(self.histogram[:255]), 0
        for exponent, count in enumerate(self.histogram[:255]):
            seen += count
            if seen >= wanted:
                return min(self.absmax, 2.0 ** (exponent - 126))
        return self.absmax


@dataclass(frozen=True)
class Literal:
    """A number in the graph that becomes a value of a tensor."""

    name: str
    value: float


@dataclass(frozen=True)
class Hidden:
    """A value inside an operator that no tensor shows, and a bound of its magnitude."""

    name: str
    bound: float


@dataclass(frozen=True)
class Lost:
    """What rounding leaves of a result, where that is too little.

    node: whose result it is. decibels: its signal over the rounding of one of its arguments, or of a node before it.
    least: how much it must keep.
    """

    node: str
    decibels: float
    least: float


def _float16() -> torch.dtype:
    import torch  # code that judges without torch gives a NumberFormat

    return torch.float16


@dataclass(frozen=True)
class NodeFacts:
    """All that a rule may know about a node.

    inputs, outputs: its floating-point tensors. literals: numbers that become tensor values. epsilon: the op's own,
    if it has one. depth: how many products or terms are summed into one output element. hidden: bounds of values inside
    the op. least_spread: the least variance (or mean square) whose root a norm divides by.
    lost: rounding leaves too little of its result, or of a later result that is made from it. refused: why the operator
    cannot run in the low type at all, or None.
    rows_masked: it computes with a mask that may mask a whole row.
    moves: it only moves data. custom: not an ATen op. has_ranges: a RangeTable was given. rounding_known: what rounding
    there does to the outputs was measured, so that rules which guess it from magnitudes do not apply. low_type: the
    type that it is to run in; a NumberFormat only where tensors are judged without a program.
    """

    name: str
    op: str = ""
    base: str = ""
    module: str = ""
    inputs: tuple[TensorFacts, ...] = ()
    outputs: tuple[TensorFacts, ...] = ()
    literals: tuple[Literal, ...] = ()
    epsilon: float | None = None
    depth: int | None = None
    hidden: tuple[Hidden, ...] = ()
    least_spread: float | None = None
    lost: Lost | None = None
    refused: str | None = None
    rows_masked: bool = True
    moves: bool = False
    custom: bool = False
    has_ranges: bool = True
    rounding_known: bool = False
    low_type: torch.dtype | NumberFormat = field(default_factory=_float16)

    @cached_property
    def low(self) -> NumberFormat:
        """The limits of the low type."""
        return format_of(self.low_type)

    @cached_property
    def tensors(self) -> tuple[TensorFacts, ...]:
        """Inputs and outputs."""
        return self.inputs + self.outputs

    @cached_property
    def judged(self) -> tuple[TensorFacts, ...]:
        """The tensors whose ranges this node answers for.

        Its own inputs and outputs; for a node that only moves data, the inputs that no decided node made.
        """
        return tuple(t for t in self.inputs if t.precision is None) if self.moves else self.tensors
