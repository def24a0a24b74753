"""Which operators a builder fails at, where its failure names none: found by building again with some of them in
fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from calibcast.calib.graph import argument_of, base_op
from calibcast.calib.operators import CONVOLUTIONS
from calibcast.engines.tensorrt.builder.isolation import BUILDING, WRITING, BuilderError
from calibcast.engines.tensorrt.remedies import nodes_alike
from torch import fx
from torch.export import ExportedProgram

# Most builds of a search. Twelve operators, one of them to blame, take six builds.
MOST_BUILDS = 12


class _EnoughError(Exception):
    """All allowed builds have been made."""


def can_search(failure: BuilderError) -> bool:
    """Whether the cause of the failure may be an operator, and not the machine."""
    return failure.kind in {"context", "wrong"} or (
        failure.kind in {"crash", "refused"} and failure.stage in {BUILDING, WRITING}
    )


def operator_groups(program: ExportedProgram) -> list[tuple[str, ...]]:
    """Names of the nodes that can be kept in fp32, by operator, the rarest first: the search prefers the first groups.

    Grouped convolutions are a group of their own, because they have kernels of their own.
    """
    return sorted(nodes_alike(program, _operator), key=len)


def _operator(node: fx.Node) -> tuple[str, bool]:
    base = base_op(node.target)
    groups = argument_of(node, "groups") if base in CONVOLUTIONS else 1
    return base, isinstance(groups, int) and groups > 1


def smallest_choice(
    groups: Sequence[tuple[str, ...]], helps: Callable[[tuple[str, ...]], bool], most: int = MOST_BUILDS
) -> tuple[str, ...] | None:
    """The fewest nodes found that, kept in fp32, make the build succeed; None if not even all of them do.

    helps: whether a build succeeds with these nodes in fp32. It is asked at most `most` times. Without any nodes in
    fp32 the build is known to fail. The search finds one necessary group after another, each by halving the candidates.
    """
    asked: dict[frozenset[int], bool] = {frozenset(): False}

    def names(chosen: frozenset[int]) -> tuple[str, ...]:
        return tuple(name for i in sorted(chosen) for name in groups[i])

    def ask(chosen: Sequence[int]) -> bool:
        key = frozenset(chosen)
        if key not in asked:
            if len(asked) > most:
                raise _EnoughError
            asked[key] = helps(names(key))
        return asked[key]

    try:
        if ask(range(len(groups))):
            _halve(list(range(len(groups))), ask)
    except _EnoughError:
        pass
    return min((names(chosen) for chosen, helped in asked.items() if helped), key=len, default=None)


def _halve(candidates: list[int], ask: Callable[[Sequence[int]], bool]) -> None:
    """Ask until the fewest candidates that help are known. All `candidates` together help; none at all does not."""
    found: list[int] = []
    while not ask(found):
        fails, helps = 0, len(candidates)
        while helps - fails > 1:
            middle = (fails + helps) // 2
            if ask(found + candidates[:middle]):
                helps = middle
            else:
                fails = middle
        found.append(candidates[helps - 1])
        candidates = candidates[: helps - 1]
