"""What a rule may know about a node: the only reader of graphs and range tables on behalf of the rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import fx

from calib.aliasing import operands
from calib.graph import REGION_CHILD, argument_of, base_op, child_of, is_measurable, module_path, op_name, tensor_values
from calib.operators import MOVES
from calib.ranges import RangeTable
from passes import op_table
from passes.reductions import depth_of_reduction, hidden_values

LOW_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
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


@dataclass(frozen=True)
class NodeFacts:
    """All that a rule may know about a node.

    inputs, outputs: its floating-point tensors. literals: numbers that become tensor values. epsilon: the op's own,
    if it has one. depth: how many products or terms are summed into one output element. hidden: bounds of values
    that the op hides. least_spread: the least variance (or mean square) that a norm divides by the root of.
    moves: it only moves data. custom: not an ATen op. has_ranges: a RangeTable was given.
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
    low_type: torch.dtype = torch.float16

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


def holds(value: float, low_type: torch.dtype) -> bool:
    """Whether the low type holds `value`: not as inf, not as zero, and within 1%.

    A subnormal may have a single significant bit: fp16 makes 1e-7 of 8e-8.
    """
    if value == 0 or not math.isfinite(value):
        return True
    stored = float(torch.tensor(value, dtype=torch.float64).to(low_type))
    return math.isfinite(stored) and abs(stored - value) <= 0.01 * abs(value)


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


@dataclass(frozen=True)
class FactReader:
    """Makes `NodeFacts` from graph nodes. `names` gives the qualified name of a node, `kinds` of placeholders."""

    evidence: Evidence
    has_ranges: bool
    kinds: Mapping[str, str]
    names: Mapping[fx.Node, str]
    low_type: torch.dtype
    hidden: HiddenEvidence = field(default_factory=HiddenEvidence)
    magnified: frozenset[tuple[str, int]] = frozenset()
    offset_free: frozenset[str] = frozenset()

    def read(self, node: fx.Node, precisions: Mapping[str, str]) -> NodeFacts:
        """Facts of `node`, given how the nodes before it were decided."""
        inputs = tuple(fact for argument in node.all_input_nodes for fact in self._input_facts(argument, precisions))
        # By position: `attention(x, x, x)` has one input node, and three operands.
        operands = [argument for argument in node.args if isinstance(argument, fx.Node)]
        peaks = [fact.magnitude() for argument in operands for fact in self._input_facts(argument, precisions)]
        outputs = tuple(
            self._look_up(self.names[node], output, None)
            for output, value in tensor_values(node)
            if is_measurable(value.dtype)
        )
        base = base_op(node.target)
        measured = self.hidden.largest.get(self.names[node])
        epsilon = op_table.EPSILONS.get(base)
        return NodeFacts(
            name=self.names[node],
            op=op_name(node.target),
            base=base,
            module=module_path(node),
            inputs=inputs,
            outputs=outputs,
            literals=tuple(_literals(node, base)),
            epsilon=_number(argument_of(node, epsilon)) if epsilon else None,
            depth=depth_of_reduction(node, base),
            hidden=tuple(Hidden(name, bound) for name, bound in hidden_values(node, base, peaks, measured)),
            least_spread=self.hidden.least.get(self.names[node]),
            moves=base in MOVES and bool(inputs),
            custom=not base,
            has_ranges=self.has_ranges,
            low_type=self.low_type,
        )

    def _input_facts(self, argument: fx.Node, precisions: Mapping[str, str]) -> list[TensorFacts]:
        producer, output = producer_of(argument)
        values = tensor_values(argument)
        if producer.target in REGION_CHILD:
            return [
                self._look_up(*self._inside(producer, output or 0), None) for _, v in values if is_measurable(v.dtype)
            ]
        name = self.names[producer]
        return [
            self._look_up(name, output if output is not None else position, precisions.get(name))
            for position, value in values
            if is_measurable(value.dtype)
        ]

    def _inside(self, region: fx.Node, output: int) -> tuple[str, int]:
        """The name and position under which calibration measured an output of a region: that of the node in it."""
        found = child_of(region)
        assert found is not None
        _, child = found
        results = next(iter(reversed(child.graph.nodes))).args[0]
        result = results[output] if isinstance(results, (list, tuple)) else results
        producer, position = producer_of(result)
        if producer.op == "placeholder":
            holders = [n for n in child.graph.nodes if n.op == "placeholder"]
            producer, position = producer_of(operands(region)[holders.index(producer)])
        if producer.target in REGION_CHILD:
            return self._inside(producer, position or 0)
        return self.names.get(producer, producer.name), position or 0

    def _look_up(self, name: str, output: int, precision: str | None) -> TensorFacts:
        kind = self.kinds.get(name, "activation")
        found = self.evidence.get((name, output))
        if found is None:
            return TensorFacts(name, kind, measured=False, precision=precision)
        magnified, counts = (name, output) in self.magnified, name not in self.offset_free
        return found if precision is None and counts and not magnified else _placed(found, precision, magnified, counts)


def _placed(facts: TensorFacts, precision: str | None, magnified: bool, offset_counts: bool) -> TensorFacts:
    # dataclasses.replace calls __init__ by keyword and is slow on large graphs; the copy is as frozen as the original.
    copy = object.__new__(TensorFacts)
    copy.__dict__.update(facts.__dict__)
    copy.__dict__.update(precision=precision, magnified=magnified, offset_counts=offset_counts)
    return copy


def producer_of(node: fx.Node) -> tuple[fx.Node, int | None]:
    """The node that made the tensor, and which of its outputs it is, looking through `getitem`."""
    if node.target is getitem and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int):
        return node.args[0], node.args[1]
    return node, None


def _literals(node: fx.Node, base: str) -> list[Literal]:
    found = ((name, _number(argument_of(node, name))) for name in op_table.LITERALS.get(base, ()))
    return [Literal(name, value) for name, value in found if value is not None]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
