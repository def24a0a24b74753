"""Exponents worth a try: those of the least cost, by coordinate descent over the free ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from calibcast.passes.rescaling.costs import IMPOSSIBLE, REACH, CostTable
from calibcast.passes.rescaling.measures import Array

_STEPS: Array = np.arange(-40, 41)
_SWEEPS = 12
_LEAST_GAIN = 1e-9


def cheapest(table: CostTable, free: Sequence[int]) -> dict[int, int]:
    """Values of the free variables: to change any single one, or any two that meet in a form, costs no less.

    Equal to the optimum of an exhaustive search on small networks; see tests.
    """
    descent = _Descent(table)
    order = [v for v in free if v in descent.touched]
    for _ in range(_SWEEPS):
        if not any([descent.improve(((v, 1),)) for v in order]):
            pairs = [pair for pair in descent.pairs() if descent.improve(pair)]
            if not pairs:
                break
    return {v: k for v, k in descent.values.items() if k}


class _Descent:
    def __init__(self, table: CostTable) -> None:
        self._table, self.values = table, defaultdict[int, int](int)
        self._now = np.zeros(len(table.forms), dtype=np.int64)
        touched: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for place, form in enumerate(table.forms):
            for variable, count in form:
                touched[variable].append((place, count))
        self.touched: Mapping[int, tuple[Array, Array]] = {
            v: (np.array([p for p, _ in found]), np.array([c for _, c in found])) for v, found in touched.items()
        }

    def pairs(self) -> Iterator[tuple[tuple[int, int], ...]]:
        """Directions of two free variables that meet in a form, together and against each other."""
        seen = set()
        for form in self._table.forms:
            if len(form) == 2:
                one, other = form[0][0], form[1][0]
                if (one, other) not in seen:
                    seen.add((one, other))
                    yield (one, 1), (other, 1)
                    yield (one, 1), (other, -1)

    def improve(self, direction: tuple[tuple[int, int], ...]) -> bool:
        """Take the best step in a direction. Returns whether there was one."""
        places, counts = self._along(direction)
        after = self._now[places, None] + counts[:, None] * _STEPS[None, :]
        inside = np.abs(after) <= REACH
        costs = np.where(inside, self._table.costs[places[:, None], np.clip(after, -REACH, REACH) + REACH], IMPOSSIBLE)
        totals = costs.sum(0)
        best = int(np.argmin(totals))
        if totals[best] >= totals[_STEPS == 0][0] - _LEAST_GAIN:
            return False
        step = int(_STEPS[best])
        self._now[places] += counts * step
        for variable, sign in direction:
            self.values[variable] += sign * step
        return True

    def _along(self, direction: tuple[tuple[int, int], ...]) -> tuple[Array, Array]:
        if len(direction) == 1:
            return self.touched[direction[0][0]]
        counts: dict[int, int] = defaultdict(int)
        for variable, sign in direction:
            for place, count in zip(*self.touched[variable], strict=True):
                counts[int(place)] += sign * int(count)
        kept = [(p, c) for p, c in counts.items() if c]
        return np.array([p for p, _ in kept], dtype=np.int64), np.array([c for _, c in kept], dtype=np.int64)


def cost_of(table: CostTable, values: Mapping[int, int]) -> float:
    """The cost of values of the free variables."""
    total = 0.0
    for row, form in zip(table.costs, table.forms, strict=True):
        k = sum(count * values.get(v, 0) for v, count in form)
        total += float(row[k + REACH]) if abs(k) <= REACH else IMPOSSIBLE
    return total
