"""The small questions of `passes/transmission.py`, each at the place where its answer turns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from calibcast.passes import TensorFacts
from calibcast.passes.transmission import _are_far_from_zero, _plus
from torch import fx, nn


def node_of(function: Any, *args: torch.Tensor) -> fx.Node:
    class Net(nn.Module):
        def forward(self, *inputs: torch.Tensor) -> Any:
            return function(*inputs)

    graph = torch.export.export(Net(), args).graph
    return next(node for node in graph.nodes if node.op == "call_function")


X = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("function", "plus"),
    [
        (lambda x, y: x + y, True),
        (lambda x, y: x - y, False),
        (lambda x, y: torch.add(x, y, alpha=2.5), True),
        (lambda x, y: torch.add(x, y, alpha=-2), False),
        (lambda x, y: torch.sub(x, y, alpha=2), False),
        (lambda x, y: torch.sub(x, y, alpha=-2), False),
    ],
)
def test_a_sum_grows_with_both_of_its_terms_but_a_difference_does_not(function: Any, plus: bool) -> None:
    assert _plus(node_of(function, X, X)) is plus


def histogram(**counts: int) -> list[int]:
    """Counts by biased exponent: `b127` are magnitudes from 1 to 2."""
    found = [0] * 256
    for name, count in counts.items():
        found[int(name[1:])] = count
    return found


@pytest.mark.parametrize(
    ("least", "counts", "far"),
    [
        # A variance of 1/16 around zero has elements below 4/4 = 1 and their power of two: up to exponent 127.
        (1 / 16, {"b127": 4}, False),
        (1 / 16, {"b127": 3}, True),  # less than half of the eight that are normalised
        (1 / 16, {"b128": 300}, True),
        (1 / 16, {"b1": 4, "b128": 300}, False),
        (1 / 15, {"b127": 4}, False),
        (1 / 17, {"b127": 4, "b126": 0}, True),
        (1e77, {"b255": 300}, True),  # NaN and Inf are not small, however large the variance
        (1e77, {"b254": 4}, False),
        (1e-90, {"b0": 4}, False),  # zeros always are
        (1e-90, {"b1": 4}, True),
        (0.0, {"b0": 300}, True),  # nothing to divide by: another rule's affair
        (math.inf, {}, False),
    ],
)
def test_a_slice_is_far_from_zero_when_few_of_its_elements_are_small(
    least: float, counts: dict[str, int], far: bool
) -> None:
    node = node_of(lambda x: nn.functional.layer_norm(x, (8,)), X)
    assert _are_far_from_zero(node, TensorFacts("x", histogram=histogram(**counts)), least) is far


@pytest.mark.parametrize(("least", "far"), [(1.0, True), (math.inf, False)])
def test_without_a_histogram_an_offset_is_taken_to_be_there(least: float, far: bool) -> None:
    node = node_of(lambda x: nn.functional.layer_norm(x, (8,)), X)
    assert _are_far_from_zero(node, TensorFacts("x"), least) is far
