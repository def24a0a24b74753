"""In which type each node takes its inputs, once a plan meets a graph with shared storage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from calib.aliasing import written_arguments
from calib.graph import base_op, is_measurable, tensor_values
from passes import op_table
from passes.plan import PrecisionPlan
from passes.regions import qualified_name
from passes.ties import Tie, ties_of

# Operators that raise "value cannot be converted to type Half without overflow", where others give inf; tried on CPU.
_CHECKS_NUMBERS = frozenset(
    {"masked_fill", "fill", "full", "full_like", "new_full", "scalar_tensor", "index_fill", "fill_diagonal", "scatter"}
    | {"clamp", "clamp_min", "clamp_max", "clip", "hardtanh", "threshold", "pow", "constant_pad_nd", "pad", "linspace"}
)


@dataclass(frozen=True)
class NodeTypes:
    """The types of a graph's nodes under a plan.

    low: nodes that take their fp32 inputs in `low_type`. never_written: no op of the graph writes in place.
    """

    ANY = "any"
    EXPORTED = "exported"

    low: frozenset[fx.Node]
    low_type: torch.dtype
    never_written: bool

    @classmethod
    def of(cls, graph_module: fx.GraphModule, plan: PrecisionPlan) -> NodeTypes:
        """Settle `plan` on a graph: all nodes that share written storage are low only if all are planned so."""
        planned = set(plan.low_precision_nodes)
        nodes = [node for node in graph_module.graph.nodes if node.op == "call_function"]
        low = {node for node in nodes if qualified_name(node) in planned and can_be_low(node, plan.low_precision_type)}
        never_written = not any(written_arguments(node) for node in nodes)
        return cls(settled(low, ties_of(graph_module)), plan.low_precision_type, never_written)

    def of_inputs(self, node: fx.Node) -> torch.dtype | str:
        """The low type, `EXPORTED` for the types that the inputs had at export, or `ANY` for as they come."""
        if node in self.low:
            return self.low_type
        passes_on = node.target is getitem or base_op(node.target) in {"_assert_tensor_metadata"} or states_type(node)
        return self.ANY if passes_on else self.EXPORTED


def settled(low: set[fx.Node], ties: list[Tie]) -> frozenset[fx.Node]:
    """`low` without the nodes that share written storage with one that is not in it."""
    for tie in ties:
        typed = {n for n in tie.nodes if n.op == "call_function" and n.target is not getitem}
        if tie.pinned is not None or not typed <= low:
            low = low - tie.nodes
    return frozenset(low)


def can_be_low(node: fx.Node, low_type: torch.dtype) -> bool:
    """Not what states its own type or reads bits, nor what has a third type, whatever a hand-made plan says.

    Nor what would be given a number that its kernel refuses, which on fake tensors it does not.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or states_type(node) or node.target in op_table.BITCASTS:
        return False
    if refuses_number(node, low_type):
        return False
    return {v.dtype for _, v in tensor_values(node) if is_measurable(v.dtype)} <= {torch.float32, low_type}


def refuses_number(node: fx.Node, low_type: torch.dtype) -> bool:
    """Whether a kernel raises because a finite number in the call is beyond `low_type`: masked_fill(-1e9) in fp16."""
    if base_op(node.target) not in _CHECKS_NUMBERS:
        return False
    most = torch.finfo(low_type).max
    numbers = pytree.tree_leaves((node.args, node.kwargs))
    return any(isinstance(n, (int, float)) and math.isfinite(n) and abs(n) > most for n in numbers)


def states_type(node: fx.Node) -> bool:
    """Whether a node is the user's own `.to(dtype)`: it takes what comes and gives the type that it states."""
    if base_op(node.target) not in op_table.STATED_TYPE:
        return False
    return any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))


def dtype_position(node: fx.Node) -> tuple[int, str] | None:
    """Position and name of the `dtype` argument of an operator with floating-point output, if it has one."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if not any(is_measurable(value.dtype) for _, value in tensor_values(node)):
        return None
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dtype":
            return position, argument.name
    return None


def needs_dtype(node: fx.Node) -> bool:
    """Whether the type of a factory's output is torch's default, as it has neither a dtype nor a tensor to follow."""
    has_tensor = any(tensor_values(argument) for argument in node.all_input_nodes)
    return not has_tensor


def with_low_dtype(node: fx.Node, args: Any, kwargs: Any, low_type: torch.dtype) -> tuple[Any, Any]:
    """The arguments of a low node, lowered in its `dtype`: one of float32, or a factory's default, follows the plan."""
    position = dtype_position(node)
    if position is None:
        return args, kwargs
    index, name = position
    stated = node.args[index] if index < len(node.args) else node.kwargs.get(name)
    if stated == torch.float32 and index < len(node.args):
        return (*args[:index], low_type, *args[index + 1 :]), kwargs
    if stated == torch.float32 or needs_dtype(node):
        return args, {**kwargs, name: low_type}
    return args, kwargs
