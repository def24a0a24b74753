"""The evidence of rounding against plain torch: each tensor rounded alone, by hand, and the outputs compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib import RangeTable, calibrate
from calibcast.calib.output_noise import channel_noise
from calibcast.calib.rounding_table import rounding_gaps

from tests.functions import ApplyToX

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(64, 8, generator=GENERATOR)
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def measured(function: Callable[..., Any], *batches: torch.Tensor, **more: Any) -> RangeTable:
    with torch.no_grad():
        program = torch.export.export(ApplyToX(function).eval(), batches[:1])
    return calibrate(program, list(batches), progress=False, **more)


def rows(table: RangeTable, node: str, source: str, low: str = "float16") -> dict[str, Any]:
    found = table.rounding.filter(
        (pl.col("node") == node) & (pl.col("input") == source) & (pl.col("low_precision_type") == low)
    )
    assert found.height == 1, table.rounding.select("node", "input").rows()
    return found.row(0, named=True)


def db(noise: torch.Tensor, signal: torch.Tensor) -> float:
    return float(-10 * torch.log10(noise.double().square().sum() / signal.double().square().sum()))


@pytest.mark.parametrize("low", TYPES)
def test_each_edge_of_a_chain_is_as_loud_as_rounding_it_alone(low: str) -> None:
    """x -> sin -> * 3 -> exp, and what leaves: an elementwise chain, whose gradient tells all."""

    def edges(round_at: str) -> torch.Tensor:
        def at(name: str, value: torch.Tensor) -> torch.Tensor:
            return value.to(TYPES[low]).float() if name == round_at else value

        return at("out", torch.exp(at("mul", at("sin", torch.sin(at("x", X))) * 3)))

    table = measured(lambda x: torch.exp(torch.sin(x) * 3), X)
    names = {"x": ("sin", "x"), "sin": ("mul", "sin"), "mul": ("exp", "mul"), "out": ("output", "exp")}
    exact = edges("")
    for name, (node, source) in names.items():
        row = rows(table, node, source, low)
        assert row["noise"] == pytest.approx(float(channel_noise(edges(name), exact).mean()), rel=0.02), name
        assert row["noise_by_output"] == [row["noise"]]
        assert (row["noise_worst"], row["worst_batch"]) == (row["noise"], 0)
        assert (row["method"], row["nonfinite"], row["steps"], row["batches"]) == ("gradient", 0, 0, 1)
    near = rows(table, "mul", "sin", low)["local_sqnr_db"]
    assert near == pytest.approx(db(torch.sin(X).to(TYPES[low]).float() - torch.sin(X), torch.sin(X)), abs=0.01)


def test_batches_are_averaged_and_the_worst_is_named() -> None:
    """Each batch is held to its own power; both are shown by the mean, one by the worst."""
    loud, quiet = 300 + X, X.round()
    table = measured(lambda x: x.sin(), quiet, loud, quiet)
    row = rows(table, "sin", "x")
    one = float(channel_noise(loud.half().float().sin(), loud.sin()).mean())
    assert row["noise_worst"] == pytest.approx(one, rel=0.01)
    assert row["noise"] == pytest.approx(one / 3, rel=0.01)
    assert (row["worst_batch"], row["batches"]) == (1, 3)


def test_only_the_first_batches_are_measured() -> None:
    assert rows(measured(lambda x: x.sin(), *[X] * 4, rounding_batches=2), "sin", "x")["batches"] == 2


def stepping(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = x * 1.7
    return y.floor() + x, y.exp(), (y * 300).long()


@pytest.mark.parametrize("low", TYPES)
def test_runs_tell_the_outputs_apart(low: str) -> None:
    """An integer output counts the share that changed; the others are held to their power."""
    table = measured(stepping, X)
    y = X * 1.7
    made = y.to(TYPES[low]).float()
    row = rows(table, "mul_1", "mul", low)
    changed = float(((made * 300).long() != (y * 300).long()).double().mean())
    assert row["method"] == "run"
    assert row["noise_by_output"] == [0.0, 0.0, changed]
    assert row["noise"] == changed
    assert row["steps"] == round(changed * X.numel())


def five(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x * 1.7
    return y.exp(), y.sin(), y.cos(), y.tanh(), (y * 3).exp(), (y * 300).long()


def test_of_more_than_four_outputs_only_the_sum_is_told() -> None:
    """A share of integers that changed is squared there: it is an amplitude."""
    table = measured(five, X)
    assert table.rounding["noise_by_output"].null_count() == table.rounding.height
    y = X * 1.7
    made = y.half().float()
    sine = rows(table, "sin", "mul")
    assert sine["noise"] == pytest.approx(float(channel_noise(made.sin(), y.sin()).mean()), rel=0.02)
    changed = float(((made * 300).long() != (y * 300).long()).double().mean())
    assert changed > 0
    assert rows(table, "mul_2", "mul")["noise"] == pytest.approx(changed**2)
    four = measured(lambda x: (*five(x)[:4], five(x)[5]), X)
    assert set(four.rounding["noise_by_output"].list.len()) == {5}


@pytest.mark.parametrize("parts", [2, 4, 5, 6])
def test_up_to_four_joined_parts_are_rounded_apart(parts: int) -> None:
    """The gain of a part is only seen where it is rounded alone. Of more parts, each gets its share of all noise."""
    gains = torch.repeat_interleave(10.0 ** torch.arange(parts), 8)

    def joined(x: torch.Tensor) -> torch.Tensor:
        makers = (torch.sin, torch.cos, torch.tanh, torch.sigmoid, torch.erf, torch.atan)
        return (torch.cat([maker(x) for maker in makers[:parts]], -1) * gains).sum(-1)

    table = measured(joined, X)
    noise = [rows(table, "mul", name)["noise"] for name in ("sin", "cos", "tanh", "sigmoid", "erf", "atan")[:parts]]
    if parts <= 4:
        assert all(later > 10 * earlier for earlier, later in pairwise(noise))
    else:
        assert max(noise) < 20 * min(noise)


def test_sixteen_runs_are_made_and_then_as_many_as_they_may_cost() -> None:
    """A chain in which each step needs a run of all that follows: two passes pay for about four."""

    values = torch.randn(64, generator=GENERATOR)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(30):
            x = values[(x * 300).long() % 64] + 0.5 * x
        return x

    table = measured(chain, X)
    for low in TYPES:
        mine = table.rounding.filter(pl.col("low_precision_type") == low)
        runs = mine.filter(pl.col("method") == "run").height
        gaps = rounding_gaps(mine)
        assert gaps.height > 5
        assert set(gaps["why_missing"]) == {"it needs runs of its own, and more edges do than are run"}
        assert runs == 16


def test_what_nothing_reads_makes_no_noise() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        (x * 3).exp()
        return x.sin()

    table = measured(function, X)
    assert table.rounding["noise"].is_finite().all()


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_a_result_that_is_all_zero_has_infinite_local_noise(constant: float) -> None:
    """x - x is 0: any error there is infinitely louder than it; where nothing changes there is none."""
    x = torch.full((64, 8), 0.1) if constant else X.round()
    row = rows(measured(lambda x: ((x - 0.1) * 1.5).sin() + x, x), "sub", "x")
    assert row["local_sqnr_db"] == (-math.inf if constant else math.inf)


def test_a_gradient_that_is_added_up_comes_from_all_readers() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        return y.exp() + 2 * y.cos() - y

    table = measured(function, X)
    y = X.sin()
    made = y.half().float()
    for node, of in (("exp", torch.exp), ("cos", lambda v: 2 * torch.cos(v))):
        real = float(channel_noise(function(X) - of(y) + of(made), function(X)).mean())
        assert rows(table, node, "sin")["noise"] == pytest.approx(real, rel=0.02)


def test_an_error_in_a_sum_reaches_each_output_by_its_own_power() -> None:
    """Matrix products: one draw of random signs estimates it, within a factor of two over many elements."""
    w = torch.randn(8, 32, generator=GENERATOR)

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x @ w).sin()

    table = measured(function, 0.1 * X)
    made = (0.1 * X).half().float()
    real = float(channel_noise(function(made), function(0.1 * X)).mean())
    assert rows(table, "matmul", "x")["noise"] == pytest.approx(real, rel=0.5)


@pytest.mark.parametrize("value", [0.9999, 1 - 2.6e-4, 1 - 2.4e-4])
def test_what_rounding_takes_to_a_pole_is_lost(value: float) -> None:
    """Rounded up to 1, or down with 1 at the other side: the logarithm of 1 - x is then -inf, which no slope shows."""
    x = torch.cat([torch.tensor([value]), torch.linspace(0.1, 0.7, 999)])
    row = rows(measured(lambda x: (1 - x).log(), x), "rsub", "x")
    assert (row["noise"], row["method"]) == (math.inf, "run")


def test_what_decides_whether_a_pole_is_reached_is_followed_to_its_beginning() -> None:
    """Each product by 1 is rounded alike, and each alone takes the logarithm to its pole."""

    def far(x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = (x * 1.0).reshape(-1)
        return (1 - x).log()

    table = measured(far, torch.cat([torch.tensor([0.9999]), torch.linspace(0.1, 0.7, 999)]))
    lost = table.rounding.filter(pl.col("noise").is_infinite() & (pl.col("low_precision_type") == "float16"))
    assert lost["node"].to_list() == ["mul", *(f"mul_{number}" for number in range(1, 6)), "rsub"]
