"""The smallest part of a program that has to stay in PyTorch for the rest to become a right engine, found by bisecting.

The last remedy: what a builder fails at is not always named, and not always a matter of precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from calibcast.calib.graph import module_path, where
from torch import fx
from torch.export import ExportedProgram

# Two searches of so many halvings: the parts that are told apart are a 64th of the program.
MOST_BUILDS = 12
_PARTS = 64


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
