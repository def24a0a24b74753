"""What a channel's noise is divided by, at each number where that turns."""

from __future__ import annotations

import math

import pytest
import torch
from calibcast.calib.output_noise import by_channel, channel_dimension, channel_noise, channel_power, every_channel

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("shape", "dimension"),
    [
        ((), None),
        ((1000,), None),
        ((32, 5), 1),
        ((31, 5), None),  # fewer than 32 elements a channel
        ((4, 8, 5), 2),
        ((4, 7, 5), None),
        ((2, 5, 4, 4), 1),  # an image
        ((1, 5, 4, 4), None),
        ((2, 5, 1, 4, 4), 1),
    ],
)
def test_channels_are_in_dimension_1_of_images_and_in_the_last_of_others(
    shape: tuple[int, ...], dimension: int | None
) -> None:
    x = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    assert channel_dimension(x) == dimension
    parts = by_channel(x)
    if dimension is None:
        assert torch.equal(parts, x.reshape(1, -1))
    else:
        assert [row.tolist() for row in parts] == [one.flatten().tolist() for one in x.unbind(dimension)]


def test_every_channel_may_have_few_elements() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert every_channel(x).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert every_channel(x[0]).tolist() == [[0, 1, 2]]
    assert every_channel(torch.arange(8.0).reshape(1, 2, 2, 2)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def waves(*loud: tuple[float, float]) -> torch.Tensor:
    """[32, channels]: each alternates around its mean. loud: mean and deviation of each."""
    signs = torch.tensor([1.0, -1.0]).repeat(16)
    return torch.stack([mean + deviation * signs for mean, deviation in loud], 1)


def power(*loud: tuple[float, float]) -> list[float]:
    """By element: the mean square that counts for each channel."""
    return (channel_power(waves(*loud)) / 32).tolist()


def test_few_channels_have_their_own_power() -> None:
    assert power((0, 1), (2, 1), (0, 0.5)) == [1.0, 5.0, 0.25]
    assert power(*[(4, 1)] * 6, (0, 1)) == [17.0] * 6 + [1.0]


@pytest.mark.parametrize(
    ("deviation", "expected"),
    [
        (1.0, 17.0),  # as varied as the others: the median power counts
        (0.5, 17.0),  # half as varied: still
        (0.25, 17 / 16),  # a quarter: the sixteenth part
        (0.125, 17 / 256),
        (0.0, 17e-6 * 7 / 8),  # it does not vary: a millionth of the mean power
    ],
)
def test_one_of_eight_that_varies_as_the_others_has_their_unit(deviation: float, expected: float) -> None:
    assert power(*[(4, 1)] * 7, (0, deviation)) == pytest.approx([17.0] * 7 + [expected])


def test_the_larger_of_own_and_typical_power_counts() -> None:
    assert power(*[(4, 1)] * 7, (9, 1)) == [17.0] * 7 + [82.0]


def test_constant_channels_have_no_unit_in_common() -> None:
    assert power(*[(4, 0)] * 7, (1, 0)) == [16.0] * 7 + [1.0]


def test_a_silent_channel_has_a_millionth_of_the_mean_power() -> None:
    assert power((0, 0), (2, 0)) == pytest.approx([2e-6, 4.0])
    assert power((0, 0), (0, 0)) == [0.0, 0.0]


def shares(count: int, rare: float = 0.001) -> torch.Tensor:
    """[32, count] that add up to 1: the first class is rare, the others alike."""
    x = torch.full((32, count), (1 - rare) / (count - 1))
    x[:, 0] = rare
    return x


@pytest.mark.parametrize(("count", "held"), [(63, False), (64, True)])
def test_a_rare_share_of_many_is_held_to_the_mean_power(count: int, held: bool) -> None:
    own = channel_power(shares(count))
    mean = shares(count).double().square().sum(0).mean()
    assert float(own[0]) == pytest.approx(float(mean) if held else 32e-6, rel=1e-5)


@pytest.mark.parametrize(("off", "held"), [(0.9e-3, True), (-0.9e-3, True), (1.1e-3, False), (-1.1e-3, False)])
def test_shares_add_up_to_1_within_a_thousandth(off: float, held: bool) -> None:
    x = shares(64)
    x[5, 3] += off  # of one row
    assert (float(channel_power(x)[0]) > 1e-3) is held


def test_shares_are_not_negative() -> None:
    x = shares(64)
    x[5, 3], x[5, 4] = -0.001, x[5, 4] + x[5, 3] + 0.001
    assert float(channel_power(x)[0]) == pytest.approx(32e-6, rel=1e-5)
    x[5, 4], x[5, 3] = x[5, 4] - 0.001, 0.0
    assert float(channel_power(x)[0]) > 1e-3


def test_what_is_not_finite_in_the_reference_is_left_out() -> None:
    x = waves((0, 1), (0, 2))
    x[0, 0], x[1, 1], x[2, 1] = INF, NAN, -INF
    assert channel_power(x).tolist() == [31.0, 120.0]
    assert channel_noise(torch.zeros_like(x), x).tolist() == [1.0, 1.0]
    ours = x.clone()
    ours[0, 0], ours[1, 1] = 0.0, 5.0
    assert channel_noise(ours, x).tolist() == [0.0, 0.0]


def test_noise_is_that_of_each_channel_by_its_power() -> None:
    x = waves((0, 1), (0, 2))
    ours = x.clone()
    ours[3, 0] += 2.0
    ours[3, 1] += 2.0
    assert channel_noise(ours, x).tolist() == [4 / 32, 4 / 128]
    ours[4, 0] = NAN
    assert channel_noise(ours, x).tolist() == [INF, 4 / 128]
    ours[4, 0] = INF
    assert channel_noise(ours, x).tolist() == [INF, 4 / 128]


def test_noise_in_what_is_all_zero_is_infinite() -> None:
    silent = torch.zeros(32, 2)
    assert channel_noise(silent, silent).tolist() == [0.0, 0.0]
    assert channel_noise(silent + torch.tensor([0.0, 1e-9]), silent).tolist() == [0.0, INF]


def test_complex_results_have_the_noise_of_their_magnitudes() -> None:
    x = torch.complex(waves((0, 1)), waves((0, 1)))
    assert channel_noise(x + 1j, x).tolist() == pytest.approx([0.5])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integers_have_the_share_that_differs(dtype: torch.dtype) -> None:
    x = torch.tensor([[0, 1], [1, 1]], dtype=dtype)
    other = torch.tensor([[0, 1], [0, 1]], dtype=dtype)
    assert channel_noise(other, x).tolist() == [0.25]
    assert channel_noise(x[:0], x[:0]).tolist() == [0.0]
