"""Which nodes may share storage, and which inputs a graph writes into: read from the operators' schemas."""

from __future__ import annotations

from functools import cache
from operator import getitem
from typing import Any

import torch
from calibcast.calib.graph import REGION_CHILD, base_op, child_of
from calibcast.calib.operators import operator_of
from torch import fx
from torch.export import ExportedProgram

Roots = dict[fx.Node, frozenset[fx.Node]]


def storage_roots(graph_module: fx.GraphModule) -> Roots:
    """For each node: the nodes that created the storage that its output may use (itself if it created its own)."""
    roots: Roots = {}
    for node in graph_module.graph.nodes:
        shared = shared_arguments(node)
        roots[node] = frozenset().union(*(roots[n] for n in shared)) if shared else frozenset([node])
    return roots


def shared_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments whose storage the output of `node` may share."""
    if node.op != "call_function" or picks_fresh(node):
        return []
    known = operator_of(base_op(node.target))
    unsaid = 0 if node.target is getitem else known.shares
    if unsaid is not None:
        passed = [n for n in _flat(node.args[unsaid]) if isinstance(n, fx.Node)]
        return [] if known.fresh_of_several and len(passed) > 1 else passed
    if node.target in REGION_CHILD:
        return operands(node)
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    places = _shared_places(node.target)
    return _arguments_at(node, places) if places else []


def picks_fresh(node: fx.Node) -> bool:
    """Whether `node` picks one output of an operator whose outputs share no storage with its arguments: `topk`."""
    if node.target is not getitem:
        return False
    maker = node.args[0]
    return (
        isinstance(maker, fx.Node) and isinstance(maker.target, torch._ops.OpOverload) and not shared_arguments(maker)
    )


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments that `node` writes into."""
    if node.op != "call_function":
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        places = _written_places(node.target)
        return _arguments_at(node, places) if places else []
    region = child_of(node)
    if region is not None:
        written = set(written_placeholders(region[1]))
        holders = [n.name for n in region[1].graph.nodes if n.op == "placeholder"]
        return [arg for arg, name in zip(operands(node), holders, strict=False) if name in written]
    return []


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes that a region node passes to its child graph."""
    return [argument for argument in node.args[REGION_CHILD[node.target] + 1 :] if isinstance(argument, fx.Node)]


def written_placeholders(graph_module: fx.GraphModule) -> list[str]:
    """The names of the placeholders that running the graph changes in place."""
    arguments = [argument for node in graph_module.graph.nodes for argument in written_arguments(node)]
    if not arguments:
        return []
    roots = storage_roots(graph_module)
    written = {root for argument in arguments for root in roots[argument]}
    return [node.name for node in graph_module.graph.nodes if node.op == "placeholder" and node in written]


def mutated_inputs(program: ExportedProgram) -> set[str]:
    """Placeholders that a call changes: in place, or (in a functional graph) through its outputs."""
    signature = program.graph_signature
    targets = set(signature.buffers_to_mutate.values())
    functional = {name for name, target in signature.inputs_to_buffers.items() if target in targets}
    return set(written_placeholders(program.graph_module)) | functional | set(signature.user_inputs_to_mutate.values())


_Places = tuple[tuple[int, str], ...]  # position and name of arguments


@cache
def _shared_places(target: Any) -> _Places:
    """The arguments whose storage the operator's schema lets its results share."""
    if not any(result.alias_info is not None for result in target._schema.returns):
        return ()
    return tuple((i, a.name) for i, a in enumerate(target._schema.arguments) if a.alias_info is not None)


@cache
def _written_places(target: Any) -> _Places:
    """The arguments that the operator's schema says it writes into."""
    if operator_of(base_op(target)).writes_nothing or not target._schema.is_mutable:
        return ()
    arguments = enumerate(target._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _arguments_at(node: fx.Node, places: _Places) -> list[fx.Node]:
    found: list[fx.Node] = []
    for position, name in places:
        value = node.args[position] if position < len(node.args) else node.kwargs.get(name)
        found.extend(n for n in _flat(value) if isinstance(n, fx.Node))
    return found


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [item for entry in value for item in _flat(entry)]
    return [value]
