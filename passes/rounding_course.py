"""The order in which nodes go back to fp32 as less noise is allowed. It is found once and answers for every budget.

An edge is active (its reader sees a rounded tensor) while the reader, the maker or a mover between them is low. The
noise of a plan is the sum over its active edges. The edge with the most noise goes first, and all nodes that round it
are raised to fp32: raising the reader alone does nothing while the maker still writes rounded values.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from calibcast.passes.rounding_evidence import MeasuredEdge

# A plan is made for half the noise amplitude that the budget allows, where one edge makes most of the noise ..
MARGIN = 0.5
# .. and for this much where many edges share the noise: their sum is predicted well, to half a decibel in the median.
CLOSE = 1.0
# An edge that makes at least this share of the noise counts as that one edge.
BLAMED_SHARE = 0.3
NEVER = 0.0  # the threshold of a node that no allowance raises
ALWAYS = math.inf  # the threshold of a node that is high whatever rounding costs
# An edge that makes more than this share of the noise breaks first on other data. It goes, too, where that is cheap ..
OUTLIER_SHARE = 0.5
# .. (its nodes write at most this share of the bytes that low nodes write) ..
OUTLIER_BYTES = 0.015
# .. and where it would pass the allowance if it grew tenfold in amplitude, which is this much in power.
OUTLIER_REACH = 100.0
# From the first edge that makes less than this share of its own noise plus that of all smaller edges, none is to blame.
CROWD_SHARE = 0.1
# Raising such edges (the crowd) is not worth more than this share of the bytes that low nodes write ..
CROWD_BYTES = 0.05
# .. unless that lowers the noise, in dB, by more than this many times what average nodes of as many bytes would.
CROWD_GAIN = 3.0


@dataclass(frozen=True, slots=True)
class Step:
    """One edge that goes, and the nodes that are raised for it.

    noise: of the plan before this step, at the worst output. allowance: the step is taken where less noise is allowed.
    moved: bytes that the raised nodes write.
    """

    edge: MeasuredEdge
    nodes: tuple[str, ...]
    noise: float
    allowance: float
    moved: int


@dataclass(frozen=True)
class Course:
    """All steps, and for each node its threshold: the allowance below which it is high.

    thresholds: `NEVER` for a node that no step raises, `ALWAYS` for one that another rule keeps high. steps_of: which
    step raises a node. follows: for a node that only moves data, the reader that it goes with. crowd: the allowance at
    which the steps without an edge to blame begin. spread: the allowance below which these steps cost more bytes than
    they are worth; the plan then stays at `crowd`. chosen: the nodes that are high, whatever their thresholds, beside
    those of `ALWAYS`; None where thresholds decide.
    """

    edges: tuple[MeasuredEdge, ...] = field(repr=False)
    steps: tuple[Step, ...] = field(repr=False)
    thresholds: Mapping[str, float] = field(repr=False)
    steps_of: Mapping[str, int] = field(repr=False)
    follows: Mapping[str, str] = field(repr=False)
    spread: float = 0.0
    crowd: float = 0.0
    chosen: frozenset[str] | None = None

    def choosing(self, high: Collection[str], follows: Mapping[str, str]) -> Course:
        """The same with exactly these nodes high, of those that rounding decides. follows: as above, for these."""
        return replace(self, chosen=frozenset(high), follows=follows, spread=0.0)

    def allowed(self, noise: float) -> float:
        """The allowance that is used when `noise` is asked for."""
        return self.crowd if noise < self.spread else noise

    def is_high(self, node: str, noise: float) -> bool:
        """Whether `node` is high when the plan may make as much noise as that."""
        if self.chosen is not None:
            return node in self.chosen or self.thresholds.get(node, ALWAYS) == ALWAYS
        return self.allowed(noise) < self.thresholds.get(node, ALWAYS)

    def active(self, high: Collection[str]) -> list[MeasuredEdge]:
        """The edges that are rounded when, of all decided nodes, exactly these are high."""
        low = self.thresholds.keys() - set(high)
        return [edge for edge in self.edges if not low.isdisjoint(edge.nodes)]


def noise_of(edges: Iterable[MeasuredEdge]) -> float:
    """The sum of their noise, at the worst output."""
    return max(summed([edge.noise for edge in edges]), default=0.0)


def summed(noises: Sequence[tuple[float, ...]]) -> list[float]:
    """The sums by output. A noise that is one number, as its outputs were not told apart, counts at each output."""
    width = max(map(len, noises), default=0)
    columns = zip(*(noise if len(noise) == width else noise * width for noise in noises if noise), strict=True)
    return [math.fsum(column) for column in columns]


def course_of(
    edges: Sequence[MeasuredEdge],
    decided: Mapping[str, bool],
    pinned: Collection[str],
    ties: Iterable[Collection[str]],
    sizes: Mapping[str, int],
) -> Course:
    """The course that begins with all nodes low that no other rule keeps high.

    Args:
        edges: of the program. decided: for each node that a plan may type, whether it is low at the beginning.
        pinned: low nodes that stay low: the user's include list.
        ties: nodes that share one type, whether low or not.
        sizes: bytes that each node writes; 0 for nodes that only move data.
    """
    groups = [frozenset(tie) for tie in ties]
    raising = _Raising(edges, decided, frozenset(pinned), groups)
    taken = list(raising.run())
    steps = _with_allowances(taken, sizes, [name for name, low in decided.items() if low])
    thresholds = {name: NEVER if low else ALWAYS for name, low in decided.items()}
    steps_of = {name: i for i, step in enumerate(steps) for name in step.nodes}
    thresholds.update({name: steps[i].allowance for name, i in steps_of.items()})
    tied = frozenset().union(*groups)
    follows = _let_movers_follow(edges, thresholds, tied | frozenset(pinned))
    spread, crowd = _spread(edges, decided, steps, sizes)
    return Course(tuple(edges), tuple(steps), thresholds, steps_of, follows, spread, crowd)


class _Raising:
    """Removes the largest active edge, again and again. A step visits only the edges of the nodes that it raises."""

    def __init__(
        self,
        edges: Sequence[MeasuredEdge],
        decided: Mapping[str, bool],
        pinned: frozenset[str],
        ties: list[frozenset[str]],
    ) -> None:
        self._edges, self._pinned = edges, pinned
        self._low = {name for name, low in decided.items() if low}
        self._rounders = [[n for n in edge.nodes if n in self._low] for edge in edges]
        self._counts = [len(nodes) for nodes in self._rounders]
        self._edges_of: dict[str, list[int]] = {}
        for i, nodes in enumerate(self._rounders):
            for name in nodes:
                self._edges_of.setdefault(name, []).append(i)
        self._tie_of = {name: tie for tie in ties for name in tie}
        # Equal noises go by position, so that a plan is the same each time.
        self._heap = [(-e.weight, i) for i, e in enumerate(edges) if self._counts[i] and e.weight > 0]
        heapq.heapify(self._heap)

    def run(self) -> Iterable[tuple[MeasuredEdge, tuple[str, ...], list[MeasuredEdge]]]:
        """Each edge, the nodes raised for it, and the edges that are no longer active then."""
        while self._heap:
            _, i = heapq.heappop(self._heap)
            nodes = self._closed([n for n in self._rounders[i] if n in self._low]) if self._counts[i] else ()
            if nodes and self._pinned.isdisjoint(nodes):
                yield self._edges[i], nodes, [edge for name in nodes for edge in self._raise(name)]

    def _raise(self, name: str) -> Iterable[MeasuredEdge]:
        self._low.discard(name)
        for i in self._edges_of.get(name, ()):
            self._counts[i] -= 1
            if not self._counts[i]:
                yield self._edges[i]

    def _closed(self, nodes: list[str]) -> tuple[str, ...]:
        """`nodes` and the low nodes that are tied to them."""
        found = dict.fromkeys(nodes)
        for name in nodes:
            found.update(dict.fromkeys(n for n in sorted(self._tie_of.get(name, ())) if n in self._low))
        return tuple(found)


def _with_allowances(
    taken: Sequence[tuple[MeasuredEdge, tuple[str, ...], list[MeasuredEdge]]],
    sizes: Mapping[str, int],
    low: Sequence[str],
) -> list[Step]:
    """The steps with the noise before each. It is summed from the last step on: subtracting from a large sum would
    lose digits.

    Edges that stay active for the user's include list do not count: no other node is raised to make up for them.
    """
    noise: list[float] = []
    before: list[float] = []
    for _, _, gone in reversed(taken):
        noise = summed([tuple(noise), *(edge.noise for edge in gone)])
        before.append(max(noise, default=0.0))
    whole = sum(sizes.get(name, 0) for name in low)
    steps: list[Step] = []
    reach = math.inf  # the allowance below which the previous step is taken
    for (edge, nodes, _), now in zip(taken, reversed(before), strict=True):
        moved = sum(sizes.get(name, 0) for name in nodes)
        wanted = now if edge.weight >= BLAMED_SHARE * now else now * (MARGIN / CLOSE) ** 2
        if edge.weight > OUTLIER_SHARE * now and moved <= OUTLIER_BYTES * whole:
            wanted = max(wanted, OUTLIER_REACH * edge.weight)
        reach = min(wanted, reach)
        steps.append(Step(edge, nodes, now, reach, moved))
    return steps


def _let_movers_follow(
    edges: Sequence[MeasuredEdge], thresholds: dict[str, float], fixed: frozenset[str]
) -> dict[str, str]:
    """Raise nodes that only move data from high makers to a high reader. If low, they would cost two casts and gain
    nothing. Returns the reader that each of them goes with.
    """
    makers: dict[str, list[float]] = {}
    readers: dict[str, list[tuple[float, str]]] = {}
    for measured in edges:
        edge = measured.edge
        for mover in edge.movers:
            if mover in thresholds and mover not in fixed:
                makers.setdefault(mover, []).append(thresholds.get(edge.input, ALWAYS))
                readers.setdefault(mover, []).append((thresholds.get(edge.node, NEVER), edge.node))
    follows: dict[str, str] = {}
    for mover, reached in readers.items():
        least, reader = max(reached, key=lambda item: item[0])
        raised = min(least, *makers[mover])
        if raised > thresholds[mover]:
            thresholds[mover], follows[mover] = raised, reader
    return follows


def _spread(
    edges: Sequence[MeasuredEdge], decided: Mapping[str, bool], steps: Sequence[Step], sizes: Mapping[str, int]
) -> tuple[float, float]:
    """`spread` and `crowd` of a course; (0, 0) where the noise is not spread."""
    low = {name for name, is_low in decided.items() if is_low}
    active = sorted((e.weight for e in edges if not low.isdisjoint(e.nodes) and e.weight > 0), reverse=True)
    most = _crowd_weight(active)
    crowd = [step for step in steps if step.edge.weight <= most]
    whole, moved = sum(sizes.get(name, 0) for name in low), 0
    for step, left in zip(crowd, [*(step.noise for step in crowd[1:]), 0.0], strict=False):
        moved += step.moved
        part = moved / whole if whole else 0.0
        if CROWD_BYTES < part < 1 and left > crowd[0].noise * (1 - part) ** CROWD_GAIN:
            return step.allowance, crowd[0].allowance
    return 0.0, 0.0


def _crowd_weight(weights: Sequence[float]) -> float:
    """The largest weight that is below `CROWD_SHARE` of the sum of itself and all smaller ones; 0 if there is none."""
    tail, tails = 0.0, []
    for weight in reversed(weights):
        tail += weight
        tails.append(tail)
    for weight, rest in zip(weights, reversed(tails), strict=True):
        if weight < CROWD_SHARE * rest:
            return weight
    return 0.0
