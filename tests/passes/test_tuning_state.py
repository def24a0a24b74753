"""`tune` and `rescale` over a sequence: what the plan gets wrong in one call is in the state of the next."""

from __future__ import annotations

import pytest
import torch
from calibcast import calibrate, tune
from calibcast.calib import BudgetError, NewSequence
from calibcast.passes.proving import Proving
from calibcast.passes.rescaling.checking import Check
from calibcast.passes.rescaling.rewriting import Exponents


class Phase(torch.nn.Module):
    """An oscillator. Its phase grows with each call, and half precision holds small angles only."""

    phase: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", torch.zeros(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.phase.add_(x)
        return self.phase.sin()


STEPS = [torch.linspace(9, 11, 64)] * 8
PROGRAM = torch.export.export(Phase().eval(), (STEPS[0],))


def test_the_proof_includes_the_error_that_adds_up() -> None:
    """From the saved state each call has 50 dB in half; the eighth of a sequence has 33."""
    ranges = calibrate(PROGRAM, STEPS, progress=False, carry_state=True, rounding_batches=1)
    alone = tune(PROGRAM, ranges, STEPS)
    assert alone.high_precision_nodes == ("add_",)
    assert alone.proof.sqnr_db > 46
    assert not alone.proof.carry_state
    plan = tune(PROGRAM, ranges, STEPS, carry_state=True)
    assert "sin" in plan.high_precision_nodes
    assert plan.proof.carry_state
    assert "proven on 8 batches in sequence" in str(plan)
    with pytest.raises(BudgetError, match=r"gives 3\d.* dB \(batch [67], output 0\)"):
        tune(PROGRAM, ranges, STEPS, carry_state=True, nodes_to_include=["sin"])


def test_resets_are_the_users() -> None:
    """Where every batch begins a sequence, the proof is that of single calls."""
    ranges = calibrate(PROGRAM, STEPS, progress=False)
    begun = tune(PROGRAM, ranges, [NewSequence(x) for x in STEPS], carry_state=True)
    assert begun.proof.outputs == tune(PROGRAM, ranges, STEPS).proof.outputs


def test_the_sequence_with_inputs_times_two_is_its_own() -> None:
    """Twice the steps from the saved state on, not from where the first sequence ended."""
    proving = Proving(PROGRAM, STEPS[:3], carry_state=True)
    for place, batch in enumerate(proving.doubled):
        torch.testing.assert_close(batch.results[0], (2 * (place + 1) * STEPS[0]).sin())


class Growing(torch.nn.Module):
    """A sum over the calls so far, which half precision cannot hold from the seventh on."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x)
        return (self.total * 1.0).abs()


def test_what_becomes_infinite_late_in_a_sequence_is_found_and_raised() -> None:
    """The node is found by running the sequence up to the batch in which it went wrong."""
    steps = [torch.full((4,), 10_000.0)] * 8
    program = torch.export.export(Growing().eval(), (steps[0],))
    ranges = calibrate(program, steps[:1], progress=False)
    low = tune(program, ranges, steps)
    assert {"mul", "abs_1"} <= set(low.low_precision_nodes)
    proving = Proving(program, steps, carry_state=True)
    outcome = proving.run(low)
    assert outcome.bad is not None
    assert outcome.bad.index == 6
    assert proving.nonfinite_nodes(low, outcome.bad)[0] == "mul"
    plan = tune(program, ranges, steps, carry_state=True)
    assert {"mul", "abs_1"} <= set(plan.high_precision_nodes)
    assert "in a run of batch 6" in plan.explain("mul")


def test_rescaling_is_checked_over_the_sequence() -> None:
    """A program that differs only in what it keeps is found out by the second batch."""

    class Drifting(Phase):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.phase.add_(x)
            given = self.phase.sin()
            self.phase.mul_(1.0001)
            return given

    made = torch.export.export(Drifting().eval(), (STEPS[0],))
    assert Check.of(PROGRAM, STEPS, None, None).difference(made, Exponents()) is None
    found = Check.of(PROGRAM, STEPS, None, None, carry_state=True).difference(made, Exponents())
    assert found is not None
    assert "batch 1" in found.reason
    begun = [NewSequence(x) for x in STEPS]
    assert Check.of(PROGRAM, begun, None, None, carry_state=True).difference(made, Exponents()) is None
