"""Keeping chosen nodes of a cast graph in fp32 after all: casts around each, nothing else changed."""

from __future__ import annotations

from collections.abc import Collection
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from calib.errors import BuildError
from calib.graph import base_op, dtype_name, tensor_values
from engines.program_device import copied
from passes.cast_insertion import CAST

_LOW = {torch.float16, torch.bfloat16}


def widened(program: ExportedProgram, names: Collection[str]) -> ExportedProgram:
    """A copy of `program` in which the nodes `names` compute in fp32 and give their results in the types they had.

    Weights stay as they are stored. Raises BuildError for a node that gives several tensors or states a type itself.
    """
    result = copied(program)
    for node in list(result.graph.nodes):
        if node.op == "call_function" and node.name in names:
            _widen(node, result.graph)
    result.graph.lint()
    result.graph_module.recompile()
    return result


def _widen(node: fx.Node, graph: fx.Graph) -> None:
    values = tensor_values(node)
    stated = any(isinstance(a, torch.dtype) for a in [*node.args, *node.kwargs.values()])
    if len(values) != 1 or not isinstance(node.meta.get("val"), torch.Tensor) or stated:
        raise BuildError(f"node {node.name} cannot be kept in fp32 afterwards: leave it out of the plan instead")
    before = values[0][1].dtype
    with graph.inserting_before(node):
        for source in list(node.all_input_nodes):
            if any(value.dtype in _LOW for _, value in tensor_values(source)):
                node.replace_input_with(source, _cast(graph, source, torch.float32))
    if before not in _LOW:
        return
    node.meta = {**node.meta, "val": node.meta["val"].to(torch.float32)}
    readers = list(node.users)
    with graph.inserting_after(node):
        back = _cast(graph, node, before)
    for reader in readers:
        reader.replace_input_with(node, back)


def _cast(graph: fx.Graph, source: fx.Node, dtype: torch.dtype) -> fx.Node:
    cast = graph.call_function(CAST, (source,), {"dtype": dtype}, name=f"{source.name}_as_{dtype_name(dtype)}")
    kept: dict[str, Any] = {key: source.meta[key] for key in ("nn_module_stack", "stack_trace") if key in source.meta}
    cast.meta = {**kept, "val": source.meta["val"].to(dtype)}
    return cast


def restated(program: ExportedProgram) -> ExportedProgram:
    """`program` with the type of what its converter widens said once more behind it; itself where it has none.

    Torch-TensorRT's converters give fp32 of a half table of an embedding bag, and of a cumsum that states a half type
    (seen in 2.14), against the graph, and the next layer refuses. A cast to fp32 and back changes no value, and makes
    the low type true in TensorRT too.
    """
    names = [node.name for node in program.graph.nodes if _mistyped(node)]
    if not names:
        return program
    result = copied(program)
    for node in [node for node in result.graph.nodes if node.name in names]:
        for picked in _mistyped(node):
            readers = list(picked.users)
            with result.graph.inserting_after(picked):
                wide = _cast(result.graph, picked, torch.float32)
            with result.graph.inserting_after(wide):
                back = _cast(result.graph, wide, picked.meta["val"].dtype)
            for reader in readers:
                reader.replace_input_with(picked, back)
    result.graph.lint()
    result.graph_module.recompile()
    return result


def _mistyped(node: fx.Node) -> list[fx.Node]:
    """Of an embedding bag or a cumsum, its low outputs."""
    base = base_op(node.target) if node.op == "call_function" else ""
    if base == "cumsum":
        outputs = [node]
    elif base in {"embedding_bag", "_embedding_bag"}:
        outputs = [user for user in node.users if user.target is getitem]
    else:
        return []
    return [output for output in outputs if any(value.dtype in _LOW for _, value in tensor_values(output))]
