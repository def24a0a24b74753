"""Noise by channel: what is not finite is never no noise, and a single element is no channel."""

from __future__ import annotations

import math

import torch
from calibcast.calib.output_noise import channel_noise


def test_nan_is_infinite_noise() -> None:
    """NaN compares false with everything; it must not read as no noise."""
    reference = torch.ones(64, 2)
    ours = reference.clone()
    ours[3, 1] = math.nan
    assert channel_noise(ours, reference).tolist() == [0.0, math.inf]


def test_each_channel_is_held_to_its_own_power() -> None:
    """The same error weighs more in a weaker channel."""
    reference = torch.stack([torch.full((64,), 100.0), torch.ones(64)], -1)
    noise = channel_noise(reference + 0.01, reference)
    torch.testing.assert_close(noise, torch.tensor([1e-8, 1e-4], dtype=torch.float64), rtol=1e-2, atol=0)


def test_a_row_of_logits_is_one_channel() -> None:
    """Of one row, a logit near 0 has no power to be held to."""
    reference = torch.tensor([[1.0, 1e-3, -2.0]])
    assert channel_noise(reference + 1e-3, reference).shape == (1,)
