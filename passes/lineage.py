"""Which tensors each node reads, as rows `(qualified node name, output)`, through getitem, regions and writes."""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem

from calibcast.calib.aliasing import storage_roots, written_arguments
from calibcast.calib.graph import REGION_CHILD, child_of
from torch import fx

Row = tuple[str, int]
_Rows = tuple[Row, ...]


def readings(graph_module: fx.GraphModule) -> dict[str, tuple[Row, ...]]:
    """For each node, also inside regions: the tensors that it reads, by the nodes that made or last wrote them."""
    found: dict[str, _Rows] = {}
    _trace(graph_module, "", (), found)
    return found


def _trace(
    graph_module: fx.GraphModule, prefix: str, operands: Sequence[_Rows], found: dict[str, _Rows]
) -> list[_Rows]:
    """Record in `found` what the nodes of one graph read. Returns the rows of each result of the graph."""
    roots = storage_roots(graph_module)
    made: dict[fx.Node, list[_Rows]] = {}  # for each output of a node
    writers: dict[fx.Node, _Rows] = {}  # root of written storage -> who wrote into it so far
    outer = iter(operands)

    def read(argument: object) -> _Rows:
        if not isinstance(argument, fx.Node):
            return ()
        rows = [row for output in made[argument] for row in output]
        return tuple(dict.fromkeys([*rows, *(row for root in roots[argument] for row in writers.get(root, ()))]))

    for node in graph_module.graph.nodes:
        name = prefix + node.name
        region = child_of(node)
        if node.op == "output":
            return [read(result) for result in node.args[0]]
        if region is not None:
            inside = [read(argument) for argument in node.args[REGION_CHILD[node.target] + 1 :]]
            made[node] = _trace(region[1], f"{prefix}{region[0]}.", inside, found)
        elif node.op == "placeholder" and prefix:
            made[node] = [next(outer)]
        elif node.target is getitem:
            made[node] = [made[node.args[0]][node.args[1]]]
        else:
            found[name] = tuple(dict.fromkeys(row for argument in node.all_input_nodes for row in read(argument)))
            made[node] = [((name, position),) for position, _ in _positions(node)]
        for root in {root for argument in written_arguments(node) for root in roots[argument]}:
            writers[root] = (*writers.get(root, ()), *(row for output in made[node] for row in output))
    return []


def _positions(node: fx.Node) -> list[tuple[int, object]]:
    """All outputs of `node` with their positions. Those that are not tensors are included: getitem counts them."""
    value = node.meta.get("val")
    return list(enumerate(value)) if isinstance(value, (list, tuple)) else [(0, value)]
