"""Which nodes go low so that the noise of a budget pays for the most bytes and work: a knapsack, filled greedily.

A course raises the edge with the most noise first, which is right where few edges make it. Where hundreds are alike, a
small addition costs as much of the budget as a large convolution; what counts is the noise for what is gained.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from calibcast.calib.rounding_table import OUTPUT
from calibcast.passes.rounding_course import ALWAYS, NEVER, OUTLIER_BYTES, OUTLIER_REACH, OUTLIER_SHARE, Course, summed

# A mover that need not be high goes down where that makes no more than this share of the noise.
_HARDLY = 0.1
# A difference below this share of what it was taken from is computed anew.
_DIGITS = 1e-6
# What a plan is worth: mostly the bytes that are low, then the work; and the number of nodes, as each that is high may
# cost casts.
BYTES, WORK, NODES = 0.6, 0.3, 0.1


@dataclass(frozen=True)
class Packed:
    """The nodes that stay high, of those that rounding decides; for a mover among them, the node that it goes with.

    noise: that the table predicts. worth: of the low nodes.
    """

    high: frozenset[str]
    follows: Mapping[str, str] = field(repr=False)
    noise: float
    worth: float


class Packing:
    """Lets nodes back down, those first that gain the most bytes and work for their noise.

    Nodes that are tied go down together. A mover goes down unless it lies between high nodes.
    """

    def __init__(
        self, course: Course, ties: Iterable[Collection[str]], sizes: Mapping[str, int], work: Mapping[str, int]
    ) -> None:
        """sizes, work: of each node, in bytes and operations."""
        self._edges = course.edges
        self.free = frozenset(name for name, limit in course.thresholds.items() if NEVER < limit < ALWAYS)
        groups = [frozenset(tie) for tie in ties]
        tie_of = {name: tie & self.free for tie in groups for name in tie}
        between = {name for edge in self._edges for name in edge.edge.movers}
        self._movers = (between & self.free) - tie_of.keys()
        self._low = {name for name, limit in course.thresholds.items() if limit != ALWAYS} - self.free
        self.groups = sorted({tie_of.get(n, frozenset({n})) for n in self.free - self._movers}, key=min)
        self._group_of = {name: group for group in self.groups for name in group}
        self._worth = _shares(course.thresholds, sizes, work)
        self._edges_of: dict[str, list[int]] = {}
        for i, measured in enumerate(self._edges):
            for name in measured.nodes:
                self._edges_of.setdefault(name, []).append(i)

    def worth(self, names: Iterable[str]) -> float:
        """What it is worth to have these nodes low, as a share of having all that are decided low."""
        return sum(self._worth.get(name, 0.0) for name in names)

    def lowered(self, high: Collection[str], group: Collection[str]) -> Packed:
        """All of `high` but one group."""
        return self._packed(set(high) & self.free - set(group) - self._movers)

    def packed(self, high: Collection[str], limit: float) -> Packed:
        """As much of `high` low as `limit` pays for, a predicted noise."""
        left = (set(high) & self.free) - self._movers
        active = self._active(left)
        total: Sequence[float] = self._noise([i for i, is_active in enumerate(active) if is_active])
        costs = {g: self._noise([i for i in self._around(g) if not active[i]]) for g in self.groups if g <= left}
        heap = [(self._price(group, cost), min(group), group) for group, cost in costs.items()]
        heapq.heapify(heap)
        while heap:
            price, _, group = heapq.heappop(heap)
            if group.isdisjoint(left) or price != self._price(group, costs[group]):
                continue  # a neighbour went down: it is there once more, for less
            new = [i for i in self._around(group) if not active[i]]
            after = summed([tuple(total), self._noise(new)])
            if max(after, default=0.0) > limit:
                continue
            total, left = after, left - group
            for i in new:
                active[i] = True
            for other, paid in self._beside(new).items():
                if other <= left:
                    cost = _less(costs[other], self._noise(sorted(paid)))
                    costs[other] = cost or self._noise([i for i in self._around(other) if not active[i]])
                    heapq.heappush(heap, (self._price(other, costs[other]), min(other), other))
        return self._packed(self._with_outliers(left, limit))

    def _beside(self, edges: Sequence[int]) -> dict[frozenset[str], set[int]]:
        """The groups that round these edges, and which of them each does."""
        found: dict[frozenset[str], set[int]] = {}
        for i in edges:
            for name in self._edges[i].nodes:
                if name in self._group_of:
                    found.setdefault(self._group_of[name], set()).add(i)
        return found

    def _packed(self, left: set[str]) -> Packed:
        """With the movers that lie between high nodes, and the noise of that."""
        follows: dict[str, str] = {}
        for measured in self._edges:
            edge = measured.edge
            if not self._is_low(edge.input, left) and not self._is_low(edge.node, left):
                reader = edge.input if edge.node == OUTPUT else edge.node
                follows.update({mover: reader for mover in edge.movers if mover in self._movers})
        active = self._active(left)
        total: Sequence[float] = self._noise([i for i, is_active in enumerate(active) if is_active])
        for mover in sorted(follows):
            new = [i for i in self._edges_of[mover] if not active[i]]
            after = summed([tuple(total), self._noise(new)])
            if self._is_apart(mover, left) and max(after, default=0.0) <= (1 + _HARDLY) * max(total, default=0.0):
                del follows[mover]
                total = after
                for i in new:
                    active[i] = True
        high = frozenset(left | follows.keys())
        return Packed(high, follows, max(total, default=0.0), self.worth(self.free - high))

    def _is_apart(self, mover: str, left: Collection[str]) -> bool:
        """Whether a mover has a low maker, or no high reader, so that it costs casts to have it high."""
        edges = [self._edges[i].edge for i in self._edges_of[mover]]
        read = any(edge.node != OUTPUT and not self._is_low(edge.node, left) for edge in edges)
        return not read or any(self._is_low(edge.input, left) for edge in edges)

    def _is_low(self, name: str, left: Collection[str]) -> bool:
        return name in self._low or (name in self.free and name not in left and name not in self._movers)

    def _active(self, high: Collection[str]) -> list[bool]:
        """Which edges are rounded. Movers count as high: a low one is next to a low node."""
        return [
            any(n in self._low or (n in self.free and n not in high and n not in self._movers) for n in edge.nodes)
            for edge in self._edges
        ]

    def _around(self, group: Collection[str]) -> list[int]:
        return sorted({i for name in group for i in self._edges_of.get(name, ())})

    def _noise(self, edges: Sequence[int]) -> tuple[float, ...]:
        return tuple(summed([self._edges[i].noise for i in edges]))

    def _price(self, group: Collection[str], cost: Sequence[float]) -> float:
        return max(cost, default=0.0) / self.worth(group)

    def _with_outliers(self, left: set[str], limit: float) -> set[str]:
        """`left` and what would make most of the noise for little: it breaks first on other data."""
        while True:
            active = [i for i, is_active in enumerate(self._active(left)) if is_active]
            worst = max(active, key=lambda i: self._edges[i].weight, default=None)
            most = 0.0 if worst is None else self._edges[worst].weight
            if worst is None or most <= OUTLIER_SHARE * max(self._noise(active)) or most * OUTLIER_REACH <= limit:
                return left
            groups = [self._group_of[name] for name in self._edges[worst].nodes if name in self._group_of]
            low = frozenset().union(*groups) - left
            if not low or self.worth(low) > OUTLIER_BYTES:
                return left
            left = left | low


def _less(cost: tuple[float, ...], paid: tuple[float, ...]) -> tuple[float, ...]:
    """The difference; empty where it would have few digits left. It spares adding up all edges of a node that many
    read.
    """
    wide = max(len(cost), len(paid))
    pairs = zip(cost * (wide // max(len(cost), 1)), paid * (wide // max(len(paid), 1)), strict=True)
    left = tuple(before - gone for before, gone in pairs)
    return left if max(left, default=0.0) > _DIGITS * max(cost, default=0.0) and min(left) >= 0 else ()


def _shares(names: Collection[str], sizes: Mapping[str, int], work: Mapping[str, int]) -> dict[str, float]:
    """The worth of each node. Where nothing has work, or nothing has bytes, the others count for more."""
    parts = [(BYTES, sizes), (WORK, work), (NODES, dict.fromkeys(names, 1))]
    wholes = [(weight, part, sum(part.get(name, 0) for name in names)) for weight, part in parts]
    counted = [(weight / whole, part) for weight, part, whole in wholes if whole]
    most = sum(weight for weight, _, whole in wholes if whole)
    return {name: sum(scale * part.get(name, 0) for scale, part in counted) / most for name in names}
