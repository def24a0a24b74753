"""Which nodes may share storage, and which inputs a graph writes into: read off the operators' schemas."""

from __future__ import annotations

from functools import cache
from operator import getitem
from typing import Any

import torch
from calibcast.calib.graph import REGION_CHILD, child_of
from torch import fx
from torch.export import ExportedProgram

# In evaluation these give back their input itself, which their schemas do not say.
_IDENTITY_IN_EVAL = {
    torch.ops.aten.dropout.default,
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.alpha_dropout.default,
    torch.ops.aten.feature_alpha_dropout.default,
}
_ATEN = torch.ops.aten
# op -> position of the argument that it may give back, or views of it, though its schema says nothing.
_SHARES_UNSAID: dict[Any, int] = {
    getitem: 0,
    **dict.fromkeys(_IDENTITY_IN_EVAL, 0),
    **dict.fromkeys((_ATEN.atleast_1d.default, _ATEN.atleast_2d.default, _ATEN.atleast_3d.default), 0),
    **dict.fromkeys((_ATEN.atleast_1d.Sequence, _ATEN.atleast_2d.Sequence, _ATEN.atleast_3d.Sequence), 0),
    **dict.fromkeys((_ATEN.broadcast_tensors.default, _ATEN.meshgrid.default, _ATEN.meshgrid.indexing), 0),
    **dict.fromkeys((_ATEN.type_as.default, _ATEN.sum_to_size.default, _ATEN.conj_physical.default), 0),
    **dict.fromkeys((_ATEN.unsafe_chunk.default, _ATEN.unsafe_split.Tensor), 0),
    **dict.fromkeys((_ATEN.unsafe_split_with_sizes.default, _ATEN._unsafe_view.default), 0),
    _ATEN.cartesian_prod.default: 0,
    _ATEN.einsum.default: 1,
}
# Of several operands these make something new: a write to it must not pin a weight that was multiplied in.
_VIEWS_OF_ONE = {_ATEN.cartesian_prod.default, _ATEN.einsum.default}
# Its schema says that it writes; it only drops gradient history.
_WRITES_NOTHING = {torch.ops.aten.detach_.default}
Roots = dict[fx.Node, frozenset[fx.Node]]


def storage_roots(graph_module: fx.GraphModule) -> Roots:
    """For each node, the nodes that made the storage its output may live in (itself, where it made its own)."""
    roots: Roots = {}
    for node in graph_module.graph.nodes:
        shared = shared_arguments(node)
        roots[node] = frozenset().union(*(roots[n] for n in shared)) if shared else frozenset([node])
    return roots


def shared_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments whose storage the output of `node` may share."""
    if node.op != "call_function" or picks_fresh(node):
        return []
    if node.target in _SHARES_UNSAID:
        passed = [n for n in _flat(node.args[_SHARES_UNSAID[node.target]]) if isinstance(n, fx.Node)]
        return [] if node.target in _VIEWS_OF_ONE and len(passed) > 1 else passed
    if node.target in REGION_CHILD:
        return operands(node)
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    places = _shared_places(node.target)
    return _arguments_at(node, places) if places else []


def picks_fresh(node: fx.Node) -> bool:
    """Whether `node` picks one output of an operator that makes each of them anew: values and indices of `topk`."""
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
    """What a region node passes to its child graph."""
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
    if target in _WRITES_NOTHING or not target._schema.is_mutable:
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
