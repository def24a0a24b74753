"""What a rule may know about a node, and of its tensors: read from range tables here, from graphs in `fact_reader`.

Without torch, which takes seconds to import: to compare two tables nothing of it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from calib.ranges import RangeTable
from passes.number_formats import NumberFormat, format_of

if TYPE_CHECKING:
    import torch

LOW, HIGH, KEPT = "low", "high", "kept"  # how a node is decided
WEIGHT_KINDS = frozenset({"parameter", "buffer", "constant"})


@dataclass(frozen=True)
class TensorFacts:
    """What was measured of one tensor. `measured` False: nothing was, and nothing else here means anything.

    masked, mask_min: how many mask values it has, and the lowest finite one; no other number here counts them.
    magnified: it has values that the low type does not hold in full, and they end up under a division or a logarithm.
    offset_counts: something that reads it may take its mean away, so that its variation is what must survive.
    precision: how the node that made it was decided, or None for an input, a weight or a kept node.
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
    histogram: tuple[int, ...] | None = field(default=None, repr=False)
    precision: str | None = None

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


def _float16() -> torch.dtype:
    import torch  # whoever judges without it says in which format

    return torch.float16


@dataclass(frozen=True)
class NodeFacts:
    """All that a rule may know about a node.

    inputs, outputs: its floating-point tensors. literals: numbers that become tensor values. epsilon: the op's own,
    if it has one. depth: how many products or terms are summed into one output element. hidden: bounds of values
    that the op hides. least_spread: the least variance (or mean square) that a norm divides by the root of.
    moves: it only moves data. custom: not an ATen op. has_ranges: a RangeTable was given. low_type: what it is to run
    in; a NumberFormat only where tensors are judged without a program.
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
    moves: bool = False
    custom: bool = False
    has_ranges: bool = True
    low_type: torch.dtype | NumberFormat = field(default_factory=_float16)

    @cached_property
    def low(self) -> NumberFormat:
        """The limits of the low type."""
        return format_of(self.low_type)

    @property
    def tensors(self) -> tuple[TensorFacts, ...]:
        """Inputs and outputs."""
        return self.inputs + self.outputs

    @property
    def judged(self) -> tuple[TensorFacts, ...]:
        """The tensors whose ranges this node answers for.

        Its own inputs and outputs; of a node that only moves data, the inputs that no decided node made.
        """
        return tuple(t for t in self.inputs if t.precision is None) if self.moves else self.tensors


Evidence = Mapping[tuple[str, int], TensorFacts]


def evidence_of(ranges: RangeTable | None) -> Evidence:
    """The rows of a table as facts, by (node, output)."""
    if ranges is None:
        return {}
    found: dict[tuple[str, int], TensorFacts] = {}
    lowest = {(row["node"], row["output"]): row["mask_min"] for row in ranges.hidden.iter_rows(named=True)}
    for row in ranges.frame.iter_rows(named=True):
        if row["batches"]:
            found[row["node"], row["output"]] = TensorFacts(
                name=row["node"],
                kind=row["kind"],
                nonfinite=row["nan"] + row["posinf"] + row["neginf"],
                mask_min=lowest.get((row["node"], row["output"])),
                histogram=None if row["histogram"] is None else tuple(row["histogram"]),
                **{name: row[name] for name in _COPIED},
            )
    return found


_COPIED = ("min", "max", "absmax", "smallest", "mean", "rms", "masked", "absmax_batch", "nonfinite_batch")


@dataclass(frozen=True)
class HiddenEvidence:
    """What calibration measured inside nodes, by name: the largest sum, and the least spread; None for not measured."""

    largest: Mapping[str, float | None] = field(default_factory=dict)
    least: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, ranges: RangeTable | None) -> HiddenEvidence:
        """The hidden rows of a table."""
        rows = [] if ranges is None else [r for r in ranges.hidden.iter_rows(named=True) if r["output"] == 0]
        return cls({r["node"]: r["hidden_max"] for r in rows}, {r["node"]: r["hidden_min"] for r in rows})
