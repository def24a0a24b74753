"""`tune` gives back to the low type what is large, and raises what is small instead."""

from __future__ import annotations

import math

import pytest
import torch
from calibcast import RangeTable, classify, tune
from calibcast.calib.rounding_edges import rounding_edges
from calibcast.passes.proving import Proving
from calibcast.passes.relaxing import _Filling
from torch.export import ExportedProgram

from tests.passes.measured import exported, with_noise

INF = math.inf
X = torch.randn(128, 64, generator=torch.Generator().manual_seed(2)).clamp(-2, 2)


def large_beside_small(x: torch.Tensor) -> torch.Tensor:
    """256 sines that rounding hardly touches, and 64 numbers that lose their digits."""
    many = (x[:, :, None] * torch.arange(4.0)).sin().flatten(1)
    return torch.cat([many, (x + 300) - 300], 1)


def test_a_large_node_is_given_back_once_the_small_one_that_mattered_is_raised() -> None:
    """The table has more noise at the sines, which go first, than at the difference, for which a run fails."""
    program = exported(large_beside_small, X)
    ranges = with_noise(program, [X], {("sin", "mul"): 5e-5, ("sub", "add"): 2e-5})
    plan = tune(program, ranges, [X])
    assert {"add", "sub"} <= set(plan.high_precision_nodes)
    assert {"mul", "sin"} <= set(plan.low_precision_nodes)
    assert plan.proof is not None
    assert plan.proof.sqnr_db >= 40


class Wide(torch.nn.Module):
    """Forty small steps that are about as noisy as the one wide layer, which is nearly all bytes and work."""

    def __init__(self) -> None:
        super().__init__()
        self.into = torch.nn.Linear(8, 2048)
        self.out = torch.nn.Linear(2048, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0.5 * self.out(self.into(x).tanh())
        for _ in range(20):
            x = x + 0.1 * x.sin()
            x = x - 0.1 * x.sin()
        return x


def wide() -> tuple[ExportedProgram, torch.Tensor, RangeTable]:
    """With a table in which each edge of the wide layer makes twice the noise that any other makes."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    program = torch.export.export(Wide().eval(), (x,))
    layer = {"linear", "tanh", "linear_1"}
    noise = {e.key[:2]: 4e-8 for e in rounding_edges(program) if not layer.isdisjoint(e.key)}
    return program, x, with_noise(program, [x], noise, rest=2e-8)


def test_where_many_edges_are_alike_the_budget_goes_to_what_is_large() -> None:
    """Edges that are raised by their noise alone take the wide layer with them."""
    program, x, ranges = wide()
    plan = tune(program, ranges, [x], min_sqnr_db=62)
    assert plan.proof is not None
    assert plan.proof.sqnr_db >= 62
    assert plan.share()[1] > 0.9
    small = next(name for name in plan.high_precision_nodes if "fill" in plan.explain(name))
    assert "nodes of more bytes or work fill the budget of 62" in plan.explain(small)


def test_a_search_that_ended_with_everything_in_fp32_goes_back() -> None:
    """The table says that all low meets 50 dB, a run says no, and no edge is to blame. All went up."""
    program, x, ranges = wide()
    plan = tune(program, ranges, [x], min_sqnr_db=50)
    assert plan.proof is not None
    assert plan.proof.sqnr_db >= 50
    assert 1 <= plan.proof.runs <= 5
    assert 1 <= plan.proof.relaxing_runs <= 12
    assert str(plan.proof).endswith(f"runs, and {plan.proof.relaxing_runs} to relax it")
    assert plan.share()[1] > 0.9


def test_a_run_that_misses_ends_early_and_begins_with_what_was_worst() -> None:
    """Ten times the angle is ten times the error."""
    x = torch.linspace(-3, 3, 256)
    program = exported(lambda x: (x * 10).sin(), x)
    low = classify(program, None, nodes_to_include=[".*"])
    proving = Proving(program, [x, 10 * x, x])
    whole = proving.run(low)
    assert (whole.batches, whole.worst_place.batch) == (3, 1)
    assert proving.run(low, whole.sqnr_db).batches == 3
    missed = proving.run(low, whole.sqnr_db + 1)
    assert missed.batches <= 1  # the batch alone, or with its inputs times two
    assert missed.sqnr_db < whole.sqnr_db + 1


@pytest.mark.parametrize(
    ("taken", "spare", "failing", "limit"),
    [
        (True, 1.9, INF, 1e-4),  # hardly any room
        (True, 10.0, INF, 1e-4 * 10**0.5),  # half of it
        (True, 10.0, 2e-4, math.sqrt(2) * 1e-4),  # the middle to what was too much
        (False, -4.0, INF, 1e-4 * 10**-0.2),
        (False, -0.1, INF, 1e-4 * 10**-0.1),
        (False, -INF, INF, 1e-4 * 10**-0.5),
    ],
)
def test_what_the_table_may_predict_is_learned_from_runs(
    taken: bool, spare: float, failing: float, limit: float
) -> None:
    filling = _Filling(frozenset(), 1e-4, failing)
    filling.learn(1e-4, spare, taken)
    assert filling.limit == pytest.approx(limit)
    assert filling.failing == (failing if taken else 1e-4)
