"""Flatten `torch.no_grad` regions: they have no effect in inference, and would hide their nodes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from operator import getitem
from typing import Any

from calibcast.calib.graph import GRAD_REGION, child_of
from torch import fx

# The qualified name of an inlined node, under which calibration measured it.
_NAME = "calibcast_name"


def flatten(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The graph with `torch.no_grad` regions inlined: they have no effect in inference, and would hide their nodes.

    The caller's graph is not changed; a graph without such regions is returned as it is. Inlined nodes keep their
    qualified name, which `qualified_name` reads.
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


def without_qualified_name(node: fx.Node) -> None:
    """Remove the qualified name of an inlined node, so that a new program knows the node by its own name."""
    node.meta.pop(_NAME, None)


def _inline(source: fx.GraphModule, prefix: str, graph: fx.Graph, values: dict[fx.Node, Any]) -> Any:
    """Copy the nodes of `source` into `graph`; `values` maps its nodes to their values in `graph`."""
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


def inlined_name(name: str) -> str:
    """What a node with this qualified name is called where its region is inlined: `__` replaces the dots, to make it
    unlike the program's own names."""
    return name.replace(".", "__")


def _copy(node: fx.Node, prefix: str, graph: fx.Graph, values: Mapping[fx.Node, Any]) -> fx.Node:
    made = graph.node_copy(node, lambda n: values[n])
    made.meta = copy.copy(node.meta)
    made.meta[_NAME] = prefix + node.name
    # fx renames a copy whose name is a builtin (`input` becomes `input_1`) or already used. Here a name identifies its
    # node, so it is set again.
    made.name = inlined_name(prefix + node.name)
    made.target = prefix + str(node.target) if node.op == "get_attr" else node.target
    return made
