"""Adds what rounding costs to a judge, from a program's facts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from calibcast.passes.flips import Flips, flips_of, low_at
from calibcast.passes.judge import Judge
from calibcast.passes.low_types import LOW_TYPES
from calibcast.passes.program_facts import ProgramFacts
from calibcast.passes.rounding_course import ALWAYS, Course, course_of
from calibcast.passes.rounding_plan import RoundingPlan, allowance_of, budget_of
from calibcast.passes.tensor_rules import DEFAULT_DATA_MAX


def with_rounding(
    program: ProgramFacts,
    judge: Judge,
    allowance: float | None = None,
    course: Course | None = None,
    at_any_cost: bool = False,
) -> Judge:
    """A judge that also keeps high what the budget of rounding noise requires; the same judge without evidence.

    allowance: predicted noise that is allowed, where a run has shown how much; otherwise that of the budget. course:
    where it is known already. at_any_cost: raise what the budget requires, also where noise is spread.
    """
    course = course_for(program, judge) if course is None else course
    if course is None:
        return judge
    course = replace(course, spread=0.0) if at_any_cost else course
    plan = _plan(program, judge, course, allowance)
    if plan.spread:
        plan = replace(plan, others=_others(program, judge))
    return replace(judge, rounding=plan)


def course_for(program: ProgramFacts, judge: Judge) -> Course | None:
    """The course from the nodes that no other rule but `data_max` keeps high."""
    evidence = program.rounding.get(judge.low_type)
    if evidence is None:
        return None
    bare = replace(judge, rounding=None)
    decided = {name: least is not None for name, least in flips_of(program, bare).items()}
    reader = program.reader(judge.low_type)
    pinned = [name for name, low in decided.items() if low and judge.included(reader.read(program.outlines[name], {}))]
    ties = [members for _, members in program.ties]
    return course_of(evidence.edges, decided, pinned, ties, program.sizes)


def budgets_of(program: ProgramFacts, judge: Judge) -> Flips:
    """For each node the highest `min_sqnr_db` at which it is low: inf where it is at any, None where at none."""
    course = course_for(program, judge)
    assert course is not None
    bare = replace(judge, rounding=None)
    free = set(low_nodes(program, bare, flips_of(program, bare)))

    def highest(name: str, limit: float) -> float | None:
        if limit == ALWAYS or name not in free:
            return None
        # Where noise is spread, a plan raises no more nodes: a node that is low at that point is low at any budget.
        return math.inf if course.spread and limit <= course.crowd else budget_of(limit)

    return {name: highest(name, limit) for name, limit in course.thresholds.items()}


def low_nodes(program: ProgramFacts, judge: Judge, flips: Flips) -> list[str]:
    """The nodes that are low at the judge's own `data_max`, in graph order. flips: `flips_of(program, judge)`."""
    evidence = program.rounding.get(judge.low_type)
    if judge.data_max is not None or evidence is None:
        return low_at(flips, DEFAULT_DATA_MAX if judge.data_max is None else judge.data_max)
    free = {name: 0.0 if least is not None and evidence.knows(name) else least for name, least in flips.items()}
    return low_at(free, DEFAULT_DATA_MAX)


def _plan(program: ProgramFacts, judge: Judge, course: Course, allowance: float | None = None) -> RoundingPlan:
    evidence = program.reader(judge.low_type).evidence
    return RoundingPlan(
        course,
        str(judge.low_type).removeprefix("torch."),
        judge.budget,
        allowance_of(judge.budget) if allowance is None else allowance,
        {place: None if f.absmax is None else f.absmax * 2.0**f.exponent for place, f in evidence.items()},
        {candidate.name: candidate.node for candidate in program.nodes},
    )


def _others(program: ProgramFacts, judge: Judge) -> Mapping[str, float]:
    """What the other low types would give, in dB."""
    found: dict[str, float] = {}
    for name, low_type in LOW_TYPES.items():
        if low_type != judge.low_type:
            other = judge.in_type(low_type)
            course = course_for(program, other)
            if course is not None:
                found[name] = _plan(program, replace(other, min_sqnr_db=judge.budget), course).predicted_db
    return found
