"""By how much the sums inside operators shrink, when what they read is stored as 2^-k of itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from calibcast.calib.hidden_exponents import hidden_exponents
from torch import nn


class Net(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        first, second = x.split(2, 0)
        return (
            F.layer_norm(x, (8,)),
            x.sum(-1),
            y.mean(),
            F.scaled_dot_product_attention(x[None], y[None], y[None]),
            second.sum(-1),
            first.relu(),
            torch.matmul(x, y.t()),
        )


PROGRAM = torch.export.export(Net(), (torch.ones(4, 8), torch.ones(4, 8)))


@pytest.mark.parametrize(
    ("exponents", "found"),
    [
        ({}, {}),
        ({("x", 0): 3}, {"layer_norm": (6, 6), "sum_1": (3, 0)}),
        ({("y", 0): -2}, {"mean": (-2, 0)}),
        ({("split", 1): 5}, {"sum_2": (5, 0)}),
        ({("split", 0): 5}, {}),
        ({("unsqueeze", 0): 3}, {"scaled_dot_product_attention": (3, 0)}),
        ({("unsqueeze_1", 0): 4}, {"scaled_dot_product_attention": (4, 0)}),
        ({("unsqueeze", 0): 3, ("unsqueeze_1", 0): 4}, {"scaled_dot_product_attention": (7, 0)}),
        ({("unsqueeze", 0): 3, ("unsqueeze_1", 0): -3}, {}),
        ({("unsqueeze_2", 0): 4}, {}),  # the values
        ({("x", 1): 3}, {}),
    ],
)
def test_sums_shrink_as_what_they_read_and_squares_twice(
    exponents: dict[tuple[str, int], int], found: dict[str, tuple[int, int]]
) -> None:
    assert hidden_exponents(PROGRAM, exponents) == found
