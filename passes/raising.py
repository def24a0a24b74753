"""Which nodes go back to fp32 after a run that missed the budget, where the table of edges does not say it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from calibcast.calib.graph import base_op, tensor_values
from calibcast.calib.operators import operator_of
from calibcast.calib.operators.operator import ORDER, STEP, Operator
from calibcast.calib.rounding_table import OUTPUT
from calibcast.passes.classification import Planning
from torch import fx


def nonfinite_paths(planning: Planning, lost: Collection[str]) -> tuple[set[str], set[str]]:
    """The nodes through which NaN or Inf reaches a result of the program, and those among them where it begins.

    lost: all nodes that have it only under the plan. Where it reaches no result, as 1 / inf is 0, all of them count.
    """
    known, made_by = set(lost), planning.makers_by_reader()
    waiting, seen, first = made_by.get(OUTPUT, set()) & known or set(lost), set[str](), set[str]()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        before = made_by.get(name, set()) & known
        waiting |= before - seen
        if not before:
            first.add(name)
    return seen, first


def steps_of(planning: Planning) -> dict[str, Operator]:
    """The nodes whose results change by steps, each with its operator: they sort, compare, round or give integers."""
    nodes = {c.name: c.node for c in planning.facts.nodes if c.node.op == "call_function"}
    return {name: operator for name, node in nodes.items() if (operator := _stepping(node)) is not None}


def nodes_around(planning: Planning, names: Collection[str], low: Collection[str], whole: bool) -> set[str]:
    """The low nodes among `names` and the nodes that round what these read; where none of them is low, one ring further
    up, and so on. whole: all low nodes that lead there.
    """
    grown = set(names)
    while whole and grown < (further := grown | planning.makers(grown)):
        grown = further
    while not (ring := planning.ring(grown, low)):
        further = grown | planning.makers(grown)
        if further == grown:
            return set()
        grown = further
    return ring


def _stepping(node: fx.Node) -> Operator | None:
    """The operator of a node whose results change by steps; None for other nodes."""
    read = any(_is_floating(value) for argument in node.all_input_nodes for _, value in tensor_values(argument))
    if not read or not isinstance(node.target, torch._ops.OpOverload):
        return None
    entry = operator_of(base_op(node.target))
    whole = any(not _is_floating(value) for _, value in tensor_values(node))
    return entry if entry.error in {STEP, ORDER} or entry.steps or (whole and not entry.asserts) else None


def _is_floating(value: torch.Tensor) -> bool:
    return value.dtype.is_floating_point or value.dtype.is_complex
