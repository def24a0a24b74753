"""The descent to cheap exponents: its directions, and one step in each, on tables of costs that are given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from calibcast.passes.rescaling.costs import EXPONENTS, IMPOSSIBLE, REACH, CostTable
from calibcast.passes.rescaling.proposals import _Descent, cheapest, cost_of
from calibcast.passes.rescaling.system import Form

Cost = Callable[[int], float]


def table(**costs: tuple[Form, Cost]) -> CostTable:
    rows = [[cost(int(k)) for k in EXPONENTS] for _, cost in costs.values()]
    return CostTable([form for form, _ in costs.values()], np.array(rows))


def away_from(best: int) -> Cost:
    return lambda k: float(abs(k - best))


ONE, OTHER, BOTH, AGAINST = ((1, 1),), ((2, 1),), ((1, 1), (2, 1)), ((1, 1), (2, -1))


def test_directions_are_of_variables_that_meet() -> None:
    forms = (ONE, BOTH, AGAINST, ((2, 3), (5, 1)), ((1, 1), (2, 1), (9, 1)))
    made = table(**{str(number): (form, away_from(0)) for number, form in enumerate(forms)})
    assert list(_Descent(made).pairs()) == [
        ((1, 1), (2, 1)), ((1, 1), (2, -1)), ((2, 1), (5, 1)), ((2, 1), (5, -1)),
    ]  # fmt: skip


@pytest.mark.parametrize("best", [7, -7, 40, -40])
def test_the_best_step_is_taken_at_once(best: int) -> None:
    made = _Descent(table(a=(ONE, away_from(best))))
    assert made.improve(((1, 1),))
    assert made.values == {1: best}
    assert not made.improve(((1, 1),))


@pytest.mark.parametrize("best", [41, -41, 60])
def test_a_step_is_40_at_most_and_several_are_taken(best: int) -> None:
    made = _Descent(table(a=(ONE, away_from(best))))
    assert made.improve(((1, 1),))
    assert made.values == {1: 40 if best > 0 else -40}
    assert cheapest(table(a=(ONE, away_from(best))), [1]) == {1: best}


def test_nothing_goes_beyond_what_is_weighed() -> None:
    assert cheapest(table(a=(ONE, lambda k: -float(k))), [1]) == {1: REACH}
    # Twice the variable: 32 is the last.
    assert cheapest(table(a=(((1, 2),), lambda k: -float(k))), [1]) == {1: 32}


def test_a_gain_below_a_billionth_is_none() -> None:
    assert cheapest(table(a=(ONE, lambda k: 0.0 if k else 0.9e-9)), [1]) == {}
    assert cheapest(table(a=(ONE, lambda k: 0.0 if k else 1.1e-9)), [1]) != {}


def test_two_variables_move_together_where_neither_may_alone() -> None:
    """Their sum must stay 0, and one of them wants to be 5."""
    held: Cost = lambda k: 100.0 * abs(k)  # noqa: E731
    assert cheapest(table(a=(ONE, away_from(5)), b=(BOTH, held)), [1, 2]) == {1: 5, 2: -5}
    assert cheapest(table(a=(ONE, away_from(5)), b=(AGAINST, held)), [1, 2]) == {1: 5, 2: 5}
    # A third that also reads the sum is moved along.
    found = cheapest(table(a=(ONE, away_from(5)), b=(BOTH, held), c=(OTHER, away_from(-4))), [1, 2])
    assert found in ({1: 4, 2: -4}, {1: 5, 2: -5})


def test_variables_that_nothing_weighs_stay() -> None:
    assert cheapest(table(a=(ONE, away_from(2))), [1, 7]) == {1: 2}
    assert cheapest(table(a=(ONE, away_from(2))), []) == {}


def test_a_cost_is_that_of_all_forms() -> None:
    made = table(a=(ONE, away_from(2)), b=(AGAINST, away_from(0)))
    assert cost_of(made, {1: 3, 2: 1}) == 1.0 + 2.0
    assert cost_of(made, {}) == 2.0
    assert cost_of(made, {1: REACH + 1}) == 2 * IMPOSSIBLE
    assert cost_of(made, {1: -REACH}) == REACH + 2.0 + REACH
