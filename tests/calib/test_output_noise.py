"""Noise by channel: what is not finite is never no noise, and a single element is no channel."""

from __future__ import annotations

import math

import torch
from calibcast.calib.output_noise import POPULATION, channel_noise


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


def test_a_logit_near_0_is_held_to_a_typical_one() -> None:
    """A thousand logits of one unit, of which chance puts some near 0 for every input of a batch."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, generator=generator) + 0.1 * torch.randn(64, 1000, generator=generator)
    noise = channel_noise(logits + 1e-3, logits)
    own = 1e-6 / logits.double().square().mean(0)
    assert own.max() > 40 * noise.max()  # 16 dB
    assert noise.max() < 4 * noise.median()


def test_a_channel_in_a_smaller_unit_is_held_to_its_own_power() -> None:
    """Scores beside boxes in pixels, in whatever number: what they vary by says that they are in another unit."""
    generator = torch.Generator().manual_seed(0)
    boxes, scores = 640 * torch.rand(2, 64, 80, generator=generator), torch.rand(2, 64, 20, generator=generator)
    both = torch.cat([boxes, scores], -1)
    noise = channel_noise(both + 0.01, both)
    own = 128 * 1e-4 / scores.double().square().sum((0, 1))
    torch.testing.assert_close(noise[80:], own, rtol=1e-2, atol=0)


def test_few_channels_are_quantities_of_their_own() -> None:
    """Wind beside temperature in kelvin: both vary by as much, and an error of 3 is none of the one."""
    generator = torch.Generator().manual_seed(0)
    temperature, wind = (offset + 10 * torch.randn(64, 1, generator=generator) for offset in (280, 0))
    both = torch.cat([temperature, wind], -1)
    noise = channel_noise(both + 3, both)
    assert noise[1] > 100 * noise[0]
    assert both.shape[1] < POPULATION


def _pitches(classes: int, frames: int = 100) -> torch.Tensor:
    """Scores [frames, classes] of a pitch that glides over a part of the classes: most are silent, some almost."""
    centre = torch.linspace(0.3, 0.6, frames)[:, None] * classes
    return -0.5 * ((torch.arange(classes) - centre) / 2) ** 2


def test_a_rare_class_of_a_softmax_is_held_to_an_average_one() -> None:
    """Rounding is relative, so scores of -30 are off by more, and decide over classes that never win."""
    scores = _pitches(384).clamp(min=-30)
    shares = scores.softmax(-1)
    noisy = 2e-3 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(0))
    off = (scores * (1 + noisy)).softmax(-1)
    power = shares.double().square().sum(0)
    own, noise = (off - shares).double().square().sum(0) / power, channel_noise(off, shares)
    assert own.max() > 50 * noise.max()
    assert noise.max() < 1e-4
    torch.testing.assert_close(noise[power > power.mean()], own[power > power.mean()])  # they answer for themselves


def test_only_shares_of_a_whole_are_held_together() -> None:
    """The same numbers, when they do not add up to 1, when some are negative, and when they are few."""
    shares = _pitches(384).softmax(-1)
    for given in (1.5 * shares, shares - 1e-3, torch.cat([shares, -shares], -1), shares[:, :140]):
        noise = channel_noise(given + 1e-4, given)
        assert noise.max() > 100 * channel_noise(shares + 1e-4, shares).max()
    few = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(50, 1)
    few[:, 0] = few[:, 0] * 1e-3
    few[:, 1] = 1 - few[:, 0]
    assert channel_noise(few + 1e-4, few)[0] > 0.01
