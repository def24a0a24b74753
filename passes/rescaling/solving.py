"""All integer solutions of the equations: each exponent as a sum of free ones, by exact elimination."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from calibcast.passes.rescaling.system import Form, Number, Row, Solutions, System, Tensor


def solve(system: System, weights: Iterable[int] = (), held: Iterable[int] = ()) -> Solutions:
    """Solve the equations. weights: variables of weights. held: more variables that must be 0.

    Numbers are eliminated first, then weights, then activations. So the free variables are exponents of activations:
    each stands for a place in the network, and what depends on it is near.
    """
    roots = _union(system, held)
    zero, of_weights = roots(-1), set(weights)
    elimination = _Elimination({roots(v): _rank(system, v, of_weights) for v in range(len(system.kinds))})
    rows = (_reduced(row, roots, zero) for row in system.rows)
    for row in sorted((row for row in rows if row), key=elimination.order):
        elimination.add(row)
    forms: list[Form] = []
    free: dict[int, None] = {}
    for variable in range(len(system.kinds)):
        root = roots(variable)
        form = () if root == zero else elimination.form(root)
        forms.append(form)
        free |= dict.fromkeys(v for v, _ in form)
    return Solutions(system, forms, tuple(free))


def _rank(system: System, variable: int, weights: set[int]) -> int:
    kind = system.kinds[variable]
    if kind is None or isinstance(kind, Number):
        return 0
    assert isinstance(kind, Tensor)
    return 1 if variable in weights else 2


def _union(system: System, held: Iterable[int]) -> Callable[[int], int]:
    parent = {v: v for v in range(-1, len(system.kinds))}

    def root(variable: int) -> int:
        while parent[variable] != variable:
            parent[variable] = parent[parent[variable]]
            variable = parent[variable]
        return variable

    for one, other in [*system.equal, *((-1, v) for v in system.zero), *((-1, v) for v in held)]:
        first, second = root(one), root(other)
        parent[max(first, second)] = min(first, second)
    return root


def _reduced(row: Row, root: Callable[[int], int], zero: int) -> Row:
    found: dict[int, int] = defaultdict(int)
    for variable, count in row.items():
        if root(variable) != zero:
            found[root(variable)] += count
    return {v: count for v, count in found.items() if count}


class _Elimination:
    """Keeps each eliminated variable as a sum of variables that are not eliminated."""

    def __init__(self, ranks: Mapping[int, int]) -> None:
        self._ranks = dict(ranks)
        self._solved: dict[int, Row] = {}
        self._within: dict[int, set[int]] = defaultdict(set)
        self._next = max(self._ranks, default=0) + 1

    def order(self, row: Row) -> tuple[int, int]:
        """A key to sort rows by: those with a variable of low rank first, then short ones."""
        return min(self._ranks[v] for v in row), len(row)

    def form(self, variable: int) -> Form:
        return tuple(sorted(self._solved.get(variable, {variable: 1}).items()))

    def add(self, row: Row) -> None:
        """One more equation: the sum of `row` is 0."""
        row = self._without_solved(row)
        while row:
            common = math.gcd(*row.values())
            row = {v: count // common for v, count in row.items()}
            units = [v for v, count in row.items() if abs(count) == 1]
            if units:
                pivot = min(units, key=lambda v: (self._ranks[v], -v))
                self._let_go(pivot, {v: -count * row[pivot] for v, count in row.items() if v != pivot})
                return
            row = self._with_smaller(row)

    def _with_smaller(self, row: Row) -> Row:
        """For a row without a coefficient of 1: a step of Euclid's algorithm, by an invertible integer substitution."""
        least = min(row, key=lambda v: abs(row[v]))
        made, self._next = self._next, self._next + 1
        self._ranks[made] = self._ranks[least]
        # least = made - sum of quotients times the others; each other keeps its remainder.
        quotients = {v: count // row[least] for v, count in row.items() if v != least}
        self._let_go(least, {made: 1, **{v: -q for v, q in quotients.items() if q}})
        rest = {v: count - quotients[v] * row[least] for v, count in row.items() if v != least}
        return {made: row[least], **{v: count for v, count in rest.items() if count}}

    def _let_go(self, pivot: int, form: Row) -> None:
        self._solved[pivot] = form
        for variable in form:
            self._within[variable].add(pivot)
        for holder in self._within.pop(pivot, ()):
            old = self._solved[holder]
            factor = old.pop(pivot, 0)
            for variable, count in form.items():
                old[variable] = old.get(variable, 0) + factor * count
                if old[variable]:
                    self._within[variable].add(holder)
                else:
                    del old[variable]
                    self._within[variable].discard(holder)

    def _without_solved(self, row: Row) -> Row:
        found: dict[int, int] = defaultdict(int)
        for variable, count in row.items():
            for v, times in self._solved.get(variable, {variable: 1}).items():
                found[v] += count * times
        return {v: count for v, count in found.items() if count}
