"""Facts of the nodes of a graph: the only reader of graphs and range tables on behalf of the rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import fx

from calib.aliasing import operands
from calib.graph import REGION_CHILD, base_op, child_of, is_measurable, module_path, op_name, tensor_values
from calib.operators import MOVES
from passes import op_table
from passes.facts import Evidence, Hidden, HiddenEvidence, Literal, NodeFacts, TensorFacts
from passes.reductions import depth_of_reduction, hidden_values


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


def argument_of(node: fx.Node, name: str) -> Any:
    """The value of the argument called `name` in the operator's schema; its default where it was left out."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, argument.default_value)
    return None


def _literals(node: fx.Node, base: str) -> list[Literal]:
    found = ((name, _number(argument_of(node, name))) for name in op_table.LITERALS.get(base, ()))
    return [Literal(name, value) for name, value in found if value is not None]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
