"""In which type each node takes its inputs, once a plan meets a graph with shared storage."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import getitem

import torch
from calibcast.calib.graph import base_op, is_bitcast, is_measurable, tensor_values, where
from calibcast.calib.operators import CHECKS_NUMBERS, CONVERTS
from calibcast.passes.low_types import LowTypes, Types
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.regions import qualified_name
from calibcast.passes.ties import Tie, ties_of
from torch import fx
from torch.utils import _pytree as pytree

_log = logging.getLogger("calibcast")


@dataclass(frozen=True)
class NodeTypes:
    """The types of a graph's nodes under a plan.

    low: nodes that take their fp32 inputs in `low_type`; `outputs`: what they then give.
    """

    low: frozenset[fx.Node]
    low_type: torch.dtype
    outputs: Mapping[fx.Node, Types] = field(repr=False)

    @classmethod
    def of(cls, graph_module: fx.GraphModule, plan: PrecisionPlan) -> NodeTypes:
        """Settle `plan` on a graph: all nodes that share written storage are low only if all are planned so."""
        planned = set(plan.low_precision_nodes)
        nodes = [node for node in graph_module.graph.nodes if node.op == "call_function"]
        wanted = {node for node in nodes if qualified_name(node) in planned}
        if not wanted:
            return cls(frozenset(), plan.low_precision_type, {})
        types = LowTypes(graph_module, plan.low_precision_type)
        able = {node: outputs for node in wanted if (outputs := able_types(node, types)) is not None}
        for node in wanted - able.keys():
            _warn_of_refusal(node, types)
        low = settled(set(able), ties_of(graph_module))
        return cls(low, plan.low_precision_type, able)


def settled(low: set[fx.Node], ties: list[Tie]) -> frozenset[fx.Node]:
    """`low` without the nodes that share written storage with one that is not in it."""
    for tie in ties:
        typed = {n for n in tie.nodes if n.op == "call_function" and n.target is not getitem}
        if tie.pinned is not None or not typed <= low:
            low = low - tie.nodes
    return frozenset(low)


def able_types(node: fx.Node, types: LowTypes) -> Types | None:
    """What `node` gives when it runs in the low type; None where it cannot."""
    return types.of(node) if can_be_low(node, types.low_type) else None


def _warn_of_refusal(node: fx.Node, types: LowTypes) -> None:
    refusal = types.refusal(node) if can_be_low(node, types.low_type) else None
    if refusal is not None:
        _log.warning(
            "%s cannot run in %s and stays in its exported type: %s",
            where(node, qualified_name(node)), types.low_type, refusal,
        )  # fmt: skip


def can_be_low(node: fx.Node, low_type: torch.dtype) -> bool:
    """Not what states its own type or reads bits, nor what has a third type, whatever a hand-made plan says.

    Nor what would be given a number that its kernel refuses, which on fake tensors it does not.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or states_type(node) or is_bitcast(node.target):
        return False
    if refuses_number(node, low_type):
        return False
    return {v.dtype for _, v in tensor_values(node) if is_measurable(v.dtype)} <= {torch.float32, low_type}


def refuses_number(node: fx.Node, low_type: torch.dtype) -> bool:
    """Whether a kernel raises because a finite number in the call is beyond `low_type`: masked_fill(-1e9) in fp16."""
    if base_op(node.target) not in CHECKS_NUMBERS:
        return False
    most = torch.finfo(low_type).max
    numbers = pytree.tree_leaves((node.args, node.kwargs))
    return any(isinstance(n, (int, float)) and math.isfinite(n) and abs(n) > most for n in numbers)


def states_type(node: fx.Node) -> bool:
    """Whether a node is the user's own `.to(dtype)`: it takes what comes and gives the type that it states."""
    if base_op(node.target) not in CONVERTS:
        return False
    return any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))
