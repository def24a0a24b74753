"""Which tensors are masks, and what is counted of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from calibcast.calib import BatchError, RangeTable, calibrate
from calibcast.calib.masks import mask_tensors
from torch import nn

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(8) >= torch.tensor([[8], [5], [8], [3]])
FLOAT_MASK = torch.zeros(4, 8).masked_fill(PADDING, -1e9)


class _Network(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("causal", torch.triu(torch.full((8, 8), -math.inf), 1))
        self.bias = nn.Parameter(torch.full((8,), -2e4))

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def exported(function: Callable[..., Any], *inputs: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(_Network(function).eval(), inputs)


def attend(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], mask)


MASKS = {
    "filled before the softmax": (
        lambda s, x, p: x.masked_fill(p, -math.inf).softmax(-1),
        (X, PADDING),
        {"masked_fill"},
    ),
    "chosen by where": (lambda s, x, p: torch.where(p, -1e9, x).softmax(-1), (X, PADDING), {"where"}),
    "added": (lambda s, x, m: (x.tanh() + m).softmax(-1), (X, FLOAT_MASK), {"inputs_1", "add"}),
    "made of a padding mask": (
        lambda s, x, m: (x + (1.0 - m.float()) * -1e9).softmax(-1),
        (X, ~PADDING),
        {"mul", "add"},
    ),
    "subtracted": (lambda s, x, m: (x - 1e9 * m.float()).softmax(-1), (X, PADDING), {"mul", "sub"}),
    "a buffer, sliced and expanded": (
        lambda s, x: attend(x, s.causal[:4, :4].expand(1, 1, 4, 4)),
        (X,),
        {"b_causal", "slice_1", "slice_2", "expand"},
    ),
    "written into a slice": (
        lambda s, x, p: (x + _filled_in_place(x, p)).softmax(-1),
        (X, PADDING),
        {"zeros_like", "masked_fill", "slice_3", "copy_", "add"},
    ),
    "filled in place": (
        lambda s, x, p: (x * 2).masked_fill_(p, -1e9).softmax(-1),
        (X, PADDING),
        {"mul", "masked_fill_"},
    ),
    "selected, and compared with what was": (
        lambda s, x, p: torch.where((m := x.tanh().masked_fill(p, -math.inf)) < _third(m), -1e9, m).softmax(-1),
        (X, PADDING),
        {"masked_fill", "topk", "getitem", "slice_1", "where"},
    ),
    "compared with its own peak": (
        lambda s, x, p: (m := x.tanh().masked_fill(p, -1e9)) >= m.amax(-1, keepdim=True),
        (X, PADDING),
        {"masked_fill", "amax"},
    ),
    "compared with a number": (
        lambda s, x, m: x.masked_fill(m < 0, -1e9).softmax(-1),
        (X, FLOAT_MASK),
        {"inputs_1", "masked_fill"},
    ),
}


def _third(m: torch.Tensor) -> torch.Tensor:
    return m.topk(3, -1).values[:, -1:]


def _filled(x: torch.Tensor, value: float = -math.inf) -> torch.Tensor:
    return x.relu().masked_fill(x > 0, value)


def _filled_in_place(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros_like(x)
    mask[:, :6] = mask[:, :6].masked_fill(padding[:, :6], -3e38)
    return mask


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_found(name: str) -> None:
    """Those tensors that a mask value passes on its way to softmax or attention, by name; logits before it are not."""
    function, inputs, expected = MASKS[name]
    found = {node for node in mask_tensors(exported(function, *inputs)) if not node.startswith("lift_fresh")}
    assert found == expected | {name for name in found if name in {"inputs_0", "x"}}


NO_MASKS = {
    "logits of the model's own": lambda s, x: (x @ x.T * 1e3).div(8).softmax(-1),
    "a learned bias": lambda s, x: (x @ x.T @ x + s.bias).softmax(-1),
    "given out as well": lambda s, x: ((m := x.tanh() + torch.full((8,), -1e9)).softmax(-1), m),
    "read by something else": lambda s, x: (m := x.tanh() + torch.full((8,), -1e9)).softmax(-1) + m.relu(),
    "filled for another reason": lambda s, x: x.relu().masked_fill(x > 0, -1e9).amax(-1),
    "the queries of an attention": lambda s, x: attend(x.relu().masked_fill(x > 3, -1e9), None),
    # A cast that saturates answers otherwise.
    "asked for its sentinel": lambda s, x: _filled(x) == -math.inf,
    "asked for its own peak": lambda s, x: (m := _filled(x, -1e9)) == m.amax(-1, keepdim=True),
    "asked whether it is infinite": lambda s, x: _filled(x).isinf(),
    "compared with a number as low": lambda s, x: _filled(x, -1e9) > -1e8,
    "compared with the lowest number": lambda s, x: _filled(x) >= torch.finfo(torch.float32).min,
    "two sentinels, which may become one": lambda s, x: _filled(x, -1e9) > _filled(-x),
    "sums of a sentinel and scores": lambda s, x: (m := x.relu() + _filled(x, -1e5)) < _third(m),
    "compared with a learned bias": lambda s, x: _filled(x, -1e5) < s.bias,
    "compared with an input": lambda s, x: _filled(x, -1e5) < x,
    "filled into an input, which may hold others": lambda s, x: (m := x.masked_fill(x > 0, -1e9)) < _third(m),
    # Of several masked elements it is up to the kernel which one is taken.
    "where the largest are": lambda s, x: x.gather(-1, _filled(x, -1e9).topk(3).indices),
    "the largest, multiplied": lambda s, x: _filled(x, -1e9).topk(3).values * 2,
    "written in place, and compared": lambda s, x: (m := x.relu().masked_fill_(x > 0, -1e9)) < _third(m),
}


@pytest.mark.parametrize("name", NO_MASKS)
def test_what_is_no_mask_stays_a_magnitude(name: str) -> None:
    """Large negative values that come from elsewhere, or are read elsewhere, are counted like any others."""
    program = exported(NO_MASKS[name], 300 * X)
    table = calibrate(program, [(300 * X,)], progress=False)
    activations = table.frame.filter(kind="activation")
    assert activations["masked"].sum() == 0


def row(table: RangeTable, node: str) -> dict[str, Any]:
    return table.frame.row(by_predicate=pl.col("node") == node, named=True)


@pytest.mark.parametrize("value", [-math.inf, -3.4e38, -1e4])
def test_mask_values_are_counted_apart(value: float) -> None:
    """They are `masked`, and nothing else: not in absmax, min, mean, histogram, nor among the infinite."""
    mask = torch.zeros(4, 8).masked_fill(PADDING, value)
    table = calibrate(exported(lambda s, x, m: (x * 0.1 + m - 1).softmax(-1), X, mask), [(X, mask)], progress=False)
    found = row(table, "inputs_1")
    assert found["masked"] == int(PADDING.sum())
    assert (found["neginf"], found["absmax"], found["min"], found["zeros"]) == (0, 0.0, 0.0, int((~PADDING).sum()))
    assert sum(found["histogram"]) == int((~PADDING).sum())
    lowest = dict(table.hidden.select("node", "mask_min").rows())
    assert lowest.get("inputs_1") == (None if math.isinf(value) else pytest.approx(value))


def test_infinite_masks_are_no_reason_to_skip_a_batch() -> None:
    """-inf in a mask is meant; +inf, or -inf that reaches the output, is not."""
    program = exported(lambda s, x, p: x.masked_fill(p, -math.inf).softmax(-1), X, PADDING)
    assert calibrate(program, [(X, PADDING)], on_nonfinite="stop", progress=False).calibration.batches == 1
    bare = exported(lambda s, x, p: x.masked_fill(p, -math.inf), X, PADDING)
    with pytest.raises(BatchError, match="NaN or Inf first at node masked_fill"):
        calibrate(bare, [(X, PADDING)], on_nonfinite="stop", progress=False)
    upward = exported(lambda s, x, p: x.masked_fill(p, math.inf).softmax(-1), X, PADDING)
    with pytest.raises(BatchError, match="NaN or Inf first at node masked_fill"):
        calibrate(upward, [(X, PADDING)], on_nonfinite="stop", progress=False)


def test_a_row_that_is_all_mask_has_no_range() -> None:
    """A tensor of nothing but mask values: counted, and null everywhere else."""
    mask = torch.full((4, 8), -1e9)
    table = calibrate(exported(lambda s, x, m: (x * 0.1 + m).softmax(-1), X, mask), [(X, mask)], progress=False)
    found = row(table, "inputs_1")
    assert (found["masked"], found["absmax"], found["mean"]) == (32, None, None)


def test_masked_counts_merge() -> None:
    """Shards give what the whole gives."""
    program = exported(lambda s, x, m: (x * 0.1 + m).softmax(-1), X, FLOAT_MASK)
    batches = [(X, FLOAT_MASK), (X, FLOAT_MASK * 2), (2 * X, FLOAT_MASK)]
    whole = calibrate(program, batches, progress=False)
    merged = RangeTable.merge([calibrate(program, part, progress=False) for part in (batches[:1], batches[1:])])
    assert merged.frame.select("node", "masked", "absmax", "min").equals(
        whole.frame.select("node", "masked", "absmax", "min")
    )
    assert merged.hidden.equals(whole.hidden)
