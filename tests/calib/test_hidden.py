"""What operators sum inside: exact where values lie far from zero, and in fp32 where the tensor is narrower."""

import math

import pytest
import torch
from calibcast.calib import calibrate
from calibcast.calib import hidden as hidden_module
from calibcast.calib.ranges import RangeTable
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom


class Norm(nn.Module):
    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:])


class RootMeanSquare(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:])


class Pooled(nn.Module):
    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 1)


def hidden(model: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """The largest sum and the least spread of the one operator that hides something."""
    program = torch.export.export(model.eval(), (x,))
    table: RangeTable = calibrate(program, [(x,)], progress=False)
    values = table.statistics().hidden
    row = int((values[:, 0] > -math.inf).nonzero()[0])
    return float(values[row, 0]), float(values[row, 1])


@pytest.mark.parametrize("value", [30.3, 1000.1, -1e6])
def test_slices_of_one_value_deviate_by_nothing(value):
    """A bound that is rounding alone would call a lost epsilon harmless."""
    largest, least = hidden(Norm(), torch.full((4, 512), value))
    assert least < 1e-9 * value * value
    assert largest == pytest.approx(512 * value * value, rel=1e-5)


def test_a_small_spread_far_from_zero_is_found():
    torch.manual_seed(0)
    x = 1000 + torch.randn(64, 512)
    _, least = hidden(Norm(), x)
    assert least == pytest.approx(float(x.double().var(1, correction=0).min()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_half_precision_are_formed_in_fp32(dtype):
    x = torch.full((2, 64), 300.0, dtype=dtype)
    largest, least = hidden(RootMeanSquare(), x)
    assert largest == pytest.approx(64 * float(x[0, 0]) ** 2)
    assert least == pytest.approx(float(x[0, 0]) ** 2)


def test_a_pool_with_one_window_is_the_sum_of_magnitudes():
    x = torch.randn(2, 3, 5, 7)
    largest, least = hidden(Pooled(), x)
    assert largest == pytest.approx(float(x.abs().sum((2, 3)).max()), rel=1e-5)
    assert least == math.inf


def test_large_tensors_are_taken_in_pieces_that_keep_slices_whole(monkeypatch):
    """Each piece is some rows of a dimension that is not reduced; a small tensor is taken as it is."""
    monkeypatch.setattr(hidden_module, "_STEP", 100)
    x = torch.arange(1200.0).reshape(3, 40, 10)
    small = x[:, :3]
    assert hidden_module._pieces(small, [2])[0] is small
    pieces = hidden_module._pieces(x, [2])
    assert all(piece.numel() <= 100 and piece.shape[2] == 10 for piece in pieces)
    assert torch.equal(torch.cat(pieces, 1), x)
    assert [tuple(piece.shape) for piece in hidden_module._pieces(x, [1])] == [(3, 40, 1)] * 10
