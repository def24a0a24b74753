"""What rounding does to one channel of an output alone, where the mean over all channels hides it."""

from __future__ import annotations

import math

import pytest
import torch
from calibcast.calib import calibrate
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.output_noise import channel_noise
from calibcast.calib.rounding import rounded
from calibcast.calib.rounding_edges import Edge
from calibcast.calib.rounding_evidence import RoundingObserver
from torch import nn

LOW = (torch.float16, torch.bfloat16)
CHANNELS, BAD = 16, 11


class OneBad(nn.Module):
    """Sines, and in one channel a number that loses its digits on the way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, CHANNELS]."""
        bad = (x[:, BAD : BAD + 1] + 200) - 200
        return torch.cat([x[:, :BAD].sin(), bad, x[:, BAD + 1 :].sin()], 1)


X = torch.randn(256, CHANNELS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("low", LOW)
def test_the_noise_is_that_of_the_channel_alone(low: torch.dtype) -> None:
    """As large as a run of the channel shows, CHANNELS times the mean; an edge into other channels makes none."""
    program = torch.export.export(OneBad(), (X,))
    [expected] = ProgramRunner(program).run([X])
    alone = RoundingObserver(ProgramRunner(program), 1).of_channel([X], {}, 0, BAD, expected)[low]
    by_edge = {edge.key: noise for edge, noise in alone.items()}
    changed = expected.clone()
    changed[:, BAD] = rounded(X[:, BAD] + 200, low) - 200
    truth = float(channel_noise(changed, expected)[BAD])
    assert by_edge["sub", "add", 0] == pytest.approx(truth, rel=0.05)
    assert by_edge["sin", "x", 0] == 0.0
    mean = calibrate(program, [X], progress=False).rounding.filter(node="sub", low_precision_type=str(low)[6:])
    assert mean["noise"][0] == pytest.approx(truth / CHANNELS, rel=0.05)


def test_a_faint_channel_is_held_to_the_power_that_the_budget_holds_it_to() -> None:
    """Of 64 shares of one whole, a rare one is compared with the mean power, also where it is measured alone."""
    logits = torch.randn(512, 64, generator=torch.Generator().manual_seed(1)) * 2
    logits[:, 5] -= 12
    program = torch.export.export(Shares(), (logits,))
    [expected] = ProgramRunner(program).run([logits])
    alone = RoundingObserver(ProgramRunner(program), 1).of_channel([logits], {}, 0, 5, expected)[torch.float16]
    truth = float(channel_noise(rounded(expected, torch.float16), expected)[5])
    assert alone[Edge("output", "softmax", 0)] == pytest.approx(truth, rel=0.05)
    assert -10 * math.log10(truth) > 80


class Shares(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.softmax(-1)
