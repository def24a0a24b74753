"""`classify` alone, without a run: programs whose results change by steps when all edges are rounded together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from calibcast.calib import calibrate
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.output_noise import channel_noise
from calibcast.calib.rounded_runner import RoundedRunner
from calibcast.passes import classify
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from tests.functions import ApplyToX

GENERATOR = torch.Generator().manual_seed(0)
DOWN, CODES, UP = (torch.randn(*shape, generator=GENERATOR) for shape in ((32, 16), (64, 16), (16, 24)))
BATCHES = [torch.randn(128, 32, generator=GENERATOR) / 6 for _ in range(6)]


def nearest(x: torch.Tensor) -> torch.Tensor:
    """Vector quantisation."""
    distances = ((x @ DOWN)[:, None] - CODES[None]).square().sum(-1)
    return F.embedding(distances.argmin(-1), CODES @ UP)


def scalar(x: torch.Tensor) -> torch.Tensor:
    """Finite scalar quantisation (FSQ)."""
    return (torch.tanh(x @ DOWN) * 3.5).round() / 3.5 @ UP


def hard_attention(x: torch.Tensor) -> torch.Tensor:
    tokens = (x @ DOWN).reshape(8, 16, 16)
    best = (tokens @ tokens.flip(-1).transpose(-1, -2)).argmax(-1, keepdim=True)
    return torch.gather(tokens @ UP, 1, best.expand(-1, -1, 24)).flatten(0, 1)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", [nearest, scalar, hard_attention])
def test_a_plan_from_the_table_meets_the_budget_or_says_that_it_does_not(
    function: Callable[[torch.Tensor], torch.Tensor], kind: torch.dtype
) -> None:
    """Each edge alone changes no index in most batches; all of them together do, also in batches that were not seen."""
    program = torch.export.export(ApplyToX(function).eval(), (BATCHES[0],))
    plan = classify(program, calibrate(program, BATCHES[:4], progress=False), low_precision_type=kind)
    assert plan.rounding is not None
    assert not plan.rounding.spread
    assert plan.low_precision_nodes
    run, reference = RoundedRunner(program, plan.low_precision_nodes, kind), ProgramRunner(program)
    noise = [channel_noise(run.run([x])[0], reference.run([x])[0]).max() for x in BATCHES]
    assert -10 * float(torch.stack(noise).max().log10()) >= plan.rounding.min_sqnr_db
