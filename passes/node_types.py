"""The type in which each node takes its inputs, when a plan is applied to a graph with shared storage."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import getitem
from typing import Protocol

import torch
from calibcast.calib.errors import PlanError
from calibcast.calib.graph import base_op, dtype_name, is_bitcast, is_measurable, tensor_values, where
from calibcast.calib.operators import CHECKS_NUMBERS, CONVERTS
from calibcast.calib.plain_tensors import why_not_plain
from calibcast.passes.low_types import LowTypes, Types, types_of
from calibcast.passes.regions import Candidate, qualified_name
from calibcast.passes.ties import Tie, forced_by_ties, named_ties, ties_of
from calibcast.passes.verdict import HIGH, LOW, Verdict
from torch import fx
from torch.utils import _pytree as pytree

_log = logging.getLogger("calibcast")


class LowNodes(Protocol):
    """The part of `PrecisionPlan` that is needed here. A protocol, since the plan's module imports this one."""

    @property
    def low_precision_nodes(self) -> tuple[str, ...]: ...

    @property
    def low_precision_type(self) -> torch.dtype: ...


@dataclass(frozen=True)
class NodeTypes:
    """The types of a graph's nodes under a plan.

    low: nodes that take their fp32 inputs in `low_type`. outputs: the types of what they then give.
    """

    low: frozenset[fx.Node]
    low_type: torch.dtype
    outputs: Mapping[fx.Node, Types] = field(repr=False)

    @classmethod
    def of(cls, graph_module: fx.GraphModule, plan: LowNodes) -> NodeTypes:
        """Apply `plan` to a graph: nodes that share written storage are low only if all of them are planned low."""
        planned = set(plan.low_precision_nodes)
        nodes = [node for node in graph_module.graph.nodes if node.op == "call_function"]
        wanted = {node for node in nodes if qualified_name(node) in planned}
        if not wanted:
            return cls(frozenset(), plan.low_precision_type, {})
        types = LowTypes(graph_module, plan.low_precision_type)
        able = {node: outputs for node in wanted if (outputs := able_types(node, types)) is not None}
        low = settled(set(able), ties_of(graph_module))
        _warn_of_refusals([node for node in wanted if node not in low], types)
        return cls(low, plan.low_precision_type, able)


def settled(low: set[fx.Node], ties: list[Tie]) -> frozenset[fx.Node]:
    """`low` without the nodes that share written storage with one that is not in it."""
    for tie in ties:
        typed = {n for n in tie.nodes if n.op == "call_function" and n.target is not getitem}
        if tie.pinned is not None or not typed <= low:
            low = low - tie.nodes
    return frozenset(low)


def able_types(node: fx.Node, types: LowTypes) -> Types | None:
    """The output types of `node` when it runs in the low type; None where it cannot."""
    return types.of(node) if refusal_of(node, types) is None else None


def refusal_of(node: fx.Node, types: LowTypes) -> str | None:
    """Why `node` stays in its exported type whatever a plan says, or None where it can run in the low type."""
    return _refused_by_kind(node, types.low_type) or types.refusal(node) or _refused_by_result(node, types)


class Refusals:
    """Why nodes of a graph must stay in their exported type, by name, for one low type. Found when asked for."""

    def __init__(self, nodes: Mapping[str, fx.Node], low_type: torch.dtype) -> None:
        self._nodes, self._low_type = nodes, low_type
        self._found: dict[str, str | None] = {}

    def __call__(self, name: str) -> str | None:
        if name not in self._found:
            self._found[name] = self._refusal(name)
        return self._found[name]

    @cached_property
    def _types(self) -> LowTypes | None:
        owner = next((node.graph.owning_module for node in self._nodes.values()), None)
        try:
            return None if owner is None else LowTypes(owner, self._low_type)
        except PlanError:  # without fake tensors nothing can be tried; cast insertion will raise
            return None

    def _refusal(self, name: str) -> str | None:
        node = self._nodes.get(name)
        return None if node is None or self._types is None else refusal_of(node, self._types)


def kept_by_graph(nodes: Sequence[Candidate], low: Collection[str], low_type: torch.dtype) -> dict[str, Verdict]:
    """The nodes of `low` that must stay in their exported type: refused, or tied to a node that stays."""
    decided = {candidate.name: candidate.node for candidate in nodes if candidate.kept is None}
    refusals, ties = Refusals(decided, low_type), named_ties(nodes)
    reasons = {name: refusals(name) for name in decided if name in low}
    found = {name: refused_verdict(reason, dtype_name(low_type)) for name, reason in reasons.items() if reason}
    while True:
        precisions = {name: LOW if name in low and name not in found else HIGH for name in decided}
        more = forced_by_ties(ties, precisions, found)
        if not more:
            return found
        found |= more


def refused_verdict(reason: str, low_name: str) -> Verdict:
    """The verdict on a node that cannot run in the low type."""
    return Verdict("legality", f"it cannot run in {low_name}: {reason}")


def _warn_of_refusals(nodes: Iterable[fx.Node], types: LowTypes) -> None:
    """Only a plan made by hand, or for another version of torch, has such nodes: `classify` finds them itself."""
    for node in nodes:
        if any(torch.float32 in types_of(n.meta.get("val")) for n in (node, *node.all_input_nodes)):
            _log.warning(
                "%s cannot run in %s and stays in its exported type: %s", where(node, qualified_name(node)),
                types.low_type, refusal_of(node, types) or "it shares storage, written in place, with one that does",
            )  # fmt: skip


def _refused_by_kind(node: fx.Node, low_type: torch.dtype) -> str | None:
    """Why a node stays in its exported type whatever the plan says: it states its own type, reads bits, has a third
    type, or has a number in its call that its kernel refuses. A run on fake tensors does not show the last.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return "it is no tensor operator that can be typed"
    if states_type(node):
        return "it is a conversion, which keeps the type that it states"
    if is_bitcast(node.target):
        return "it reads the bits of its input as another type"
    for read in (node, *node.all_input_nodes):
        if kind := next((kind for _, v in tensor_values(read) if (kind := why_not_plain(v)) is not None), None):
            return f"it {'gives' if read is node else 'takes'} a tensor that holds no plain numbers ({kind})"
    others = {v.dtype for _, v in tensor_values(node) if is_measurable(v.dtype)} - {torch.float32, low_type}
    if others:
        return f"it gives {dtype_name(next(iter(others)))}"
    number = refused_number(node, low_type)
    return None if number is None else f"its kernel refuses {number:g}, which {dtype_name(low_type)} does not hold"


def _refused_by_result(node: fx.Node, types: LowTypes) -> str | None:
    """Why a node that makes fp32 from integers stays: a division of integers gives fp32 in any case."""
    reads_floats = any(is_measurable(v.dtype) for n in node.all_input_nodes for _, v in tensor_values(n))
    if reads_floats or torch.float32 not in (types.of(node) or ()):
        return None
    return "it reads no floating-point tensor, and gives float32 of itself"


def refused_number(node: fx.Node, low_type: torch.dtype) -> float | None:
    """A finite number in the call that `low_type` cannot hold, so that the kernel raises: masked_fill(-1e9) in fp16.

    None where there is none, or the kernel takes it.
    """
    if base_op(node.target) not in CHECKS_NUMBERS:
        return None
    most = torch.finfo(low_type).max
    numbers = [n for n in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(n, (int, float))]
    return next((float(n) for n in numbers if math.isfinite(n) and abs(n) > most), None)


def states_type(node: fx.Node) -> bool:
    """Whether a node is the user's own `.to(dtype)`: it takes any type and gives the one that it states."""
    if base_op(node.target) not in CONVERTS:
        return False
    return any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))
