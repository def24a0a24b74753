"""Where a multiplication by a power of two may be put in: behind an input, and where a sum grows far above its start.

In a growing sum only the sum reads the product. Other readers of that tensor, such as a norm, get it as it is, so that
they lose no digits. The multiplication costs little, as the kernel that adds can do it, too."""

from __future__ import annotations

from collections import defaultdict

from calibcast.calib.aliasing import storage_roots, written_arguments
from calibcast.calib.graph import base_op, input_kinds
from calibcast.calib.operators import ADDS, CONVERTS, MOVES
from calibcast.passes.rescaling.measures import Measures
from calibcast.passes.rescaling.system import Breaks, Solutions, Tensor
from torch import fx

# How much a sum may grow before its next part has a factor of its own: half of the bits of float16's exponent.
_GROWTH = 2.0**8
MOST_BREAKS = 16


def input_breaks(measures: Measures, limit: float) -> Breaks:
    """Inputs of the program above `limit`."""
    kinds = input_kinds(measures.program)
    rows = {node: row for (node, output), row in measures.rows.items() if kinds.get(node) == "input"}
    found = [node for node, row in rows.items() if measures.absmax[row] > limit]
    allowed, nodes = _free_standing(measures), _nodes(measures)
    names = [name for name in found if name in allowed][:MOST_BREAKS]
    return {name: frozenset(user.name for user in nodes[name].users) for name in names}


def segment_breaks(measures: Measures, solutions: Solutions, limit: float) -> Breaks:
    """The places before each growth by 2^8 since the last such place, among tensors that share an exponent.

    Branches, that is, nodes that only sums read, are left out: they are stored like the sum that they go into.
    """
    nodes = _nodes(measures)
    classes: dict[object, list[tuple[str, float]]] = defaultdict(list)
    order = {name: place for place, name in enumerate(nodes)}
    trunk = {n.name for n in nodes.values() if n.op == "call_function" and base_op(n.target) not in MOVES | CONVERTS}
    trunk -= measures.summed
    trunk |= {name for name, kind in input_kinds(measures.program).items() if kind == "input"}
    for kind, form in zip(solutions.system.kinds, solutions.forms, strict=True):
        row = measures.rows.get((kind.node, kind.output)) if isinstance(kind, Tensor) else None
        if row is not None and isinstance(kind, Tensor) and kind.node in trunk and measures.absmax[row] > 0:
            classes[form].append((kind.node, float(measures.absmax[row])))
    allowed, found = _free_standing(measures), list[str]()
    for members in classes.values():
        if max(peak for _, peak in members) > limit:
            members.sort(key=lambda member: order[member[0]])
            found.extend(name for name in _before_growth(members) if name in allowed)
    return {name: _sums_of(nodes[name]) for name in found[:MOST_BREAKS]}


def _sums_of(node: fx.Node) -> frozenset[str]:
    """The sums among its readers; all readers where there is none."""
    sums = frozenset(user.name for user in node.users if base_op(user.target) in ADDS)
    return sums or frozenset(user.name for user in node.users)


def _nodes(measures: Measures) -> dict[str, fx.Node]:
    return {n.name: n for n in measures.program.graph.nodes}


def _before_growth(members: list[tuple[str, float]]) -> list[str]:
    """The last tensor of each stretch, in order. Within a stretch no tensor is over 2^8 times an earlier one."""
    found, (last, since) = list[str](), members[0]
    for name, peak in members[1:]:
        if peak > _GROWTH * since:
            found.append(last)
            since = peak
        last, since = name, min(since, peak)
    return found


def _free_standing(measures: Measures) -> frozenset[str]:
    """Nodes whose storage nothing writes into, and that are not results of the program."""
    graph_module = measures.program.graph_module
    roots = storage_roots(graph_module)
    written = {root for n in graph_module.graph.nodes for a in written_arguments(n) for root in roots[a]}
    return frozenset(n.name for n in graph_module.graph.nodes if not roots[n] & written and not _leaves(n))


def _leaves(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)
