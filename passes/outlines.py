"""What a graph says about its nodes: read once for all settings, low types and decisions.

Only this module reads graphs for the rules; `FactReader` turns outlines into facts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from calibcast.calib.aliasing import operands
from calibcast.calib.graph import (
    REGION_CHILD,
    argument_at,
    argument_of,
    base_op,
    child_of,
    is_measurable,
    module_path,
    op_name,
    producer_of,
    tensor_values,
)
from calibcast.calib.operators import MASK_ARITHMETIC, MOVES, operator_of
from calibcast.passes.evidence import Evidence, HiddenEvidence
from calibcast.passes.facts import Hidden, Literal
from calibcast.passes.reductions import depth_of_reduction, hidden_values
from torch import fx

# A tensor: the node and output under which it was measured, and the node whose decision sets its type ("" for none).
Row = tuple[str, int, str]
Rows = tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class NodeOutline:
    """A node, without its tensors' measurements. values: the fields of `NodeFacts` that are known already."""

    name: str
    inputs: Rows
    outputs: Rows
    values: Mapping[str, Any] = field(repr=False)


class Outliner:
    """Makes outlines. `names` gives the qualified name of a node; without ranges, `has_ranges` is False.

    masks_a_row: whether a mask that a node gives may mask a whole row.
    """

    def __init__(
        self,
        names: Mapping[fx.Node, str],
        evidence: Evidence,
        hidden: HiddenEvidence,
        has_ranges: bool,
        masks_a_row: Callable[[fx.Node], bool] = lambda node: True,
    ) -> None:
        self._names, self._evidence, self._hidden, self._has_ranges = names, evidence, hidden, has_ranges
        self._masks_a_row = masks_a_row
        self._rows: dict[fx.Node, Rows] = {}  # a cache, as a tensor may have several readers

    def of(self, node: fx.Node) -> NodeOutline:
        """The outline of one `call_function` node."""
        name, base = self._names[node], base_op(node.target)
        inputs = tuple([row for argument in node.all_input_nodes for row in self._rows_of(argument)])
        outputs = tuple([(name, i, "") for i, value in tensor_values(node) if is_measurable(value.dtype)])
        depth = depth_of_reduction(node, base)
        epsilon = operator_of(base).epsilon
        values = {
            "name": name,
            "op": op_name(node.target),
            "base": base,
            "module": module_path(node),
            "literals": tuple(_literals(node, base)),
            "epsilon": _number(argument_of(node, epsilon)) if epsilon else None,
            "depth": depth,
            "hidden": () if depth is None else self._hidden_values(node, base, depth),
            "least_spread": self._least_spread(node, base),
            "moves": base in MOVES and bool(inputs),
            "custom": not base,
            "rows_masked": base in MASK_ARITHMETIC and self._may_mask_rows(node),
            "has_ranges": self._has_ranges,
        }
        return NodeOutline(name, inputs, outputs, values)

    def _least_spread(self, node: fx.Node, base: str) -> float | None:
        """The least variance that a norm divides by: as measured, or for a batch norm the least that it stores."""
        place = operator_of(base).variance_at
        variance = None if place is None else argument_at(node, place)
        if not isinstance(variance, fx.Node):
            return self._hidden.least.get(self._names[node])
        facts = self._evidence.get((self._names.get(variance, variance.name), 0))
        return None if facts is None else facts.min

    def _may_mask_rows(self, node: fx.Node) -> bool:
        """Whether one of the masks that a node reads may mask a whole row."""
        masks = [n for n in node.all_input_nodes if self._has_mask(n)]
        return any(map(self._masks_a_row, masks))

    def _has_mask(self, argument: fx.Node) -> bool:
        found = (self._evidence.get((name, output)) for name, output, _ in self._rows_of(argument))
        return any(facts is not None and facts.mask_min is not None for facts in found)

    def _hidden_values(self, node: fx.Node, base: str, depth: int) -> tuple[Hidden, ...]:
        # By argument: `attention(x, x, x)` has one input node, but three operands.
        rows = [row for argument in node.args if isinstance(argument, fx.Node) for row in self._rows_of(argument)]
        peaks = [self._peak(name, output) for name, output, _ in rows]
        found = hidden_values(node, base, depth, peaks, self._hidden.largest.get(self._names[node]))
        return tuple(Hidden(name, bound) for name, bound in found)

    def _peak(self, name: str, output: int) -> float:
        facts = self._evidence.get((name, output))
        return math.nan if facts is None else facts.magnitude()

    def _rows_of(self, argument: fx.Node) -> Rows:
        rows = self._rows.get(argument)
        if rows is None:
            rows = self._rows[argument] = tuple(self._found(argument))
        return rows

    def _found(self, argument: fx.Node) -> list[Row]:
        producer, output = producer_of(argument)
        positions = [position for position, value in tensor_values(argument) if is_measurable(value.dtype)]
        if producer.target in REGION_CHILD:
            return [(*self._inside(producer, output or 0), "") for _ in positions]
        name = self._names[producer]
        return [(name, position if output is None else output, name) for position in positions]

    def _inside(self, region: fx.Node, output: int) -> tuple[str, int]:
        """The name and position under which calibration measured a region's output: those of the node inside."""
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
        return self._names.get(producer, producer.name), position or 0


def _literals(node: fx.Node, base: str) -> list[Literal]:
    found = ((name, _number(argument_of(node, name))) for name in operator_of(base).literals)
    return [Literal(name, value) for name, value in found if value is not None]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
