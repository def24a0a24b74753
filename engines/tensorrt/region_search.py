"""The smallest part of a program that has to stay in PyTorch for the rest to become a right engine, found by bisecting.

The last remedy: what a builder fails at is not always named, and not always a matter of precision.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from calibcast.calib.graph import base_op, module_path, where
from calibcast.engines.tensorrt.builder.isolation import CONVERTING, BuilderError
from torch import fx
from torch.export import ExportedProgram

# Two searches of so many halvings: the parts that are told apart are a 64th of the program.
MOST_BUILDS = 12
_PARTS = 64


def unconverted(failure: BuilderError, program: ExportedProgram, left_out: Collection[str]) -> list[fx.Node]:
    """The nodes to leave in PyTorch when a converter fails, besides those `left_out` already; empty when none is named.

    First the node that it fails at; when it fails at a second one of that operator, all of them.
    """
    nodes = computing_nodes(program)
    named = [node for node in nodes if node.name == failure.node and failure.stage == CONVERTING]
    if not named or failure.node in left_out or failure.kind in {"memory", "hang"}:
        return []
    operator = base_op(named[0].target)
    if operator in {base_op(node.target) for node in nodes if node.name in left_out}:
        return [node for node in nodes if base_op(node.target) == operator and node.name not in left_out]
    return named


class _EnoughError(Exception):
    """As many builds as are allowed."""


def computing_nodes(program: ExportedProgram) -> list[fx.Node]:
    """The nodes that could be in an engine, in the order in which they run."""
    return [node for node in program.graph.nodes if node.op == "call_function"]


def smallest_region(
    count: int, helps: Callable[[int, int], bool], most: int = MOST_BUILDS
) -> tuple[tuple[int, int] | None, int]:
    """The shortest stretch of `count` nodes found that, in PyTorch, makes the rest build and be right; and the builds.

    helps: whether the nodes from the first place up to the second one do, asked at most `most` times; all of them are
    known to. It looks for the earliest end that helps, then for the latest start. None if nothing but all helps.
    """
    cuts = sorted({round(part * count / _PARTS) for part in range(_PARTS + 1)})
    best: tuple[int, int] | None = None
    asked = 0

    def ask(start: int, end: int) -> bool:
        nonlocal asked, best
        if asked == most:
            raise _EnoughError
        asked += 1
        if not helps(start, end):
            return False
        best = start, end
        return True

    try:
        end = _least(cuts[1:], lambda end: ask(0, end))
        _least([cut for cut in reversed(cuts) if cut < end], lambda start: ask(start, end))
    except _EnoughError:
        pass
    return best, asked


def _least(places: Sequence[int], helps: Callable[[int], bool]) -> int:
    """The first place that helps, of some of which those behind one that helps do too, and the last is known to."""
    fails, works = -1, len(places) - 1
    while works - fails > 1:
        middle = (fails + works) // 2
        if helps(places[middle]):
            works = middle
        else:
            fails = middle
    return places[works]


def described(nodes: Sequence[fx.Node]) -> str:
    """A stretch of nodes for people: how many, from where to where, and in which modules."""
    modules = list(dict.fromkeys(path for node in nodes if (path := module_path(node))))
    inside = f", in {', '.join(modules[:3])}{' and more' if len(modules) > 3 else ''}" if modules else ""
    if len(nodes) == 1:
        return where(nodes[0])
    return f"the {len(nodes)} nodes from {nodes[0].name} to {nodes[-1].name}{inside}"
