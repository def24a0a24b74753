"""Where rescaling is not shown to be exact: the place at which products vanish."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from calibcast.passes.rescaling.exactness import Refusal, _least, _vanishing, refusals
from calibcast.passes.rescaling.measures import Measures
from calibcast.passes.rescaling.rewriting import Exponents
from torch import fx


def product() -> fx.Node:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x * y

    graph = torch.export.export(Net(), (torch.ones(2), torch.ones(2))).graph
    return next(node for node in graph.nodes if node.op == "call_function")


def measures(**smallest: float) -> Measures:
    rows: dict[Any, int] = {(name, 0): row for row, name in enumerate(smallest)}
    return cast(Measures, SimpleNamespace(rows=rows, smallest=list(smallest.values())))


@pytest.mark.parametrize(
    ("x", "y", "vanishes"),
    [
        (2.0**-63, 2.0**-63, False),  # 2^-126, the smallest normal number, is still there in full
        (2.0**-63, 2.0**-64, True),
        (2.0**-100, 1.0, False),
        (2.0**-100, 2.0**-100, True),
        (0.0, 2.0**-140, False),  # all zeros: nothing to lose
    ],
)
def test_a_product_that_may_underflow_is_told(x: float, y: float, vanishes: bool) -> None:
    assert bool(list(_vanishing(product(), measures(x=x, y=y)))) is vanishes


def test_the_least_magnitude_of_what_was_not_seen_is_none() -> None:
    x, y = product().all_input_nodes
    seen = measures(x=0.0)
    assert (_least(seen, x, 0), _least(seen, y, 0), _least(measures(x=3.0), x, 0)) == (None, None, 3.0)


def reasons(
    function: Any, exponents: Exponents, shape: tuple[int, ...] = (2, 8), **known: Any
) -> list[tuple[str, str]]:
    """What is refused. known: the smallest magnitudes of tensors, and what nodes form inside."""

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return cast(torch.Tensor, function(x, y))

    program = torch.export.export(Net(), (torch.ones(shape), torch.ones(shape)))
    inside = {name: known.pop(name, {}) for name in ("largest", "least")}
    found = SimpleNamespace(**vars(measures(**known)), **inside, program=program)
    return [(one.node, one.reason) for one in refusals(cast(Measures, found), exponents)]


def scaled(**k: int) -> Exponents:
    return Exponents({(name, 0): exponent for name, exponent in k.items()})


@pytest.mark.parametrize(
    ("least", "k", "refused"),
    [
        (2.0**-78, 0, False),
        (2.0**-79, 0, True),
        (2.0**-75, 3, False),
        (2.0**-75, 4, True),
        (2.0**-79, -3, True),  # where the result is stored larger, its own size counts
    ],
)
def test_results_of_sums_of_products_must_be_far_above_what_underflows(least: float, k: int, refused: bool) -> None:
    found = reasons(lambda x, y: x @ y.t(), scaled(x=1, matmul=k), x=1.0, y=1.0, permute=1.0, t=1.0, matmul=least)
    said = f"its results go down to {least:.3g}, and products that underflow may show in them"
    assert found == ([("matmul", said)] if refused else [])


def test_a_sum_of_products_that_was_not_seen_or_is_stored_as_before_is_not_refused() -> None:
    assert reasons(lambda x, y: x @ y.t(), scaled(x=1, matmul=1), x=1.0) == []
    assert reasons(lambda x, y: x @ y.t(), scaled(), x=1.0, matmul=2.0**-100) == []


@pytest.mark.parametrize(("k", "refused"), [(-1, True), (0, False), (1, False)])
def test_products_that_are_stored_larger_must_not_have_vanished(k: int, refused: bool) -> None:
    found = reasons(lambda x, y: x * y, scaled(x=1, mul=k), x=2.0**-100, y=2.0**-100)
    assert found == ([("mul", f"products down to {2.0**-200:.3g} underflow")] if refused else [])
    # A sum of terms is no product.
    assert reasons(lambda x, y: x + y, scaled(x=k, y=k, add=k), x=2.0**-100, y=2.0**-100) == []


def norm(k: int, largest: float | None, least: float, eps: float = 1e-5) -> list[str]:
    inside = {} if largest is None else {"layer_norm": largest}
    found = reasons(
        lambda x, y: torch.nn.functional.layer_norm(x, (8,), eps=eps),
        scaled(x=k), x=1.0, largest=inside, least={"layer_norm": least},
    )  # fmt: skip
    return [reason for _, reason in found]


@pytest.mark.parametrize(
    ("k", "largest", "least", "eps", "said"),
    [
        (1, 1.0, 1.0, 1e-5, []),
        (-1, 2.0**123, 1.0, 1e-5, []),
        (-1, 2.0**124, 1.0, 1e-5, ["its sum of squares would reach 2^126 at 2^1"]),
        (2, None, 1.0, 1e-5, ["its sum of squares would reach 2^126 at 2^-2"]),
        (39, 1.0, 1.0, 0.0, []),
        (40, 1.0, 1.0, 0.0, ["its variance of 1 would go below 2^-78 at 2^-40"]),
        (39, 1.0, 0.0, 1.0, []),
        (40, 1.0, 0.0, 1.0, ["its variance of 1 would go below 2^-78 at 2^-40"]),
        (40, 1.0, 4.0, 1.0, []),  # the larger of both counts
        (-3, 1.0, 2.0**-78, 0.0, []),
        (-3, 1.0, 2.0**-79, 0.0, [f"its variance of {2.0**-79:.3g} would go below 2^-78 at 2^3"]),
        (0, None, 0.0, 0.0, []),
    ],
)
def test_squares_must_neither_overflow_nor_vanish(
    k: int, largest: float | None, least: float, eps: float, said: list[str]
) -> None:
    assert norm(k, largest, least, eps) == said


def test_a_product_behind_a_break_is_what_its_readers_read() -> None:
    exponents = Exponents({("x_rescaled", 0): 40, ("x", 0): 0}, readers={"x": frozenset({"layer_norm"})})
    found = reasons(
        lambda x, y: torch.nn.functional.layer_norm(x, (8,), eps=0.0),
        exponents, x=1.0, largest={"layer_norm": 1.0}, least={"layer_norm": 1.0},
    )  # fmt: skip
    assert [str(Refusal(*one)) for one in found] == ["layer_norm: its variance of 1 would go below 2^-78 at 2^-40"]
