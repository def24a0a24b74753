"""Inputs that are numbers which the export left open, such as a length."""

from __future__ import annotations

import torch
from calibcast.calib.batches import signature_of
from calibcast.engines.tensorrt.profiles import profiles
from torch.export import Dim

from tests.unmeasured import calibrate


class Repeated(torch.nn.Module):
    def forward(self, x: torch.Tensor, times: int) -> torch.Tensor:
        return (x * 2).repeat(times, 1)


def test_an_engine_is_built_for_the_numbers_that_calibration_saw() -> None:
    """Without them such an input had no upper bound, and the error asked for the ranges that were given."""
    x = torch.randn(2, 4)
    program = torch.export.export(Repeated().eval(), (x, 3), dynamic_shapes=({0: None}, Dim.DYNAMIC))
    ranges = calibrate(program, [(x, 3), (x, 5), (x, 5)], progress=False)
    assert ranges.calibration.input_sizes["times"] == [{"3": 1, "5": 2}]
    assert profiles(signature_of(program), ranges)[1] == ((3,), (5,), (5,))
