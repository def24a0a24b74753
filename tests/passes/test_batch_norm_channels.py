"""How large a channel's mean is beside its deviation, from the statistics that a batch norm holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibcast.passes.channels import channels_of
from torch import nn


def ratio(mean: Any, variance: Any, function: Callable[..., Any] | None = None) -> float | None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", None if mean is None else torch.tensor(mean))
            self.register_buffer("variance", None if variance is None else torch.tensor(variance))

        def forward(self, x: torch.Tensor) -> Any:
            own = x.mean(0)
            mean = own if self.mean is None else self.mean
            return nn.functional.batch_norm(x, mean, own if self.variance is None else self.variance)

    program = torch.export.export(Net(), (torch.ones(2, len(mean or variance)),))
    node = next(n for n in program.graph.nodes if "norm" in n.name)
    assert channels_of(program)(next(n for n in program.graph.nodes if n.op == "placeholder")) is None
    return channels_of(program)(node)


@pytest.mark.parametrize(
    ("mean", "variance", "expected"),
    [
        ([2.0, -3.0], [4.0, 1.0], 9.0),
        ([2.0, 1.0], [1.0, 4.0], 4.0),
        ([0.0, 0.0], [1.0, 1.0], 0.0),
        ([1.0], [0.0], 1e30),  # a channel that never varied
        (None, [1.0, 1.0], None),  # computed by the program
        ([1.0, 1.0], None, None),
    ],
)
def test_the_channel_of_the_largest_ratio_counts(mean: Any, variance: Any, expected: float | None) -> None:
    found = ratio(mean, variance)
    assert found == (expected if expected is None else pytest.approx(expected))
