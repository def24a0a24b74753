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
                with graph.inserting_before(node):
                    new = graph.call_function(AHEAD, (new, 0))
                value = value.unsqueeze(0)
                new.meta = {"val": value, **{k: v for k, v in node.meta.items() if k == "custom"}}
            node.target, node.args = PUT_ALONG, (cache, len(before), places, new)


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
