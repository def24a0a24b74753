"""Flattening what can be seen through, and telling which nodes are not ours to type."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from calibcast.calib.graph import (
    AUTOCAST_REGION,
    GRAD_REGION,
    argument_of,
    base_op,
    child_of,
    is_measurable,
    op_name,
    tensor_values,
    walk,
)
from calibcast.passes import op_table
from calibcast.passes.verdict import Verdict
from torch import fx
from torch.export import ExportedProgram

# The qualified name of an inlined node, under which calibration measured it.
_NAME = "calibcast_name"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A `call_function` node that a plan has a row for. `inside`: in an autocast region.

    kept: why it is not ours to type, or None where it is.
    """

    name: str
    node: fx.Node
    inside: bool
    kept: Verdict | None


def flatten(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The graph with `torch.no_grad` regions inlined: in inference they mean nothing, and would hide their nodes.

    The caller's graph is not changed; one without such regions is returned itself. Inlined nodes keep their
    qualified name, read by `qualified_name`.
    """
    if not any(node.target is GRAD_REGION for node in graph_module.graph.nodes):
        return graph_module
    graph = fx.Graph()
    results = _inline(graph_module, "", graph, {})
    graph.output(results)
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    next(iter(reversed(graph.nodes))).meta = copy.copy(output.meta)
    flat = fx.GraphModule(graph_module, graph)
    flat.meta.update(graph_module.meta)
    return flat


def qualified_name(node: fx.Node) -> str:
    """The name under which calibration and plans know a node of a flattened graph."""
    return str(node.meta.get(_NAME, node.name))


def candidates(program: ExportedProgram) -> list[Candidate]:
    """The nodes that a plan decides on, in the order in which they run: of the flattened graph, and of autocast
    regions."""
    found: list[Candidate] = []
    for node in flatten(program.graph_module).graph.nodes:
        if node.op != "call_function":
            continue
        name = qualified_name(node)
        region = child_of(node)
        if region is not None:
            inside = walk(region[1], f"{region[0]}.")  # qualified already: `_copy` prefixes what `get_attr` names
            found.extend(Candidate(s.name, s.node, True, _INSIDE) for s in inside if s.node.op == "call_function")
        found.append(Candidate(name, node, False, _kept(node)))
    return found


_INSIDE = Verdict("autocast_region", "it is inside a torch.autocast region, which runs as the user wrote it")


def _kept(node: fx.Node) -> Verdict | None:
    return _kept_by_kind(node) or _kept_by_operator(node) or _kept_by_types(node)


def _kept_by_kind(node: fx.Node) -> Verdict | None:
    if node.target is getitem:
        return Verdict("getitem", "it only picks one of several outputs")
    if node.target is AUTOCAST_REGION:
        return Verdict("autocast_region", "a torch.autocast region runs as the user wrote it")
    if not isinstance(node.target, torch._ops.OpOverload):
        return Verdict("higher_order", f"{op_name(node.target)} is no tensor operator that can be typed")
    return None


def _kept_by_operator(node: fx.Node) -> Verdict | None:
    if base_op(node.target) == "_assert_tensor_metadata":
        return Verdict("assertion", "it only checks a type")
    if node.target in op_table.BITCASTS:
        return Verdict("bitcast", "it reads the bits of its input as another type")
    return None


def _kept_by_types(node: fx.Node) -> Verdict | None:
    # In order, as the first low type is named.
    types = dict.fromkeys(value.dtype for n in (node, *node.all_input_nodes) for _, value in tensor_values(n))
    if any(dtype.is_complex for dtype in types):
        return Verdict("complex", "it has a complex tensor")
    if torch.float64 in types:
        return Verdict("float64", "it has a float64 tensor, which the user asked for")
    if not any(is_measurable(dtype) for dtype in types):
        return Verdict("integer", "it has no floating-point tensor")
    if base_op(node.target) in op_table.STATED_TYPE and _states_type(node):
        return Verdict("stated_type", "the user's own conversion keeps the type that it states")
    low = [dtype for dtype in types if is_measurable(dtype) and dtype != torch.float32]
    if low:
        return Verdict("already_low", f"the program already has it in {str(low[0]).removeprefix('torch.')}")
    return None


def _states_type(node: fx.Node) -> bool:
    return isinstance(argument_of(node, "dtype"), torch.dtype)


def _inline(source: fx.GraphModule, prefix: str, graph: fx.Graph, values: dict[fx.Node, Any]) -> Any:
    """Copy the nodes of `source` into `graph`; `values` maps its nodes to what stands for them there."""
    for node in source.graph.nodes:
        if node in values:
            continue
        if node.op == "output":
            return fx.map_arg(node.args[0], lambda n: values[n])
        if node.target is GRAD_REGION:
            region = child_of(node)
            assert region is not None
            name, child = region
            holders = [n for n in child.graph.nodes if n.op == "placeholder"]
            bound: dict[fx.Node, Any] = dict(zip(holders, (values[n] for n in node.args[2:]), strict=True))
            values[node] = _inline(child, f"{prefix}{name}.", graph, bound)
        elif node.target is getitem and isinstance(values.get(node.args[0]), (tuple, list)):
            values[node] = values[node.args[0]][node.args[1]]
        elif node.op == "get_attr" and all(user.target is GRAD_REGION for user in node.users):
            values[node] = None
        else:
            values[node] = _copy(node, prefix, graph, values)
    return None


def _copy(node: fx.Node, prefix: str, graph: fx.Graph, values: Mapping[fx.Node, Any]) -> fx.Node:
    made = graph.node_copy(node, lambda n: values[n])
    made.meta = copy.copy(node.meta)
    made.meta[_NAME] = prefix + node.name
    # fx renames copies that look like builtins (`input` becomes `input_1`) or that it has seen; names are identity
    # here. A name with dots cannot be one of the program's own, so the underscored one is made unlike them.
    made.name = (prefix + node.name).replace(".", "__")
    made.target = prefix + str(node.target) if node.op == "get_attr" else node.target
    return made
