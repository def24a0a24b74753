"""What nodes need of their arguments: each kind of operator on data that half precision spoils, and on data that it
does not. A plan without evidence of rounding is right on the former, and keeps nothing high on the latter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from calibcast.calib import calibrate
from calibcast.passes import classify, insert_casts
from torch import nn

GENERATOR = torch.Generator().manual_seed(0)
U = torch.rand(256, generator=GENERATOR)
N = torch.randn(64, 32, generator=GENERATOR)
NEAR_ONE = 1 - 10 ** (-3.3 * U)


@dataclass(frozen=True)
class Case:
    """A function, an argument that half precision spoils in the type, one that it does not."""

    function: Callable[..., Any]
    harmful: torch.Tensor
    harmless: torch.Tensor
    low_type: torch.dtype = torch.float16


class Centred(nn.Module):
    """A product with a matrix whose rows sum to nothing."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by
        self.register_buffer("h", torch.eye(64) - 1 / 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.by == "einsum":
            return torch.einsum("ij,jk->ik", self.h, x)
        if self.by == "bmm":
            return torch.bmm(self.h[None], x[None])
        return F.linear(x.mT, self.h) if self.by == "linear" else self.h @ x


class Normalised(nn.Module):
    """A batch norm with the statistics of its data."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(32).eval()
        self.norm.running_mean.copy_(x.mean(0))
        self.norm.running_var.copy_(x.var(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


ALTERNATING = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1])
OFFSET = 300 + 0.3 * N + 50 * N[:1]
CASES = {
    "a number minus a tensor": Case(lambda x: (1 - x).log(), NEAR_ONE, 0.5 * U),
    "log1p": Case(lambda x: torch.log1p(-x), NEAR_ONE, 0.5 * U, torch.bfloat16),
    "logit": Case(lambda x: torch.logit(x), NEAR_ONE, 0.2 + 0.5 * U, torch.bfloat16),
    "acos": Case(torch.acos, NEAR_ONE, 0.5 * U),
    "atanh": Case(torch.atanh, NEAR_ONE, 0.5 * U, torch.bfloat16),
    "erfinv": Case(torch.erfinv, NEAR_ONE, 0.5 * U, torch.bfloat16),
    "sin of large angles": Case(torch.sin, 400 * U, 3 * U, torch.bfloat16),
    "exp of far apart": Case(lambda x: (x - x.amax()).exp(), 300 - 40 * U, 3 * U, torch.bfloat16),
    "floor": Case(lambda x: (x * 400).floor(), U, U / 100),
    "indices": Case(lambda x: (x * 400).to(torch.int64), U, U / 100),
    "softmax": Case(lambda x: x.softmax(-1), 300 + N, N),
    "matmul": Case(Centred("matmul"), OFFSET, N),
    "einsum": Case(Centred("einsum"), OFFSET, N),
    "bmm": Case(Centred("bmm"), OFFSET, N),
    "linear": Case(Centred("linear"), OFFSET, N),
    "pow": Case(lambda x: x**100, 0.94 + 0.06 * U, 0.99 + 0.01 * U, torch.bfloat16),
    "number to a power": Case(lambda x: 0.99**x, 300 * U, 12 * U, torch.bfloat16),
    "guard": Case(lambda x: (1 - x.clamp(max=1 - 1e-4)).log(), torch.cat([U, torch.ones(8)]), 0.2 + 0.2 * U),
    "angle": Case(
        lambda x: torch.atan2(x[:, :8] @ ALTERNATING, x[:, 8]),
        torch.cat([torch.where(torch.arange(64)[:, None] < 8, 1 + 1e-5 * N[:, :8], N[:, :8]), -torch.ones(64, 1)], 1),
        torch.cat([N[:, :8], torch.ones(64, 1)], 1),
    ),
    "product of many": Case(
        lambda x: x.cumprod(-1), 1 + 2e-3 * torch.randn(1, 8192, generator=GENERATOR), (0.1 * N).exp(), torch.bfloat16
    ),
    "turns": Case(lambda x: (6.2832 * torch.remainder(x.cumsum(-1), 1)).sin(), 0.3 * U, U[:8] / 8, torch.bfloat16),
    "difference of norms": Case(
        lambda x: (x[:, :16] + 1).norm(dim=-1) - (x[:, 16:] + 1).norm(dim=-1),
        torch.cat([N[:, :16], N[:, :16] + 1e-3 * N[:, 16:]], 1),
        N,
    ),
    "least distance": Case(
        lambda x: ((x * x).sum(-1)[:, None] - 2 * x @ N.T + (N * N).sum(-1)).amin(-1),
        N + 0.2 * N.flip(0),
        3 * N.flip(1),
    ),
    "difference inside a loss": Case(
        lambda x: F.huber_loss(x[:, :16], x[:, 16:], reduction="none"), 300 + N, N, torch.bfloat16
    ),
    "small values through linear": Case(
        lambda x: (x.square() @ torch.ones(32, 8) + 1e-7).log(), torch.cat([N, 1e-4 * N]), N
    ),
}


def judged(function: Any, x: torch.Tensor, low_type: torch.dtype) -> tuple[float, set[str]]:
    """The relative error of the plan without evidence of rounding, and what it keeps high."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = function if isinstance(function, nn.Module) else None

        def forward(self, x: torch.Tensor) -> Any:
            return function(x)

    with torch.no_grad():
        program = torch.export.export(Net(), (x,))
        ranges = calibrate(program, [(x,)], progress=False, rounding_batches=0)
        plan = classify(program, ranges, low_type, data_max=float("inf"))
        ours, theirs = (p.module()(x).double() for p in (insert_casts(program, plan), program))
    return float((ours - theirs).norm() / theirs.norm()), set(plan.high_precision_nodes)


@pytest.mark.parametrize("name", CASES)
def test_what_is_spoilt_is_kept(name: str) -> None:
    """On harmful data the plan is right to 2% in float16, 5% in bfloat16."""
    case = CASES[name]
    error, high = judged(case.function, case.harmful, case.low_type)
    assert high
    assert error <= (0.02 if case.low_type == torch.float16 else 0.05)


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_is_low(name: str) -> None:
    """On harmless data nothing is kept, but what a number in the graph keeps."""
    case = CASES[name]
    error, high = judged(case.function, case.harmless, case.low_type)
    if name not in {"guard", "small values through linear", "pow"}:
        assert high == set()
    assert error <= (0.02 if case.low_type == torch.float16 else 0.05)


def test_batch_norm_is_judged_by_channel() -> None:
    """A channel that is far from zero, and spreads little, among others that do not."""
    x = torch.cat([N[:, :31], 52.37 + 0.02 * N[:, 31:]], 1)
    for low_type in (torch.float16, torch.bfloat16):
        error, high = judged(Normalised(x), x, low_type)
        assert high
        assert error < 0.02
    assert judged(Normalised(N), N, torch.bfloat16)[1] == set()


def test_layer_norm_of_small_rows_is_low() -> None:
    """A row that is small is rounded as well as others; one that is far from zero is not."""

    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (32,), eps=1e-3)

    assert judged(norm, torch.cat([N, 0.1 * N]), torch.bfloat16)[1] == set()
    assert judged(norm, 300 * (1 + N[:, :1].abs()) + 0.3 * N, torch.bfloat16)[1]


@pytest.mark.parametrize("low_type", [torch.float16, torch.bfloat16])
def test_movement_between_fp32_and_fp32_follows(low_type: torch.dtype) -> None:
    """What expands an input for a node that stays in fp32 does not round it on the way."""

    def encode(x: torch.Tensor) -> torch.Tensor:
        return (x[..., None] * (2.0 ** torch.arange(10) * 3.1415)).sin()

    error, high = judged(encode, 2 * torch.rand(64, 3, generator=GENERATOR) - 1, low_type)
    assert "unsqueeze" in high
    assert error < 1e-3


def test_two_sides_of_one_tensor_share_their_type() -> None:
    """An element is not above itself, whichever side of a comparison it is on."""

    def above(p: torch.Tensor) -> torch.Tensor:
        return (p[None] > p[:, None]).float().diagonal(0, 0, 1) + p.new_zeros(1)

    x = torch.rand(64, generator=GENERATOR)
    with torch.no_grad():

        class Net(nn.Module):
            def forward(self, p: torch.Tensor) -> torch.Tensor:
                return above(p)

        program = torch.export.export(Net(), (x,))
        ranges = calibrate(program, [(x,)], progress=False, rounding_batches=0)
        plan = classify(program, ranges, nodes_to_exclude={"^unsqueeze$"})
        assert {"unsqueeze", "unsqueeze_1", "gt"} <= set(plan.high_precision_nodes)
        assert insert_casts(program, plan).module()(x).abs().max() == 0


def test_answer_is_the_same_after_decomposition() -> None:
    """A product that takes an offset away is kept in fp32 as linear, and as what linear is made of."""
    for by in ("linear", "matmul", "bmm", "einsum"):
        program = torch.export.export(Centred(by), (OFFSET,))
        for p in (program, program.run_decompositions()):
            ranges = calibrate(p, [(OFFSET,)], progress=False, rounding_batches=0)
            assert classify(p, ranges, data_max=float("inf")).high_precision_nodes


def test_eps_that_is_absorbed_keeps_nothing() -> None:
    """1e-6 is less than half a step of what an RMS norm adds it to; of rows of zeros it is all that there is."""

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-7)

    assert judged(norm, N, torch.float16)[1] == set()
    assert "add" in judged(norm, torch.cat([N, 0 * N]), torch.float16)[1]


def test_eps_of_a_batch_norm_is_held_against_its_variance() -> None:
    """An eps that fp16 does not hold does no harm beside a running variance of about 1."""
    net = Normalised(N)
    net.norm.eps = 1e-12
    assert judged(net, N, torch.float16)[1] == set()


class Scaled(nn.Module):
    """Features in units that it has learned."""

    def __init__(self, unit: float) -> None:
        super().__init__()
        self.unit = nn.Parameter(unit * torch.linspace(1, 2, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.unit


@pytest.mark.parametrize("low_type", [torch.float16, torch.bfloat16])
def test_a_divisor_among_the_weights_counts(low_type: torch.dtype) -> None:
    """float16 holds 10^-6 with 3%, bfloat16 as any other number; neither minds a unit of 1."""
    for unit in (1e-6, 1.0):
        program = torch.export.export(Scaled(unit), (300 * unit * N,))
        ranges = calibrate(program, [(300 * unit * N,)], progress=False, rounding_batches=0)
        plan = classify(program, ranges, low_type, data_max=float("inf"))
        lost = low_type == torch.float16 and unit < 1
        assert plan.high_precision_nodes == (("div",) if lost else ())
        assert ("its parameter p_unit has values down to 1e-06" in plan.explain("div")) == lost


class Attending(nn.Module):
    """Scores plus a mask of -10^9, which is held, computed, or comes of an input."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.kind = mask
        held = torch.full((16, 16), -1e9).triu(1)
        self.register_buffer("mask", held if mask == "causal" else held.index_fill(0, torch.tensor([3]), -1e9))

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        scores = x @ x.mT
        if self.kind == "computed":
            place = torch.arange(16)
            return (scores + torch.where(place[:, None] >= place, 0.0, -1e9)).softmax(-1)
        return (scores + (self.mask if self.kind != "input" else (1 - keep) * -1e9)).softmax(-1)


@pytest.mark.parametrize(
    ("mask", "kept"), [("causal", False), ("computed", False), ("a row of it", True), ("input", True)]
)
def test_a_mask_that_leaves_each_row_a_value_may_be_rounded(mask: str, kept: bool) -> None:
    """Only where all scores of a row are masked does it matter how -10^9 rounds them."""
    inputs = (torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), (torch.arange(16) < 12).float())
    net = Attending(mask).eval()
    program = torch.export.export(net, inputs)
    ranges = calibrate(program, [inputs], progress=False, rounding_batches=0)
    plan = classify(program, ranges, torch.float16)
    assert (plan["add"].rule == "mask") == kept
    ours = insert_casts(program, plan).module()(*inputs)
    valid = [row for row in range(16) if mask != "a row of it" or row != 3]
    torch.testing.assert_close(ours[valid], net(*inputs)[valid], atol=2e-3, rtol=0)
