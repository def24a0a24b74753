"""`tune`: the plan is run, mended until it meets the budget, and keeps the proof."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibcast import PrecisionPlan, calibrate, classify, tune
from calibcast.calib import BudgetError, rounding_evidence
from calibcast.calib.rounding_table import empty_rounding
from calibcast.passes import tuning
from calibcast.passes.proof import Proof
from calibcast.passes.proving import Proving
from torch import nn

from tests.passes.measured import exported, with_noise

X = torch.linspace(-9, 9, 256)
SURVIVAL = exported(lambda x: (1 - x.sigmoid()).log(), X)


def test_what_only_a_run_shows_is_mended() -> None:
    """The table says that nothing is noisy; run, the logarithm of a difference rounded to 0 is -inf."""
    ranges = with_noise(SURVIVAL, [X], {})
    assert classify(SURVIVAL, ranges).high_precision_nodes == ()
    plan = tune(SURVIVAL, ranges, [X])
    assert {"rsub", "log"} <= set(plan.high_precision_nodes)
    assert plan.proof.sqnr_db >= 40
    assert plan.proof.doubled_sqnr_db >= 40
    assert plan.proof.nonfinite == 0
    assert plan.proof.runs > 1
    assert "NaN or Inf in a run of batch 0" in plan.explain("log")


def test_what_is_kept_for_nothing_is_relaxed() -> None:
    """The table blames an edge that a run finds harmless."""
    program = exported(lambda x: x.tanh().sigmoid(), X)
    ranges = with_noise(program, [X], {("sigmoid", "tanh"): 1e-2})
    assert classify(program, ranges).high_precision_nodes == ("tanh", "sigmoid")
    plan = tune(program, ranges, [X])
    assert plan.high_precision_nodes == ()
    assert plan.proof.sqnr_db > 60


def test_a_budget_that_no_plan_meets_is_an_error_that_says_what_can_be_had() -> None:
    """The user pins what makes the noise."""
    ranges = with_noise(SURVIVAL, [X], {("log", "rsub"): 1e-2})
    with pytest.raises(
        BudgetError, match=r"no plan meets the budget of 40 dB.*float16 gives.*with bfloat16 gives"
    ) as caught:
        tune(SURVIVAL, ranges, [X], nodes_to_include=[".*"])
    assert caught.value.edges
    assert caught.value.proof.nonfinite > 0


def test_a_budget_that_leaves_all_work_in_fp32_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proven plan of fp32 alone is no answer to a user who asked for half, unless they are told."""
    layer = torch.nn.Linear(16, 16)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(layer.eval(), (x,))
    told: list[str] = []
    monkeypatch.setattr(tuning._log, "warning", lambda text, *values: told.append(text % values))
    plan = tune(program, calibrate(program, [x], progress=False), [x], min_sqnr_db=120)
    assert plan.low_precision_nodes == ()
    assert plan.notes[0].startswith("within 120 dB none of the work can run in float16")
    assert plan.notes[0] in str(plan)
    assert plan.notes[0] in told


def test_the_proof_is_saved(tmp_path: Path) -> None:
    """With the plan, batch and all."""
    program = exported(lambda x: x.tanh(), X)
    plan = tune(program, with_noise(program, [X], {}), [X, 2 * X], min_sqnr_db=50)
    plan.save(tmp_path / "plan.json")
    loaded = PrecisionPlan.load(tmp_path / "plan.json")
    assert loaded.proof == plan.proof
    assert (loaded.proof.batches, loaded.proof.min_sqnr_db) == (2, 50.0)
    assert "proven on 2 batches" in str(loaded)
    assert loaded.proof.places == (0,)


def test_a_proof_of_earlier_versions_has_no_places() -> None:
    """Its numbers are those of the floating-point outputs, in order, wherever these are."""
    row = asdict(Proof(40.0, 51.0, 0, 1, None, 50.0, outputs=(52.0, 51.0), places=(1, 3)))
    assert Proof.loaded(row).sqnr_by_place([0, 1]) == {1: 52.0, 3: 51.0}
    assert Proof.loaded({k: v for k, v in row.items() if k != "places"}).sqnr_by_place([1, 3]) == {1: 52.0, 3: 51.0}


def test_a_plan_that_only_just_passes_is_not_relaxed_to() -> None:
    """All low it has 40.7 dB on these data; on others a little nearer to 1 it would be Inf."""
    x = 1 - 10 ** (-3.3 * torch.rand(256, generator=torch.Generator().manual_seed(256)))
    program = exported(torch.erfinv, x)
    plan = tune(program, calibrate(program, [x], progress=False), [x])
    assert plan.high_precision_nodes == ("erfinv",)


def test_spread_noise_is_raised_where_the_budget_asks_for_it() -> None:
    """`classify` leaves sixty alike edges low, and says so; run, they miss the budget, which others meet."""

    def deep(x: torch.Tensor) -> torch.Tensor:
        for _ in range(60):
            x = x.sin()
        return x

    program = exported(deep, X)
    ranges = with_noise(program, [X], {}, rest=2e-6)
    assert classify(program, ranges, min_sqnr_db=60).high_precision_nodes == ()
    plan = tune(program, ranges, [X], min_sqnr_db=60)
    assert 0 < len(plan.high_precision_nodes) <= 60
    assert plan.proof.sqnr_db >= 60


def test_no_plan_is_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where noise is spread, a second plan at any cost may be the first again; the runs are few."""

    def deep(x: torch.Tensor) -> torch.Tensor:
        for _ in range(60):
            x = x.sin()
        return x

    program, run = exported(deep, X), Proving.run
    ranges = with_noise(program, [X], {}, rest=2e-6)
    seen = []

    def counted(proving: Proving, plan: PrecisionPlan, *least: float) -> Any:
        seen.append((plan.low_precision_type, plan.high_precision_nodes))
        return run(proving, plan, *least)

    monkeypatch.setattr(Proving, "run", counted)
    for budget in (60, 66, 72, 90):
        seen.clear()
        with contextlib.suppress(BudgetError):
            tune(program, ranges, [X], min_sqnr_db=budget)
        assert len(seen) == len(set(seen)), budget


def test_a_plan_to_start_with_stays_where_it_is_high() -> None:
    """What it has in fp32 is not questioned; what it has low is."""
    ranges = with_noise(SURVIVAL, [X], {("log", "rsub"): 1.0})
    start = classify(SURVIVAL, None, nodes_to_exclude=["sigmoid"])
    plan = tune(SURVIVAL, ranges, [X], start=start)
    assert plan["sigmoid"].rule == "start"
    assert plan["log"].rule == "rounding"


def test_integer_results_count() -> None:
    """Indices that rounding moves are no noise, and are wrong."""
    x = torch.linspace(0, 3000, 999)
    program = exported(lambda x: (x / 0.1).floor().long(), x)
    ranges = with_noise(program, [x], {("floor", "div"): 1e-2, ("div", "x"): 1e-2})
    plan = tune(program, ranges, [x])
    assert {"div", "floor"} <= set(plan.high_precision_nodes)
    assert plan.proof.integers_changed == 0.0


def test_steps_that_only_all_edges_together_change_are_mended() -> None:
    """The table says that no edge changes an index; run, some do. What leads to the steps goes up, ring by ring."""
    first, second = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    near = torch.linspace(-1e-3, 1e-3, 64)[:, None]  # points as near to the one code as to the other
    x = (first + second) / 2 + near * (first - second)

    def nearest(x: torch.Tensor) -> torch.Tensor:
        return ((x[:, None] - torch.stack([first, second]).to(x)) ** 2).sum(-1).argmin(-1)

    program = exported(nearest, x)
    plan = tune(program, with_noise(program, [x], {}, rest=0.0), [x])
    assert {"argmin", "sum_1"} <= set(plan.high_precision_nodes)
    assert "no edge alone is to blame" in plan.explain("argmin")
    assert plan.proof.integers_changed <= 0.005


class TwoLayers(nn.Module):
    """Two seeded layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)


class Routed(TwoLayers):
    """The largest of four scores picks one of four multiples of a layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        picked = self.first(x)[:, :4].argmax(-1)
        found = torch.stack([self.second(x) * k for k in range(1, 5)], 1)
        return found.gather(1, picked[:, None, None].expand(-1, 1, 32)).squeeze(1)


class Spiking(TwoLayers):
    """A neuron fires above a threshold, which sets it back: a step that is late by one makes others late."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        level, given = torch.zeros_like(x), torch.zeros_like(x)
        for _ in range(4):
            level = 0.8 * level + self.first(x)
            fired = (level > 0.5).float()
            level = level - 0.5 * fired
            given = given + self.second(fired)
        return given


def tuned_on_noise(net: type[nn.Module], seed: int, low: torch.dtype = torch.float16) -> PrecisionPlan:
    torch.manual_seed(seed)
    batches = [torch.randn(64, 32) for _ in range(6)]
    program = torch.export.export(net().eval(), (batches[0],))
    return tune(program, calibrate(program, batches, progress=False), batches, low_precision_type=low)


@pytest.mark.parametrize(
    ("net", "low", "needed", "share"),
    [(Routed, torch.bfloat16, {"argmax", "linear"}, 0.7), (Spiking, torch.float16, {"gt", "linear"}, 0.2)],
)
def test_a_step_that_was_seen_to_change_is_mended_where_it_is(
    net: type[nn.Module], low: torch.dtype, needed: set[str], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No edge of the table changes it, and it was not foreseen. What does not lead there stays low."""
    monkeypatch.setattr(rounding_evidence, "with_steps", lambda sweep, seed, found: found)
    plan = tuned_on_noise(net, 2, low)
    assert plan.proof.sqnr_db >= (26 if low == torch.bfloat16 else 40)
    assert needed <= set(plan.high_precision_nodes)
    assert plan.share()[0] >= share
    assert "many edges together change a step" in str([d.reason for d in plan.decisions])


def test_a_plan_that_only_the_last_run_can_give_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two runs there is no time to go up ring by ring: the last one raises all that leads to a step."""
    monkeypatch.setattr(tuning, "MOST_RUNS", 2)
    monkeypatch.setattr(rounding_evidence, "with_steps", lambda sweep, seed, found: found)
    plan = tuned_on_noise(Spiking, 5)
    assert plan.proof.sqnr_db >= 40
    assert plan.proof.runs == 2


def test_a_chain_of_sums_that_overflow_is_raised_at_once() -> None:
    """Exponentials of inputs times two pass float16 at each step: one run shows all of them."""
    x = 2.2 * torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).clamp(-2.5, 2.5)

    def scan(x: torch.Tensor) -> torch.Tensor:
        total, found = torch.zeros_like(x[0]), []
        for row in x.unbind(0):
            total = 0.9 * total + row.exp()
            found.append(row.exp() / (total + row.exp()))
        return torch.stack(found)

    program = exported(scan, x)
    plan = tune(program, calibrate(program, [x], progress=False), [x])
    assert plan.proof.runs <= 3
    assert plan.proof.doubled_sqnr_db > 40
    assert plan.low_precision_nodes
    assert "passed 65504 in a run of batch 0 with inputs times two" in str([d.reason for d in plan.decisions])


def test_one_toss_up_among_many_integers_is_none() -> None:
    """One of a hundred changes in one of eight batches: an eighth of a percent in all, where half of one is allowed."""
    near = torch.linspace(0.1, 0.9, 100).round(decimals=2).mul(256).floor().div(256) + 1 / 1024
    one = near.clone()
    one[7] = 1 - 2**-13  # float16 makes 1 of it
    program = exported(lambda x: x.floor().long(), near)
    batches = [one, *[near] * 7]
    plan = tune(program, with_noise(program, batches, {}), batches)
    assert plan.high_precision_nodes == ()
    assert 0 < plan.proof.integers_changed <= 0.005


def test_without_evidence_a_plan_is_proven_or_refused() -> None:
    """There is nothing to mend it by; the error says how to get that."""
    ranges = replace(calibrate(SURVIVAL, [X], progress=False), rounding=empty_rounding())
    with pytest.raises(BudgetError, match="Calibrate with rounding_batches"):
        tune(SURVIVAL, ranges, [X], nodes_to_include=[".*"])
    assert tune(SURVIVAL, ranges, [X], nodes_to_exclude=[".*"]).proof.sqnr_db == math.inf


def test_inputs_of_one_byte_are_not_doubled() -> None:
    """float8 has no multiplication."""

    class Stored(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.to(torch.float32))

    torch.manual_seed(0)
    data = [(torch.randn(4, 8).to(torch.float8_e4m3fn),) for _ in range(2)]
    program = torch.export.export(Stored().eval(), data[0])
    plan = tune(program, calibrate(program, data, progress=False), data)
    assert plan["linear"].precision == "low"
    assert plan.proof is not None
    assert plan.proof.sqnr_db >= 40


def hidden_channel(x: torch.Tensor) -> torch.Tensor:
    """Sines of large angles, a little noisy all alike; one channel of 64 is a number that loses its digits."""
    return torch.cat([(12 * x[:, 1:]).sin(), (x[:, :1] + 100) - 100], 1)


def test_the_worst_channel_is_measured_alone_where_the_mean_hides_it() -> None:
    """The table has the mean of the channels, in which the difference makes a 64th of its noise."""
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(2)).clamp(-2, 2)
    program = exported(hidden_channel, x)
    ranges = calibrate(program, [x], progress=False)
    assert classify(program, ranges).high_precision_nodes == ()
    plan = tune(program, ranges, [x])
    assert {"add", "sub"} <= set(plan.high_precision_nodes)
    assert not {"mul", "sin"} & set(plan.high_precision_nodes)
    assert plan.proof.sqnr_db >= 42
    assert plan.proof.runs == 2
    assert "leaves 3" in plan.explain("sub")  # 35 dB in the channel, 53 in the mean


def test_a_channel_that_cannot_be_measured_alone_is_mended_by_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(2)).clamp(-2, 2)
    program = exported(hidden_channel, x)
    ranges = calibrate(program, [x], progress=False)

    def refuse(*_: object) -> None:
        raise RuntimeError("no gradient of this")

    monkeypatch.setattr("calibcast.passes.proving.RoundingObserver.of_channel", refuse)
    plan = tune(program, ranges, [x])
    assert plan.proof.sqnr_db >= 40
    assert "leaves 5" in plan.explain("sub")
