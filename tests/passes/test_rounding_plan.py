"""`classify` with measured rounding: what a budget keeps in fp32, and the sentences that say why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calibcast import CalibcastError, PrecisionPlan, calibrate, classify, insert_casts, what_if
from calibcast.passes.proving import Proving

from tests.passes.measured import exported, with_noise

X = torch.linspace(0, 500, 64)
PROGRAM = exported(lambda x: ((x * 2.0).view(8, 8).sin() + 3.0).exp(), X)
NOISY = {("sin", "mul"): 10**-1.64}
RANGES = with_noise(PROGRAM, [X], NOISY)


def test_the_noisiest_edge_keeps_reader_maker_and_mover() -> None:
    """Each says its own part of the reason, as the method has it."""
    plan = classify(PROGRAM, RANGES)
    assert plan.high_precision_nodes == ("mul", "view", "sin")
    assert (
        "rounding its input `mul` (up to 1000) to float16 alone leaves 16.4 dB at output 0, below the budget of 40"
        in (plan.explain("sin"))
    )
    assert "`sin` reads it" in plan.explain("mul")
    assert "it only moves data, and has the type of `sin`" in plan.explain("view")
    assert plan.explain("exp").endswith("its rounding costs 87 dB; the budget is 40.")
    assert {plan[name].rule for name in plan.high_precision_nodes} == {"rounding"}
    assert plan["sin"].limit == 40.0
    assert plan["sin"].evidence == pytest.approx(16.4)


def test_measured_rounding_replaces_magnitudes() -> None:
    """1000 is above the 512 of old, and nothing for fp16; a number that is given is a rule on top."""
    quiet = with_noise(PROGRAM, [X], {})
    assert classify(PROGRAM, quiet).high_precision_nodes == ()
    assert "data_max" in classify(PROGRAM, quiet, data_max=512)["mul"].rule
    assert classify(PROGRAM, quiet).settings["data_max"] is None


def test_there_must_be_room_for_four_times_what_was_seen() -> None:
    """20000 fits float16, 80000 does not; bfloat16 holds both."""
    x = torch.full((64,), 20000.0)
    program = exported(lambda x: x.tanh(), x)
    ranges = with_noise(program, [x], {})
    assert classify(program, ranges)["tanh"].rule == "headroom"
    assert classify(program, ranges, low_precision_type="bf16").high_precision_nodes == ()


def test_edges_without_evidence_leave_their_nodes_to_the_old_rules() -> None:
    """Nothing is known of what rounding the product does: 1000 is above 512 then."""
    ranges = with_noise(PROGRAM, [X], {("sin", "mul"): None})
    plan = classify(PROGRAM, ranges)
    assert plan["mul"].rule == "data_max"
    assert plan["exp"].precision == "low"


def test_the_include_list_beats_the_budget() -> None:
    """Legality apart, what the user asks for is low; the prediction says what it costs."""
    plan = classify(PROGRAM, RANGES, nodes_to_include=["^sin$", "^mul$", "^view$"])
    assert plan.high_precision_nodes == ()
    assert plan.rounding.predicted_sqnr_db == pytest.approx(16.4, abs=0.1)


def test_one_table_answers_every_budget() -> None:
    """`what_if` and the plan's own `budgets` say what `classify` does, without data."""
    budgets = [5.0, 10.0, 30.0, 80.0, 100.0]
    frame = what_if(PROGRAM, RANGES, min_sqnr_db=budgets)
    flips = classify(PROGRAM, RANGES).budgets["float16"]
    for budget, count in zip(budgets, frame["nodes_low"], strict=True):
        low = classify(PROGRAM, RANGES, min_sqnr_db=budget).low_precision_nodes
        assert len(low) == count
        assert set(low) == {name for name, most in flips.items() if most is not None and budget <= most}
    assert frame["min_sqnr_db"].to_list() == budgets
    assert frame["predicted_sqnr_db"].is_sorted()


def test_a_plan_keeps_what_the_table_said(tmp_path: Path) -> None:
    """Saved and loaded: the prediction, the worst edges, the budgets at which nodes flip."""
    plan = classify(PROGRAM, RANGES)
    plan.save(tmp_path / "plan.json")
    loaded = PrecisionPlan.load(tmp_path / "plan.json")
    assert loaded.rounding == plan.rounding
    assert loaded.budgets["bfloat16"] == dict(plan.budgets["bfloat16"])
    assert "budget 40 dB, predicted" in str(loaded)


def test_spread_noise_is_said_and_not_raised() -> None:
    """Every edge of a deep program is as noisy as the others: what can be had is told for each type."""

    def deep(x: torch.Tensor) -> torch.Tensor:
        for _ in range(60):
            x = x.sigmoid()
        return x

    program = exported(deep, X)
    plan = classify(program, with_noise(program, [X], {}, rest=1e-5))
    assert plan.high_precision_nodes == ()
    assert plan.rounding.spread
    assert "float16 gives 32.1 dB here; bfloat16 would give 32.1" in plan.notes[-1]
    assert any(verdict.rule == "spread" for verdict in plan.decisions[30].verdicts)


@pytest.mark.parametrize(("budget", "said"), [(-1.0, "positive number of dB"), ("40", "positive number")])
def test_a_budget_is_a_positive_number(budget: object, said: str) -> None:
    """Anything else is a setting out of range."""
    with pytest.raises(CalibcastError, match=said):
        classify(PROGRAM, RANGES, min_sqnr_db=budget)


def test_a_budget_without_evidence_is_an_error() -> None:
    """It would be missed in silence."""
    with pytest.raises(CalibcastError, match="needs ranges in which rounding was measured"):
        classify(PROGRAM, None, min_sqnr_db=40)


def test_what_moves_data_between_nodes_that_other_rules_keep_is_not_rounded() -> None:
    """Squared distances by a Gram matrix: all but the transposition are kept for headroom, and it goes with them."""

    class Gram(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            squares = (x * x).sum(-1)
            return squares[:, None] + squares[None] - 2 * (x @ x.t())

    points = torch.rand(64, 3, generator=torch.Generator().manual_seed(0)) * 20 + 300
    program = torch.export.export(Gram(), (points,))
    plan = classify(program, calibrate(program, [points], progress=False))
    assert plan.low_precision_nodes == ()
    assert plan["t"].reason == "it only moves data, and has the type of `matmul`"
    torch.testing.assert_close(insert_casts(program, plan).module()(points), Gram()(points), rtol=0, atol=0)


class Best(torch.nn.Module):
    """Scores, then a comparison of them with some of their own."""

    def __init__(self, chosen: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.score, self.chosen = torch.nn.Linear(16, 64, bias=False), chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.score(x)
        return torch.where(self.chosen(scores), scores, -1e30).softmax(-1) @ self.score.weight


def _peaks(scores: torch.Tensor) -> torch.Tensor:
    image = scores.view(-1, 1, 8, 8)
    return (image >= torch.nn.functional.max_pool2d(image, 3, 1, 1)).flatten(1)


@pytest.mark.parametrize(
    ("chosen", "picks"),
    [
        (lambda s: ~(s < s.topk(4).values[:, -1:]), "topk"),
        (lambda s: s == s.amax(-1, keepdim=True), "amax"),
        (_peaks, "max_pool2d"),
    ],
    ids=["topk", "amax", "max_pool"],
)
def test_what_is_compared_with_its_own_is_rounded_with_it(
    chosen: Callable[[torch.Tensor], torch.Tensor], picks: str
) -> None:
    """The scores and the comparison are excluded: what picks among the scores must not round them alone."""
    torch.manual_seed(1)  # no two scores become equal, so that nothing else keeps them high
    batches = [torch.randn(32, 16) for _ in range(2)]
    program = torch.export.export(Best(chosen), (batches[0],))
    ranges = calibrate(program, batches, progress=False)
    plan = classify(program, ranges, nodes_to_exclude={"^linear$", "^(lt|eq|ge)$"})
    assert picks in plan.high_precision_nodes
    assert plan.rounding is not None
    assert Proving(program, batches).run(plan).sqnr_db > plan.rounding.predicted_sqnr_db - 6
    free = classify(program, ranges)
    assert free.rounding is not None
    assert Proving(program, batches).run(free).sqnr_db > 40


def test_a_comparison_with_its_own_largest_needs_no_fp32() -> None:
    """Rounded together, an element and the largest stay equal."""
    torch.manual_seed(0)
    batches = [torch.randn(32, 16)]
    program = torch.export.export(Best(lambda s: s == s.amax(-1, keepdim=True)), (batches[0],))
    assert classify(program, calibrate(program, batches, progress=False)).high_precision_nodes == ()
