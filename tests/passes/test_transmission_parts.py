"""The numbers that `passes/transmission.py` takes from facts and calls: signs, sizes, steps, powers, terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibcast.passes import TensorFacts
from calibcast.passes.transmission import (
    Need,
    Seen,
    _absolute,
    _contracted,
    _factors,
    _floor,
    _largest,
    _sign,
    _steepness,
    _step,
)
from torch import fx, nn

INF = math.inf


def node_of(function: Callable[..., Any], *args: torch.Tensor) -> fx.Node:
    class Net(nn.Module):
        def forward(self, *inputs: torch.Tensor) -> Any:
            return function(*inputs)

    graph = torch.export.export(Net(), args).graph
    return [node for node in graph.nodes if node.op == "call_function"][-1]


X = torch.ones(2, 3, 4)
NODE = node_of(torch.neg, X)


def seen(facts: TensorFacts | None) -> Seen:
    return Seen(lambda node: facts, lambda node: None, lambda node: None)


@pytest.mark.parametrize(
    ("least", "most", "sign"),
    [(0.0, 3.0, 1), (1.0, 3.0, 1), (-3.0, 0.0, -1), (-3.0, -1.0, -1), (-1.0, 1.0, 0), (0.0, 0.0, 1), (None, 3.0, 0),
     (1.0, None, 0)],
)  # fmt: skip
def test_a_tensor_has_a_sign_where_all_its_elements_have(least: float | None, most: float | None, sign: int) -> None:
    assert _sign(NODE, seen(TensorFacts("x", min=least, max=most))) == sign


@pytest.mark.parametrize(("number", "sign"), [(2.0, 1), (0.0, 1), (-2, -1), (0.5, 1), (-0.5, -1)])
def test_a_number_has_its_own_sign(number: float, sign: int) -> None:
    assert _sign(number, seen(None)) == sign


def test_what_is_not_known_has_none() -> None:
    assert _sign(NODE, seen(None)) == _sign("text", seen(None)) == 0


@pytest.mark.parametrize(
    ("value", "facts", "largest"),
    [(3, None, 3), (-3.5, None, 3.5), (NODE, TensorFacts("x", absmax=7.0), 7.0), (NODE, TensorFacts("x"), INF),
     (NODE, None, INF), (None, None, INF)],
)  # fmt: skip
def test_the_largest_magnitude(value: Any, facts: TensorFacts | None, largest: float) -> None:
    assert _largest(value, seen(facts)) == largest


@pytest.mark.parametrize(
    ("smallest", "floor", "found"),
    [(0.5, 0.0, 0.5), (0.125, 0.25, 0.25), (None, 0.0, 0.0), (None, 0.25, 0.25), (0.0, 0.0, 0.0), (2.0, 0.25, 2.0)],
)
def test_a_relative_error_counts_from_the_smallest_magnitude_on(
    smallest: float | None, floor: float, found: float
) -> None:
    need = Need("r", floor=floor, share=2.0**-10)
    assert _floor(NODE, need, seen(TensorFacts("y", smallest=smallest))) == found
    assert _floor(NODE, need, seen(None)) == floor
    assert _absolute(NODE, need, seen(TensorFacts("y", smallest=smallest))) == Need("r", noise=2.0**-10 * found**2)


def test_an_absolute_need_stays_and_the_smaller_of_both_counts() -> None:
    facts = seen(TensorFacts("y", smallest=0.5))
    assert _absolute(NODE, Need("r", noise=3.0, most=8.0, floor=0.25), facts) == Need("r", noise=3.0, floor=0.25)
    assert _absolute(NODE, Need("r", noise=2.0**-20, share=2.0**-10), facts).noise == 2.0**-20
    assert _absolute(NODE, Need("r", noise=1.0, share=2.0**-10), facts).noise == 2.0**-12


@pytest.mark.parametrize(
    ("power", "facts", "steep"),
    [(3, None, 3.0), (-3.5, None, 3.5), (0.5, None, 1.0), (1, None, 1.0), (NODE, TensorFacts("p", absmax=4.0), 4.0),
     (NODE, TensorFacts("p", absmax=0.25), 1.0), (NODE, TensorFacts("p"), 1.0), (NODE, None, 1.0), (None, None, 1.0)],
)  # fmt: skip
def test_a_power_is_as_steep_as_its_exponent_and_never_flatter_than_a_line(
    power: Any, facts: TensorFacts | None, steep: float
) -> None:
    assert _steepness(power, seen(facts)) == steep


@pytest.mark.parametrize(
    ("function", "facts", "step"),
    [
        (torch.floor, None, 1.0),
        (lambda x: x // 0.5, None, 0.5),
        (lambda x: x // -8, None, 8.0),
        (lambda x: x // x, TensorFacts("d", rms=0.25), 0.25),
        (lambda x: x // x, TensorFacts("d", rms=0.0), 1.0),
        (lambda x: x // x, TensorFacts("d"), 1.0),
        (lambda x: x // x, None, 1.0),
    ],
)
def test_steps_are_as_long_as_the_divisor(function: Any, facts: TensorFacts | None, step: float) -> None:
    assert _step(node_of(function, X), seen(facts)) == step


@pytest.mark.parametrize(
    ("function", "x", "factors"),
    [
        (lambda x: x.prod(1), X, 3),
        (lambda x: x.prod(-1), X, 4),
        (lambda x: x.prod(0), X, 2),
        (lambda x: x.prod(), X, 24),
        (lambda x: x.cumprod(2), X, 4),
        (lambda x: x.prod(), torch.ones(()), 1),
    ],
)
def test_a_product_has_as_many_factors_as_its_dimension(function: Any, x: torch.Tensor, factors: int) -> None:
    assert _factors(node_of(function, x)) == factors


@pytest.mark.parametrize(
    ("equation", "shapes", "terms"),
    [
        ("ij,jk->ik", ((2, 3), (3, 4)), 3),
        ("ij, kj -> ik", ((2, 3), (4, 3)), 3),
        ("bij,bij->b", ((2, 3, 4), (2, 3, 4)), 12),
        ("i,j->ij", ((2,), (3,)), 1),
        ("ij,jk", ((2, 3), (3, 4)), None),
        ("...j,jk->...k", ((2, 3), (3, 4)), None),
    ],
)
def test_an_einsum_sums_what_is_not_in_its_result(
    equation: str, shapes: tuple[tuple[int, ...], ...], terms: int | None
) -> None:
    tensors: Any = [SimpleNamespace(meta={"val": torch.ones(shape)}) for shape in shapes]
    node: Any = SimpleNamespace(args=(equation, tensors))
    assert _contracted(node, tensors) == terms
    assert _contracted(node, tensors[:1]) is None
    assert _contracted(SimpleNamespace(args=(NODE,)), tensors) is None  # type: ignore[arg-type]
