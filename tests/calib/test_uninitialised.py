"""Memory that nothing was written to yet: what it happens to hold is no range and no error."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import polars as pl
import pytest
import torch
from calibcast.calib import calibrate
from calibcast.calib.uninitialised import undefined_tensors
from calibcast.passes import classify, compare, insert_casts
from torch import nn

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class _Apply(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def exported(function: Callable[[torch.Tensor], torch.Tensor]) -> torch.export.ExportedProgram:
    return torch.export.export(_Apply(function).eval(), (X,))


def filled(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x).fill_(0.5) * x


def halves(x: torch.Tensor) -> torch.Tensor:
    """As rotary embeddings do it."""
    out = x.new_empty(x.shape)
    out[..., ::2] = x[..., 1::2] * 2
    out[..., 1::2] = -x[..., ::2]
    return out + 1


@pytest.fixture
def _memory_is_nan() -> Iterator[None]:
    """torch fills new memory with NaN, as it may be."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("_memory_is_nan")
@pytest.mark.parametrize("function", [filled, halves])
def test_what_memory_held_before_is_not_measured(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """It counts as zeros: no NaN is told, and nothing stays in fp32 for it."""
    program = exported(function)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranges = calibrate(program, [X, -X], progress=False)
    made = ranges.frame.filter(pl.col("op").str.contains("empty")).row(0, named=True)
    assert (made["batches"], made["elements"], made["zeros"], made["nan"]) == (2, 64, 64, 0)
    plan = classify(program, ranges)
    assert plan.high_precision_nodes == ()
    comparison = compare(program, insert_casts(program, plan), [X], progress=False)
    assert comparison.first_nonfinite is None
    computed = comparison.frame.filter(pl.col("op").str.contains("add|mul|fill"))
    assert computed["sqnr_db"].min() > 50


def test_a_view_that_is_read_is_measured() -> None:
    """After a write it has values; one that is only written over has none yet."""

    def read(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out[:2].copy_(x[:2])
        out[2:].fill_(3.0)
        return out[1:3] * 2

    program = exported(read)
    names = undefined_tensors(program)
    views = [
        n for n in program.graph.nodes if n.op == "call_function" and "slice" in n.name and n.args[0].name in names
    ]
    assert [view.name in names for view in views] == [True, True, False]
    table = calibrate(program, [X], progress=False)
    last = table.frame.filter(node=views[-1].name).row(0, named=True)
    assert last["max"] == max(3.0, float(X[1].max()))


def test_memory_with_values_is_measured() -> None:
    """Nothing else counts as undefined: zeros, inputs, and what is computed."""
    assert undefined_tensors(exported(lambda x: torch.zeros_like(x).copy_(x) + x.clone().fill_(2.0))) == frozenset()
