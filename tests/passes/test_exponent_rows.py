"""Every row of the table of exponents alone: it keeps every bit, and without it a law fails."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from calibcast.calib.graph import base_op
from calibcast.calib.operators.exponents import EQUATIONS, POWER, POWERS
from calibcast.calib.ranges import RangeTable
from calibcast.passes.rescaling.rewriting import rewritten
from torch import nn
from torch.export import ExportedProgram

from benchmarks.rescaling_laws import random_exponents
from tests.passes.exponent_rows import CALLS, Call
from tests.passes.rescaling_models import measured

# What an operator asks that has no values of its own, or gives none that are scaled: nothing is lost without it.
ASKS_NOTHING = frozenset(name for name, text in EQUATIONS.items() if not text)


class Row(nn.Module):
    """An operator between weights and a tanh, so that only its own row stands between them."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call, self.back = call, nn.Parameter(torch.randn(()))
        self.a, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.back * self.call(self.a + 0, self.b + 0)).sum() + x


def row_of(name: str) -> tuple[ExportedProgram, torch.Tensor, RangeTable]:
    x = torch.ones(2)
    with torch.no_grad():
        program = torch.export.export(Row(CALLS[name]).eval(), (x,))
    assert name.split()[0] in {base_op(node.target) for node in program.graph.nodes}
    return program, x, measured(program, [(x,)])


def same_bits(
    program: ExportedProgram, x: torch.Tensor, ranges: RangeTable, seed: int, rows: Mapping[str, str] = EQUATIONS
) -> tuple[bool, int]:
    """Whether random exponents keep the result, and how many tensors they scale."""
    exponents = random_exponents(program, ranges, seed, rows)
    made = rewritten(program, exponents)
    return torch.equal(made.module()(x), program.module()(x)), len(exponents.tensors)


def test_every_row_has_a_call() -> None:
    assert set(CALLS) == set(EQUATIONS) | {f"pow {n:g}" for n in POWERS}


@pytest.mark.parametrize("name", list(CALLS))
def test_row_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the row every bit stays, and something is scaled; without it, some solution gives other results."""
    program, x, ranges = row_of(name)
    found = [same_bits(program, x, ranges, seed) for seed in range(3)]
    assert all(same for same, _ in found)
    assert sum(scaled for _, scaled in found)
    if name in ASKS_NOTHING:
        return
    wrong = dict(EQUATIONS)
    if name.split()[0] == POWER:
        monkeypatch.setitem(POWERS, float(name.split()[1]), "")
    else:
        wrong[name] = ""
    assert not all(same_bits(program, x, ranges, seed, wrong)[0] for seed in range(8))
