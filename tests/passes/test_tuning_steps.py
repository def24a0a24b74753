"""One step of `tune` at a time, against numbers worked out by hand: which allowance comes next, and what is said."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibcast import calibrate, classify
from calibcast.calib import BudgetError
from calibcast.calib.operators import operator_of
from calibcast.passes.proving import Batch, Outcome, Proving, Worst, _held, _Seen, spare_db
from calibcast.passes.tuning import _Tuning

from tests.passes.measured import exported

INF = math.inf
BUDGET = 40.0
STEPS = (1e-3, 1e-5, 1e-7)


def plan(
    *high: str, rule: str = "rounding", spread: bool = False, predicted: float = 30.0, summary: bool = True
) -> Any:
    rounding = SimpleNamespace(spread=spread, predicted_sqnr_db=predicted, edges=("edge one", "edge two"))
    decisions = [SimpleNamespace(rule=rule)] if rule else []
    found = rounding if summary else None
    return SimpleNamespace(high_precision_nodes=high, low_precision_nodes=(), decisions=decisions, rounding=found)


def outcome(db: float = 40.0, changed: float = 0.0, nonfinite: int = 0, of: Any = None, bad: Any = None) -> Outcome:
    """Of a run that has shown this SQNR."""
    return Outcome(of or plan(), Worst(10 ** (-db / 10), 2, 1), Worst(), {}, changed, nonfinite, bad, 8)


def tuning(*plans: Any, **state: Any) -> _Tuning:
    """Plans change at the allowances of STEPS. plans: what planning gives, one after another."""
    waiting = list(plans)
    planning: Any = SimpleNamespace(
        course=lambda raised: SimpleNamespace(steps=[SimpleNamespace(allowance=limit) for limit in STEPS]),
        plan=lambda *asked: waiting.pop(0) if waiting else plan(),
        low_name="float16",
        facts=SimpleNamespace(sizes={"a": 3, "b": 4}, rounding={}, nodes=()),
        makers=lambda readers: set(),
        ring=lambda readers, low: set(),
    )
    proving: Any = SimpleNamespace(worst_batch=lambda outcome: "the worst")
    made = _Tuning(planning, proving, BUDGET, {})
    for name, value in state.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("missed", "factor"),
    [
        (0.5, 10 ** (2.0 / 20)),  # by the miss and 1.5 dB more
        (3.0, 10 ** (4.5 / 20)),
        (3.6, 10 ** (5.1 / 20)),
        (3.7, 1.8),  # but not by more than this
        (14.0, 1.8),
        (14.1, 3.0),  # unless it was missed by far
        (60.0, 3.0),
    ],
)
def test_a_missed_budget_lowers_the_amplitude_that_is_allowed(missed: float, factor: float) -> None:
    every = tuning()
    every.planning = SimpleNamespace(  # type: ignore[assignment]
        course=lambda raised: SimpleNamespace(steps=[SimpleNamespace(allowance=1.0 - 1e-9)])
    )
    assert every._reduced(1.0, outcome(BUDGET - missed)) == pytest.approx(1 / factor**2, rel=1e-6)


@pytest.mark.parametrize(("times", "missed"), [(10.0, 20.0), (2.0, 6.0206), (1.0, 0.0), (0.5, 0.0)])
def test_too_many_integers_that_change_count_like_an_amplitude(times: float, missed: float) -> None:
    """Half a percent may change at 40 dB."""
    every = tuning()
    every.planning = SimpleNamespace(  # type: ignore[assignment]
        course=lambda raised: SimpleNamespace(steps=[SimpleNamespace(allowance=1.0 - 1e-9)])
    )
    factor = 3.0 if missed > 14 else min(1.8, 10 ** ((missed + 1.5) / 20))
    assert every._reduced(1.0, outcome(41.0, changed=0.005 * times)) == pytest.approx(1 / factor**2, rel=1e-4)


@pytest.mark.parametrize(
    ("before", "wanted", "found"),
    [
        (1e-2, 1e-4, 1e-4),  # past a step at 1e-3
        (1e-2, 2e-3, math.nextafter(1e-3, 0)),  # no step on the way: below the next one
        (1e-2, 1e-3, math.nextafter(1e-3, 0)),
        (1e-3, 1e-4, 1e-4),
        (1e-4, 1e-2, 1e-2),  # upwards
        (1e-4, 1e-3, 1e-3),
        (1e-4, 9e-4, None),
        (2e-3, 1e-2, None),
        (1e-7, 1e-8, 1e-8),
        (1e-8, 1e-9, None),  # nothing is left to change
    ],
)
def test_an_allowance_is_one_at_which_the_plan_is_another(before: float, wanted: float, found: float | None) -> None:
    assert tuning()._changing(before, wanted, plan()) == found


def test_without_evidence_no_allowance_changes_the_plan() -> None:
    made = tuning()
    made.planning = SimpleNamespace(course=lambda raised: None)  # type: ignore[assignment]
    assert made._changing(1.0, 0.5, plan()) is None


@pytest.mark.parametrize(
    ("spare", "wanted"),
    [
        (3.0, None),
        (3.1, 1e-6 * 10**0.21),
        (21.0, 1e-4),
        (61.0, 1.0),
        (80.0, 1.0),
        (INF, 1.0),
    ],
)
def test_what_is_to_spare_is_allowed_but_for_one_db(spare: float, wanted: float | None) -> None:
    every = tuning()
    every.planning = SimpleNamespace(  # type: ignore[assignment]
        course=lambda raised: SimpleNamespace(steps=[SimpleNamespace(allowance=1.1e-6)])
    )
    found = every._relaxed(1e-6, outcome(BUDGET + spare))
    assert found == (wanted if wanted is None else pytest.approx(wanted))
    assert every._relaxed(1e-6, outcome(BUDGET + spare, of=plan(rule="data_max"))) is None
    assert every._relaxed(1e-6, outcome(BUDGET + spare, of=plan(rule=""))) is None


def test_between_what_passed_and_what_failed_the_middle_is_tried() -> None:
    every = tuning(failing=1e-4)
    assert every._relaxed(1e-6, outcome(BUDGET + 40)) == pytest.approx(1e-5)
    near = tuning(failing=1e-2)
    assert near._relaxed(1e-6, outcome(BUDGET + 40)) == pytest.approx(10**-2.1)


def test_a_plan_that_meets_the_budget_is_kept_and_one_after_it_must_have_two_db_to_spare() -> None:
    made = tuning()
    first = outcome(BUDGET + 2)
    assert made._next(1e-5, first) is None  # it has too little to spare to go on
    assert (made.passed, made.passing, made.failing) == ([first], 1e-5, INF)
    assert made._next(1e-4, outcome(BUDGET + 1.9, of=plan("a"))) is not None
    assert (made.passed, made.failing) == ([first], 1e-4)
    second = outcome(BUDGET + 2, of=plan("b"))
    made._next(1e-6, second)
    assert (made.passed, made.passing) == ([first, second], 1e-5)


def test_without_evidence_or_where_nothing_is_raised_the_search_ends() -> None:
    assert tuning()._next(1e-5, outcome(30, of=plan(summary=False))) is None
    same = plan("a")
    made = tuning(same, same)
    made._raise_for_steps = lambda outcome, last: False  # type: ignore[method-assign]
    assert made._next(1e-5, outcome(30, of=same)) is None
    made._raise_for_steps = lambda outcome, last: True  # type: ignore[method-assign]
    assert made._next(1e-5, outcome(30, of=same)) == 1e-5


@pytest.mark.parametrize(
    ("predicted", "seen", "changed", "asked"),
    [
        (33.1, 30, ["step"], True),
        (33.0, 30, ["step"], False),  # as foreseen
        (50.0, 30, [], True),  # it was not a step
    ],
)
def test_where_a_run_has_more_noise_than_was_foreseen_the_steps_that_changed_are_raised(
    monkeypatch: pytest.MonkeyPatch, predicted: float, seen: float, changed: list[str], asked: bool
) -> None:
    made, questions = tuning(), []
    made.proving.steps_to_blame = lambda outcome, names: questions.append(names) or changed  # type: ignore[method-assign,assignment,func-returns-value]
    monkeypatch.setattr("calibcast.passes.tuning.steps_of", lambda planning: {"step": None})
    made._raise_around = lambda names, reason, outcome, whole: bool(names) and "`step`" in reason  # type: ignore[method-assign]
    assert made._raise_for_steps_seen(outcome(seen, of=plan(predicted=predicted))) == (asked and bool(changed))
    assert questions == ([{"step": None}] if asked else [])


@pytest.mark.parametrize(
    ("operator", "ours", "theirs", "held"),
    [
        ("argmax", torch.tensor([1, 2]), torch.tensor([1, 3]), torch.tensor([1, 3])),
        ("gt", torch.tensor([True, False]), torch.tensor([True, False]), None),
        ("round", torch.tensor([1.0, 2.0, 300.0]), torch.tensor([1.0, 3.0, 301.0]), torch.tensor([1.0, 3.0, 300.0])),
        ("sort", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), None),  # its values have no steps
        ("remainder", torch.tensor([0.001, 0.01]), torch.tensor([0.002, 6.27]), torch.tensor([0.001, 6.27])),
        ("floor", torch.tensor([]), torch.tensor([]), None),
        ("floor", torch.tensor([1.0]), torch.tensor([1.0, 2.0]), None),  # of another size: nothing to hold
    ],
)
def test_elements_on_another_step_are_held(
    operator: str, ours: torch.Tensor, theirs: torch.Tensor, held: torch.Tensor | None
) -> None:
    """Where a tensor has no such element, it stays as it is."""
    before = ours.clone()
    assert _held(operator_of(operator), ours, theirs) == (held is not None)
    assert torch.equal(ours, before if held is None else held)


def test_a_step_that_changes_and_does_no_harm_is_not_to_blame() -> None:
    """A sign that becomes 0, times next to nothing, beside a sum that is far off; and one that is all there is."""
    x = torch.linspace(-1, 1, 64).repeat(4, 1)
    program = exported(lambda x: (x - 0.01587).sign() * x * 0.01 + (x * 1.001 + 1000 - 1000), x)
    plan = classify(program, calibrate(program, [x], progress=False, rounding_batches=0), nodes_to_include=[".*"])
    proving = Proving(program, [x])
    seen = proving.run(plan)
    assert seen.sqnr_db < 30
    assert proving.steps_to_blame(seen, {"sign": operator_of("sign")}) == []
    harmful = exported(lambda x: (x - 0.01587).sign() * 5, x)
    plan = classify(harmful, calibrate(harmful, [x], progress=False, rounding_batches=0), nodes_to_include=[".*"])
    proving = Proving(harmful, [x])
    assert proving.steps_to_blame(proving.run(plan), {"sign": operator_of("sign")}) == ["sign"]


def test_spread_noise_is_raised_at_any_cost_and_with_the_last_run_all_of_it() -> None:
    made = tuning()
    assert made._next(1e-5, outcome(30, of=plan(spread=True))) == 1e-5
    assert made.at_any_cost
    last = tuning(tried=[outcome()] * 4)
    assert last._next(1e-5, outcome(30, of=plan(spread=True))) == 0.0
    passed = tuning(tried=[outcome()] * 4, passed=[outcome()])
    assert passed._next(1e-5, outcome(30, of=plan(spread=True))) == 1e-5


def test_the_last_run_allows_nothing_and_raises_all_that_decides_a_step() -> None:
    last = tuning(plan("a", "b"), tried=[outcome()] * 4)
    raised: list[bool] = []
    last._raise_for_steps = lambda outcome, last: raised.append(last) or True  # type: ignore[method-assign,func-returns-value]
    assert last._next(1e-5, outcome(30, of=plan("a"))) == 0.0
    assert raised == [True]
    other = tuning(plan("a", "b"), tried=[outcome()] * 3)
    assert other._next(1e-5, outcome(38, of=plan("a"))) == pytest.approx(1e-5 / 10**0.35)
    assert other.failing == 1e-5


@pytest.mark.parametrize(("predicted", "looks"), [(54.0, False), (54.1, True)])
def test_a_run_that_misses_by_far_what_was_predicted_is_looked_at(predicted: float, looks: bool) -> None:
    made = tuning()
    assert made._batch_to_look_at(outcome(40.0, of=plan(predicted=predicted))) == ("the worst" if looks else None)
    bad: Any = SimpleNamespace()
    assert made._batch_to_look_at(outcome(40.0, bad=bad)) is bad


def test_of_plans_that_pass_the_one_with_the_fewest_bytes_high_counts() -> None:
    made = tuning()
    assert [made._bytes_high(plan(*names)) for names in ((), ("a",), ("a", "b"), ("a", "unknown"))] == [0, 3, 7, 3]


def test_plans_with_the_same_nodes_high_are_run_once() -> None:
    made = tuning()
    runs: list[Any] = []
    made.proving = SimpleNamespace(run=lambda plan: runs.append(plan) or outcome(of=plan))  # type: ignore[assignment]
    first, again, other = plan("a"), plan("a"), plan("b")
    assert [made._outcome(one).plan for one in (first, again, other)] == [first, again, other]
    assert (runs, len(made.tried)) == ([first, other], 2)


def refused(*tried: Outcome, others: dict[str, float] | None = None) -> str:
    made = tuning(tried=list(tried))
    made._others = lambda: others or {}  # type: ignore[method-assign]
    error = made._refusal()
    assert isinstance(error, BudgetError)
    return str(error)


def test_a_refusal_names_the_best_run_its_place_and_the_edges() -> None:
    said = refused(outcome(20), outcome(33.25), others={"bfloat16": 25.0})
    assert said == (
        "no plan meets the budget of 40 dB in 2 runs: at best float16 gives 33.2 dB; with bfloat16 gives 25 dB "
        "(batch 2, output 1). Lower min_sqnr_db, or use another type. What costs most under the best plan:\n"
        "  edge one\n  edge two"
    )
    said = refused(outcome(50, nonfinite=3), outcome(60, nonfinite=2))
    assert "at best float16 gives -inf dB (batch 2, output 1), and 3 elements are newly NaN or Inf. " in said
    said = refused(outcome(33.25, of=plan(summary=False)))
    assert said.endswith("Calibrate with rounding_batches=4, so that plans can be mended.")


def test_runs_that_are_as_good_are_told_apart_by_their_integers() -> None:
    error = tuning(tried=[outcome(45, changed=0.5), outcome(45, changed=0.25), outcome(45, changed=0.75)])
    error._others = dict  # type: ignore[method-assign]
    assert error._refusal().proof.integers_changed == 0.25  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("found", "meets"),
    [
        (outcome(40.0), True),
        (outcome(39.999), False),
        (outcome(50.0, nonfinite=1), False),
        (outcome(50.0, changed=0.005), True),
        (outcome(50.0, changed=0.00501), False),
    ],
)
def test_an_outcome_meets_a_budget(found: Outcome, meets: bool) -> None:
    assert found.meets(40.0) is meets
    assert spare_db(found, 40.0) == (-INF if found.nonfinite else pytest.approx(found.sqnr_db - 40))


def test_the_worse_of_both_kinds_of_runs_counts() -> None:
    twice = Outcome(plan(), Worst(1e-4), Worst(1e-3, 1, 0, 5), {0: 40.0, 2: 41.0}, 0.25, 3, None, 8, True)
    assert twice.sqnr_db == pytest.approx(30.0)
    proof = twice.proof(40.0, 2)
    assert (proof.min_sqnr_db, proof.sqnr_db, proof.integers_changed, proof.nonfinite) == (40.0, 40.0, 0.25, 3)
    assert (proof.outputs, proof.batches, proof.runs, proof.carry_state) == ((40.0, 41.0), 8, 2, True)


def batch(index: int = 0, begins: bool = False, doubled: bool = False) -> Batch:
    return Batch(index, [], [], doubled, begins)


def test_what_a_run_has_shown_so_far() -> None:
    seen = _Seen()
    x = torch.arange(1.0, 65.0).reshape(32, 2)
    seen.take([x, torch.tensor([1, 2]), "text", x[:0]], [x, torch.tensor([1, 3]), "text", x[:0]], batch(3))
    assert (seen.worst, seen.outputs, seen.integers) == (Worst(0.0, 3, 0, 0), {0: 0.0}, {1: (1, 2)})
    ours = x.clone()
    ours[0, 1] += 1.0
    seen.take([ours, torch.tensor([1, 3, 5])], [x, torch.tensor([1, 3, 4])], batch(4))
    noise = 1 / float(x[:, 1].square().sum())
    assert (seen.worst.batch, seen.worst.output, seen.worst.channel) == (4, 0, 1)
    assert seen.worst.noise == pytest.approx(noise)
    assert (seen.integers, seen.changed, seen.runs, seen.nonfinite, seen.bad) == ({1: (2, 5)}, 0.4, 2, 0, None)
    ours[3] = torch.tensor([math.nan, INF])
    for number in (5, 6):
        seen.take([ours], [x], batch(number))
    assert (seen.nonfinite, seen.bad.index, seen.outputs) == (4, 5, {0: INF})  # type: ignore[union-attr]
    assert seen.worst.batch == 5
    assert _Seen().changed == 0.0
    single = _Seen()
    single.take([x[:3]], [x[:3]], batch())
    assert single.worst.channel is None


def test_two_batches_are_also_run_with_inputs_times_two() -> None:
    program = torch.export.export(torch.nn.ReLU(), (torch.ones(2),))
    made = Proving(program, [torch.full((2,), float(n)) for n in range(4)])
    assert [(b.index, b.doubled, b.flat[0].tolist()) for b in made.doubled] == [
        (0, True, [0.0] * 2),
        (1, True, [2.0] * 2),
    ]
    assert [b.index for b in made.batches] == [0, 1, 2, 3]


def proving(*batches: Batch, doubled: tuple[Batch, ...] = (), carry_state: bool = True) -> Proving:
    made = Proving.__new__(Proving)
    made.batches, made.doubled, made._carry_state = list(batches), list(doubled), carry_state
    return made


def test_the_worst_batch_is_of_the_worse_kind_of_run() -> None:
    made = proving(batch(0), batch(1), doubled=(batch(0, doubled=True), batch(1, doubled=True)))
    for worst, doubled, index, twice in ((1e-3, 1e-4, 1, False), (1e-3, 1e-3, 1, False), (1e-4, 1e-3, 0, True)):
        found = made.worst_batch(Outcome(plan(), Worst(worst, 1), Worst(doubled, 0), {}, 0.0, 0, None, 2))
        assert (found.index, found.doubled) == (index, twice)
    assert made.worst_batch(Outcome(plan(), Worst(1.0, 7), Worst(), {}, 0.0, 0, None, 2)).index == 0


def test_the_batches_that_lead_to_one_are_those_of_its_sequence() -> None:
    made = proving(
        *(batch(n, begins=n in (0, 3)) for n in range(6)), doubled=tuple(batch(n, doubled=True) for n in (0, 1))
    )
    leading = {n: [b.index for b in made._leading_to(made.batches[n])] for n in range(6)}
    assert leading == {0: [], 1: [0], 2: [0, 1], 3: [], 4: [3], 5: [3, 4]}
    assert [b.doubled for b in made._leading_to(made.doubled[1])] == [True]
    assert proving(*made.batches, carry_state=False)._leading_to(made.batches[2]) == []


@pytest.mark.parametrize(
    ("predicted", "state", "looks"),
    [
        (43.0, {}, False),
        (43.1, {}, True),
        (43.1, {"passed": [outcome()]}, False),
        (43.1, {"looked": {(2, 1, None)}}, False),  # it was looked at before
        (43.1, {"looked": {(0, 0, 0), (1, 0, 0)}}, True),
        (43.1, {"looked": {(0, 0, 0), (1, 0, 0), (2, 0, 0)}}, False),
    ],
)
def test_a_channel_with_more_noise_than_was_predicted_is_measured_by_itself(
    predicted: float, state: dict[str, Any], looks: bool
) -> None:
    made = tuning(**state)
    seen: list[Any] = []
    made.proving.noise_at_worst = lambda outcome: {"float16": {}}  # type: ignore[assignment, method-assign, return-value, dict-item]
    made.planning.with_noise = lambda noises, output: seen.append(output) or made.planning  # type: ignore[method-assign, func-returns-value]
    assert made._look_closer(outcome(40.0, of=plan(predicted=predicted))) is looks
    assert seen == [1] * looks
    assert ((2, 1, None) in made.looked) is (looks or (2, 1, None) in state.get("looked", ()))
    made.proving.noise_at_worst = lambda outcome: None  # type: ignore[assignment, method-assign]
    assert not tuning(proving=made.proving)._look_closer(outcome(40.0, of=plan(predicted=60.0)))
    assert not made._look_closer(outcome(40.0, nonfinite=1, of=plan(predicted=60.0)))


def test_a_plan_that_only_just_meets_the_budget_is_kept_for_want_of_a_better() -> None:
    made = tuning(looked={(2, 1, None)})
    barely = outcome(BUDGET + 1.9)
    assert made._next(1e-5, barely) is not None
    assert (made.passed, made.barely, made.failing) == ([], [barely], 1e-5)
    assert tuning()._next(1e-5, outcome(BUDGET + 1.9)) is None
