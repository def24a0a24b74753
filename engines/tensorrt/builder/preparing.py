"""What is done to a copy of a program before Torch-TensorRT sees it: it fails at some outputs and some writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from calibcast.calib.aliasing import mutated_inputs, storage_roots
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

COPY = torch.ops.aten.clone.default
WRITE = torch.ops.aten.copy_.default
PUT = torch.ops.aten.index_put_.default
PUT_ALONG = torch.ops.aten.index_copy_.default
AHEAD = torch.ops.aten.unsqueeze.default
EXPAND = torch.ops.aten.expand.default
PERMUTE = torch.ops.aten.permute.default
PUT_APART = torch.ops.aten.index_put.default
PUT_ALONG_APART = torch.ops.aten.index_copy.default
# Writes at places -> the same as a write with a list of indices.
_PUTS = {PUT: PUT, PUT_ALONG: PUT, PUT_APART: PUT_APART, PUT_ALONG_APART: PUT_APART}


def contents_apart(graph: fx.Graph) -> None:
    """Have each write of a whole tensor write a copy. torch takes no program in which two buffers get one new content,
    as it knows outputs by their nodes."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is WRITE and len(node.args) > 1:
            with graph.inserting_before(node):
                copy = _copied(graph, node.args[1])
            node.args = (node.args[0], copy, *node.args[2:])


def state_apart(program: ExportedProgram) -> None:
    """Have each output that is a written buffer be a copy of it. torch puts the write itself in its place, and
    Torch-TensorRT then cannot take the write out. Changes the graph and the signature of `program`."""
    graph, written = program.graph, mutated_inputs(program)
    roots = storage_roots(program.graph_module)
    output = graph.output_node()
    given: list[Any] = list(output.args[0])
    specs = list(program.graph_signature.output_specs)
    for place, (value, spec) in enumerate(zip(given, specs, strict=True)):
        held = isinstance(value, fx.Node) and any(root.name in written for root in roots.get(value, ()))
        if held and spec.kind == OutputKind.USER_OUTPUT:
            with graph.inserting_before(output):
                given[place] = _copied(graph, value)
            specs[place] = replace(spec, arg=replace(spec.arg, name=given[place].name))
    output.args = (tuple(given),)
    program.graph_signature.output_specs[:] = specs
    program.graph_module.recompile()


def puts_along(graph: fx.Graph) -> None:
    """Write `cache[:, :, places] = new` as `index_copy_`: 2.14 cannot broadcast the values of the former, and updates a
    cache in place by the latter."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not PUT or len(node.args) != 3 or node.kwargs:
            continue
        cache, (*before, places), new = node.args
        held, value, index = _value(cache), _value(new), _value(places)
        along = index is not None and index.dtype != torch.bool and index.dim() == 1
        if held is None or value is None or not along or any(other is not None for other in before):
            continue
        shape = [*held.shape[: len(before)], index.shape[0], *held.shape[len(before) + 1 :]]
        missing = len(shape) - value.dim()  # Python leaves out leading sizes of 1
        if missing >= 0 and [1] * missing + list(value.shape) == shape:
            for _ in range(missing):
                value = value.unsqueeze(0)
                with graph.inserting_before(node):
                    new = _call(graph, AHEAD, (new, 0), value, node)
            node.target, node.args = PUT_ALONG, (cache, len(before), places, new)


def puts_first(graph: fx.Graph) -> None:
    """Write along the first dimension what is written at places along others, and values of the full shape.

    2.11 takes values to be in the order of a write along the first dimension, whatever the write is: it refuses most
    others, and where sizes happen to agree it mixes the values up. Writes with other indices stay as they are.
    """
    for node in list(graph.nodes):
        put = _put_at_places(node)
        if put is None:
            continue
        target, held, places, new, first = put
        rank = len(held.meta["val"].shape)
        order = [*range(first, first + len(places)), *range(first), *range(first + len(places), rank)]
        shape = _size_written(held, places, first)
        with graph.inserting_before(node):
            if list(new.meta["val"].shape) != shape:
                new = _call(graph, EXPAND, (new, shape), new.meta["val"].expand(shape), node)
            if first:
                ahead = [first, *(place for place in range(len(shape)) if place != first)]
                new = _call(graph, PERMUTE, (new, ahead), new.meta["val"].permute(ahead), node)
                held = _call(graph, PERMUTE, (held, order), held.meta["val"].permute(order), node)
        node.target, node.args = target, (held, list(places), new)
        if first:
            back = sorted(range(rank), key=order.__getitem__)
            with graph.inserting_after(node):
                moved = _call(graph, PERMUTE, (node, back), node.meta["val"], node)
            node.replace_all_uses_with(moved, delete_user_cb=lambda user, moved=moved: user is not moved)
            node.meta["val"] = held.meta["val"]


def _put_at_places(node: fx.Node) -> tuple[Any, fx.Node, list[fx.Node], fx.Node, int] | None:
    """(operator, tensor, places along its dimensions, values, first of these dimensions) of a write at places, where
    `puts_first` can move it; else None."""
    if node.op != "call_function" or node.kwargs or node.target not in _PUTS:
        return None
    arguments: Any = node.args
    if node.target in (PUT_ALONG, PUT_ALONG_APART):
        held, first, place, new = arguments
        places = [place]
        first = first % max(_value(held).dim(), 1)
    else:
        if len(arguments) != 3:
            return None
        held, indices, new = arguments
        first = next((place for place, index in enumerate(indices) if index is not None), 0)
        places = list(indices[first:])
    values = [_value(place) for place in places]
    if not values or any(v is None or v.dtype == torch.bool or v.dim() != 1 for v in values):
        return None
    if _value(held) is None or _value(new) is None or any(v.shape != values[0].shape for v in values):
        return None
    shape = _size_written(held, places, first)
    static = all(isinstance(size, int) for size in shape)
    return (_PUTS[node.target], held, places, new, first) if static or list(_value(new).shape) == shape else None


def _size_written(held: fx.Node, places: list[fx.Node], first: int) -> list[Any]:
    """The full shape of the values of a write: the places take the place of the dimensions that they are along."""
    sizes = list(held.meta["val"].shape)
    return [*sizes[:first], places[0].meta["val"].shape[0], *sizes[first + len(places) :]]


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], value: torch.Tensor, source: fx.Node) -> fx.Node:
    """A new node with its value, which belongs to the exported node that `source` belongs to."""
    made = graph.call_function(target, args)
    made.meta = {"val": value, **{key: kept for key, kept in source.meta.items() if key == "custom"}}
    return made


def _value(node: Any) -> Any:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _copied(graph: fx.Graph, source: Any) -> fx.Node:
    copy = graph.call_function(COPY, (source,))
    copy.meta = {key: source.meta[key] for key in ("val", "custom") if key in source.meta}
    return copy


def constants_apart(program: ExportedProgram) -> tuple[ExportedProgram, Mapping[int, Any]]:
    """The program without those outputs that the export made constants, such as None, and these by place: Torch-
    TensorRT takes every output for a tensor. A program without such outputs comes back as it is."""
    output = program.graph.output_node()
    given: tuple[Any, ...] = tuple(output.args[0])
    behind = sum(spec.kind != OutputKind.USER_OUTPUT for spec in program.graph_signature.output_specs)
    constants = {place - behind: value for place, value in enumerate(given) if not isinstance(value, fx.Node)}
    if not constants or len(constants) == len(given):
        return program, {}
    output.args = (tuple(value for value in given if isinstance(value, fx.Node)),)
    kept = [
        s for s, value in zip(program.graph_signature.output_specs, given, strict=True) if isinstance(value, fx.Node)
    ]
    calls = list(program.module_call_graph)
    assert calls[0].signature is not None
    flat = pytree.tree_structure((0,) * (len(kept) - behind))
    user = [spec.arg for spec in kept if spec.kind == OutputKind.USER_OUTPUT]
    calls[0] = replace(calls[0], signature=replace(calls[0].signature, out_spec=flat, outputs=user))
    program.graph_module.recompile()
    made = ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=replace(program.graph_signature, output_specs=kept),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=calls,
        constants=program.constants,
        verifiers=program.verifiers,
    )
    return made, constants
