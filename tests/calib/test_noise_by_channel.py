"""Noise by channel against a plain computation in numpy, and each of its limits from both sides."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from calibcast.calib.output_noise import channel_dimension, channel_noise, channel_power, every_channel

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


@pytest.mark.parametrize(
    ("shape", "dimension"),
    [
        ((), None), ((500,), None), ((32, 5), 1), ((31, 5), None), ((4, 8, 5), 2), ((4, 7, 5), None),
        ((2, 5, 4, 4), 1), ((1, 5, 4, 4), None), ((1, 5, 4, 8), 1), ((1, 5, 2, 4, 4), 1), ((32, 1), 1),
    ],
)  # fmt: skip
def test_channels_are_where_each_has_32_elements(shape: tuple[int, ...], dimension: int | None) -> None:
    """The last dimension, but the second of images and volumes."""
    assert channel_dimension(torch.zeros(shape)) == dimension


@pytest.mark.parametrize(("shape", "rows"), [((), 1), ((5,), 1), ((3, 5), 5), ((2, 3, 5), 5), ((2, 3, 4, 5), 3)])
def test_every_channel_is_a_row(shape: tuple[int, ...], rows: int) -> None:
    x = randn(*shape)
    assert every_channel(x).shape == (rows, x.numel() // rows)
    if len(shape) == 4:
        assert torch.equal(every_channel(x)[1], x[:, 1].flatten())


def expected_power(x: np.ndarray) -> np.ndarray:
    """[elements, channels] -> [channels], from the docstring."""
    power = (x**2).sum(0)
    if x.shape[1] >= 8:
        varied = ((x - x.mean(0)) ** 2).sum(0)
        # torch's median is the lower one of two.
        middle, typical = (np.sort(a)[(len(a) - 1) // 2] for a in (varied, power))
        power = np.maximum(power, np.minimum(varied / (0.25 * middle), 1.0) ** 2 * typical)
    return np.maximum(power, 1e-6 * power.mean())


@pytest.mark.parametrize("channels", [2, 7, 8, 9, 20])
@pytest.mark.parametrize("spread", [1.0, 0.45, 0.2, 1e-4])
def test_power_is_as_described(channels: int, spread: float) -> None:
    """The first channel varies by `spread` of the others, around 0; the second is silent."""
    x = randn(64, channels)
    x[:, 0] *= spread
    x[:, 1] = 0.0
    np.testing.assert_allclose(channel_power(x).numpy(), expected_power(x.double().numpy()), rtol=1e-9)


def test_what_is_not_finite_has_no_power() -> None:
    x = randn(64, 3)
    clean = channel_power(x).clone()
    wide = torch.cat([x, torch.tensor([[math.inf, math.nan, 0.0]])])
    torch.testing.assert_close(channel_power(wide), clean)
    assert channel_power(torch.zeros(64, 3)).tolist() == [0.0] * 3


def test_noise_is_what_differs_over_the_power() -> None:
    x = randn(64, 5)
    ours = x + 0.01 * randn(64, 5)
    want = ((ours - x).double() ** 2).sum(0).numpy() / expected_power(x.double().numpy())
    np.testing.assert_allclose(channel_noise(ours, x).numpy(), want, rtol=1e-6)


def test_noise_where_something_is_not_finite() -> None:
    x = torch.ones(64, 2)
    x[0] = torch.tensor([math.inf, math.nan])
    assert channel_noise(torch.full((64, 2), 1.0), x).tolist() == [0.0, 0.0]
    ours = torch.ones(64, 2)
    ours[1, 0] = math.inf
    assert channel_noise(ours, x).tolist() == [math.inf, 0.0]
    silent = torch.zeros(64, 2)
    assert channel_noise(silent + 1, silent).tolist() == [math.inf] * 2
    assert channel_noise(silent, silent).tolist() == [0.0] * 2


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_noise_of_whole_numbers_is_the_share_that_differs(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 4, dtype=dtype)
    ours = x.clone()
    ours[0, :3] = 1
    assert channel_noise(ours, x).tolist() == [3 / 8]
    assert channel_noise(x[:0], x[:0]).tolist() == [0.0]


def test_noise_of_complex_numbers_is_that_of_their_distance() -> None:
    x = torch.complex(randn(64, 2), randn(64, 2))
    noise = channel_noise(x + 0.3j, x)
    want = 64 * 0.09 / x.abs().double().square().sum(0)
    torch.testing.assert_close(noise, want, rtol=1e-4, atol=0)
