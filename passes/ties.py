"""Nodes that must share one type, for one of three reasons.

- An in-place op writes into storage that more than one of them sees.
- They carry a mask's sentinel to a comparison of masks with masks. A cast on the way to one side alone would change the
  sentinel on that side.
- They carry one tensor to both sides of a difference or a comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import getitem

from calibcast.calib.aliasing import Roots, picks_fresh, shared_arguments, written_arguments
from calibcast.calib.graph import base_op, tensor_values
from calibcast.calib.operators import operator_of
from calibcast.calib.operators.operator import STEP
from calibcast.calib.sentinels import compared_chains
from calibcast.calib.twins import commutes_with_rounding, compares, selects
from calibcast.passes.regions import Candidate
from calibcast.passes.verdict import LOW, Verdict
from torch import fx


@dataclass(frozen=True)
class Tie:
    """Nodes that run in one type. `pinned` says why they keep their exported type, if they must.

    rule, why: of the verdict on nodes that stay because another node stays: its rule, and its reason up to the name of
    that other node.
    """

    nodes: frozenset[fx.Node]
    pinned: str | None
    rule: str = "alias"
    why: str = "it shares storage, written in place, with"


NamedTie = tuple[Tie, list[str]]


def ties_of(graph_module: fx.GraphModule) -> list[Tie]:
    """All ties of a graph. No node is in two ties: ties that share a node are merged."""
    ties: list[Tie] = []
    for tie in (*_written_together(graph_module), *_compared_together(graph_module), *_twins(graph_module)):
        meeting = [other for other in ties if other.nodes & tie.nodes]
        ties = [other for other in ties if not other.nodes & tie.nodes]
        pinned = next((one.pinned for one in (*meeting, tie) if one.pinned is not None), None)
        first = next(iter(meeting), tie)
        ties.append(Tie(tie.nodes.union(*(one.nodes for one in meeting)), pinned, first.rule, first.why))
    return ties


def _twins(graph_module: fx.GraphModule) -> list[Tie]:
    """Differences and comparisons of a tensor with itself, where a side is moved, picked or loses its fraction.

    If only one side is rounded to the low type, `p[None] > p[:, None]` says that an element is above itself,
    `m >= topk(m)` loses the smallest of the k, and `x - floor(x)` leaves [0, 1).
    """
    why = "it leads to a difference or comparison of a tensor with itself, together with"
    found = []
    for node in graph_module.graph.nodes:
        subtracts = node.op == "call_function" and operator_of(base_op(node.target)).subtracts
        sides = [n for n in node.args[:2] if isinstance(n, fx.Node)] if subtracts or compares(node) else []
        if len(sides) == 2:
            (first, one), (second, other) = (_followed(side, picked=not subtracts) for side in sides)
            if first is second and one ^ other:
                found.append(Tie(frozenset({node} | (one ^ other)), None, "storage", why))
    return found


def _followed(node: fx.Node, picked: bool) -> tuple[fx.Node, set[fx.Node]]:
    """The tensor before it was moved, picked from or stepped (as by `floor`), and the nodes that did that.

    picked: also past nodes that pick elements by their order. Their errors are measured apart where a difference reads
    them, so only a comparison needs them together.
    """
    passed: set[fx.Node] = set()
    last = node
    while node.op == "call_function" and not written_arguments(node):
        passes = commutes_with_rounding(node) and (picked or not selects(node))
        read = [n for n in node.all_input_nodes if _has_floats(n)]
        if len(read) != 1 or not (passes or operator_of(base_op(node.target)).error == STEP):
            break
        passed.add(node)
        last, node = node, read[0]
    if last.target is getitem and len(tensor_values(node)) > 1:  # one of several tensors, which are not each other
        return last, passed - {last}
    return node, passed


def _has_floats(node: fx.Node) -> bool:
    return any(value.dtype.is_floating_point for _, value in tensor_values(node))


def _compared_together(graph_module: fx.GraphModule) -> list[Tie]:
    why = "it takes a mask's sentinel to a comparison, together with"
    return [Tie(frozenset(chain), None, "mask", why) for chain in compared_chains(graph_module)]


def _written_together(graph_module: fx.GraphModule) -> list[Tie]:
    """The classes of nodes whose storage a visible write touches.

    A write that nobody else can see (`relu_(conv(x))`, where the convolution is not read again) ties nothing: its
    output counts as storage of its own, and its input may be cast to a copy first.
    """
    if not any(written_arguments(node) for node in graph_module.graph.nodes):
        return []
    order = {node: position for position, node in enumerate(graph_module.graph.nodes)}
    roots: Roots = {}
    sharing: dict[fx.Node, set[fx.Node]] = {}  # root -> the nodes that share its storage so far
    written: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        targets = frozenset().union(*(roots[n] for n in written_arguments(node)))
        visible = bool(targets) and _is_visible(node, targets, sharing, order)
        shared = shared_arguments(node)
        if targets and not visible:
            shared = [n for n in shared if not roots[n] & targets]
        roots[node] = frozenset().union(*(roots[n] for n in shared)) if shared else frozenset([node])
        for root in roots[node]:
            sharing.setdefault(root, set()).add(node)
        if visible:
            written |= targets
            for root in targets:  # a writer without a result belongs to the class, too
                sharing[root].add(node)
    return _classes(written, roots, sharing)


def named_ties(nodes: Sequence[Candidate]) -> list[NamedTie]:
    """Each tie with the names of the nodes that it holds together."""
    names = {candidate.node: candidate.name for candidate in nodes if not candidate.inside}
    owner = next((candidate.node.graph.owning_module for candidate in nodes if not candidate.inside), None)
    ties = [] if owner is None else ties_of(owner)
    return [(tie, [names[n] for n in names if n in tie.nodes and n.target is not getitem]) for tie in ties]


def forced_by_ties(
    ties: Sequence[NamedTie], precisions: Mapping[str, str], forced: Mapping[str, Verdict]
) -> dict[str, Verdict]:
    """The verdicts on nodes that are low and tied to one that is not. precisions: of the decided nodes, by name.

    forced: verdicts that were found before, which are not returned again.
    """
    more: dict[str, Verdict] = {}
    for tie, members in ties:
        other = next((name for name in members if precisions.get(name) != LOW), None)
        if tie.pinned is None and other is None:
            continue
        stays = "is high" if other in precisions else "keeps its type"
        reason = tie.pinned or f"{tie.why} {other}, which {stays}"
        for name in members:
            if precisions.get(name) == LOW and name not in forced:
                more[name] = Verdict(tie.rule, reason)
    return more


def _is_visible(
    writer: fx.Node, targets: frozenset[fx.Node], sharing: dict[fx.Node, set[fx.Node]], order: dict[fx.Node, int]
) -> bool:
    """Whether anything but the writer's own output shows the write: an input, a buffer, a base or view read later."""
    if any(root.op in {"placeholder", "get_attr"} for root in targets):
        return True
    members = set().union(*(sharing[root] for root in targets))
    return any(order[user] > order[writer] for member in members for user in member.users)


def _classes(written: set[fx.Node], roots: Roots, sharing: dict[fx.Node, set[fx.Node]]) -> list[Tie]:
    """The classes of written storage. Classes that have a node in common are merged."""
    ties: list[set[fx.Node]] = []
    for root in written:
        group = set(sharing[root])
        for member in list(group):
            for other in roots[member]:
                group |= sharing[other]
        # Several fresh outputs of a node each have storage of their own, but their types come from that one node.
        group |= {member.all_input_nodes[0] for member in group if picks_fresh(member)}
        touching = [tie for tie in ties if tie & group]
        ties = [tie for tie in ties if not tie & group]
        ties.append(group.union(*touching))
    return [Tie(frozenset(group), _pinned(group)) for group in ties]


def _pinned(group: set[fx.Node]) -> str | None:
    outside = sorted(node.name for node in group if node.op in {"placeholder", "get_attr"})
    return f"an in-place op writes into {outside[0]}, which keeps its type" if outside else None
