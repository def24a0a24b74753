"""The smallest part of a program that has to stay in PyTorch so that the rest becomes a correct engine, by bisection.

This is the last remedy, because a builder does not always name what it fails at, and precision is not always the cause.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from calibcast.calib.graph import base_op, module_path, where
from calibcast.engines.tensorrt.builder.isolation import CONVERTING, BuilderError
from torch import fx
from torch.export import ExportedProgram

# Two searches of six halvings each: they can tell apart parts that are a 64th of the program.
MOST_BUILDS = 12
_PARTS = 64


def unconverted(failure: BuilderError, program: ExportedProgram, left_out: Collection[str]) -> list[fx.Node]:
    """The nodes to leave in PyTorch when a converter fails, besides those `left_out` already; empty when none is named.

    At first this is the node that the converter fails at. When a second node of that operator fails, it is all nodes of
    that operator.
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
    """All allowed builds have been made."""


def computing_nodes(program: ExportedProgram) -> list[fx.Node]:
    """The nodes that could be in an engine, in the order in which they run."""
    return [node for node in program.graph.nodes if node.op == "call_function"]


def smallest_region(
    count: int, helps: Callable[[int, int], bool], most: int = MOST_BUILDS
) -> tuple[tuple[int, int] | None, int]:
    """The shortest stretch of `count` nodes found such that, with it in PyTorch, the rest builds and is right; and the
    number of builds.

    helps: whether it helps to keep the nodes [start, end) in PyTorch. It is asked at most `most` times. Keeping all
    nodes there is known to help. The search looks for the earliest end that helps, then for the latest start. None if
    no shorter stretch than all nodes was found.
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
    """The first place that helps. If a place helps, all places after it do too, and the last one is known to help."""
    fails, works = -1, len(places) - 1
    while works - fails > 1:
        middle = (fails + works) // 2
        if helps(places[middle]):
            works = middle
        else:
            fails = middle
    return places[works]


def described(nodes: Sequence[fx.Node]) -> str:
    """A stretch of nodes as text for users: how many, the first and the last, and their modules."""
    modules = list(dict.fromkeys(path for node in nodes if (path := module_path(node))))
    inside = f", in {', '.join(modules[:3])}{' and more' if len(modules) > 3 else ''}" if modules else ""
    if len(nodes) == 1:
        return where(nodes[0])
    return f"the {len(nodes)} nodes from {nodes[0].name} to {nodes[-1].name}{inside}"
