"""The laws of cast insertion (benchmarks/fuzz/laws.py), held on random small programs under random plans.

A program is drawn as data: a list of steps, each an entry of `STEPS` with the tensors that it works on. A plan is
drawn as an integer: bit i says whether the i-th node that a plan may decide on is low.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from benchmarks.fuzz.case import made_case, plan_by_hand
from benchmarks.fuzz.programs import STEPS, Recipe, Step, exported, inputs_of

STEP = st.builds(Step, st.sampled_from(sorted(STEPS)), st.integers(0, 5), st.integers(0, 5))
RECIPE = st.builds(Recipe, st.lists(STEP, min_size=1, max_size=7).map(tuple), st.booleans(), st.booleans())
COINS = st.one_of(st.integers(0, 2**48 - 1), st.just(-1))  # -1: all low
LOW_TYPE = st.sampled_from([torch.float16, torch.bfloat16])
RELAXED = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Any]:
    """drawn(recipe, coins, low_type): the case of these draws. Kept, as every law is asked of the same cases."""

    @cache
    def drawn(recipe: Recipe, coins: int, low_type: torch.dtype) -> Any:
        program = exported(recipe)
        plan = plan_by_hand(program, lambda i: bool(coins >> i & 1), low_type, legal=True)
        return made_case(program, plan, inputs_of(), recipe.smooth)

    return drawn


@seed(0)
@settings(RELAXED, max_examples=80)
@given(recipe=RECIPE, coins=COINS, low_type=LOW_TYPE)
def test_random_programs_under_random_plans(
    drawn: Callable[..., Any], law: Callable[[Any], None], recipe: Recipe, coins: int, low_type: torch.dtype
) -> None:
    """Every law holds; hypothesis draws the same cases for each, so that they are exported once."""
    law(drawn(recipe, coins, low_type))


@pytest.mark.parametrize("op", sorted(STEPS))
def test_every_step_alone_in_fp16(drawn: Callable[..., Any], laws: tuple[Callable[[Any], None], ...], op: str) -> None:
    """Every law holds for each step between two others, all low."""
    case = drawn(Recipe((Step("scale", 0, 1), Step(op, 2, 1), Step("gate", 2, 3))), -1, torch.float16)
    for law in laws:
        law(case)


@pytest.mark.slow
@seed(1)
@settings(RELAXED, max_examples=800)
@given(recipe=RECIPE, coins=COINS, low_type=LOW_TYPE)
def test_many_random_programs(
    drawn: Callable[..., Any],
    laws: tuple[Callable[[Any], None], ...],
    recipe: Recipe,
    coins: int,
    low_type: torch.dtype,
) -> None:
    """Every law holds on many more cases than the default run has time for."""
    case = drawn.__wrapped__(recipe, coins, low_type)
    for law in laws:
        law(case)
