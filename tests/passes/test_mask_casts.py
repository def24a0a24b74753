"""Masks on their way through a cast graph: saturated, and never a reason for fp32 attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from calibcast.calib import calibrate as measure
from calibcast.passes import classify, insert_casts
from torch import nn

# The rules as they stand without evidence from rounding: tests of plans that have it are in test_rounding_plan.py.
calibrate = partial(measure, rounding_batches=0)

LOWEST = torch.finfo(torch.float32).min


class _Attention(nn.Module):
    """One head over 16 tokens of 8 features; `how` puts the mask in."""

    def __init__(self, how: Callable[..., torch.Tensor], mask: torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.how = how
        self.register_buffer("kept", mask.clone())  # export would take one tensor for both

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.how(self.query(x), self.key(x), self.value(x), mask, self.kept)


def added(q: Any, k: Any, v: Any, mask: Any, kept: Any) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) + mask).softmax(-1) @ v


def from_a_buffer(q: Any, k: Any, v: Any, mask: Any, kept: Any) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) + kept).softmax(-1) @ v


def filled(q: Any, k: Any, v: Any, mask: Any, kept: Any) -> torch.Tensor:
    return (q @ k.transpose(-1, -2)).masked_fill(mask < 0, LOWEST).softmax(-1) @ v


def attention(q: Any, k: Any, v: Any, mask: Any, kept: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


def attention_with_a_buffer(q: Any, k: Any, v: Any, mask: Any, kept: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, kept)


WAYS = [added, from_a_buffer, filled, attention, attention_with_a_buffer]


def mask_of(value: float, whole_row: bool = False) -> torch.Tensor:
    mask = torch.zeros(16, 16)
    mask[:, 11:] = value
    if whole_row:
        mask[3] = value
    return mask


def case(how: Callable[..., Any], mask: torch.Tensor, low_type: torch.dtype, shift: float = 0.0) -> tuple[Any, ...]:
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1)) + shift
    program = torch.export.export(_Attention(how, mask).eval(), (x, mask))
    plan = classify(program, calibrate(program, [(x, mask)], progress=False), low_type)
    mixed = insert_casts(program, plan)
    return plan, program.module()(x, mask), mixed.module()(x, mask), mixed


@pytest.mark.parametrize("low_type", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("value", [-math.inf, LOWEST, -1e9, -1e4])
@pytest.mark.parametrize("how", WAYS)
def test_a_mask_never_pulls_attention_into_fp32(how: Callable[..., Any], value: float, low_type: torch.dtype) -> None:
    """Matmul, softmax and attention are low, whatever the sentinel; partly masked rows are what they were in fp32."""
    plan, expected, found, _ = case(how, mask_of(value), low_type)
    work = {"matmul", "matmul_1", "softmax", "scaled_dot_product_attention"}
    assert work.isdisjoint(plan.high_precision_nodes), [plan.explain(name) for name in plan.high_precision_nodes]
    assert float((found - expected).norm() / expected.norm()) < (1e-3 if low_type == torch.float16 else 1e-2)


def causal(x: torch.Tensor) -> torch.Tensor:
    mask = torch.full((16, 16), -math.inf).triu(1)
    return (x @ x.transpose(-1, -2) + mask).softmax(-1) @ x


def chosen(x: torch.Tensor) -> torch.Tensor:
    mask = torch.where(torch.arange(16) < 11, torch.zeros(()), torch.full((), -math.inf))
    return (x @ x.transpose(-1, -2) + mask).softmax(-1) @ x


@pytest.mark.parametrize("how", [causal, chosen])
def test_a_tensor_that_is_all_mask_is_no_reason_for_fp32(how: Any, export: Any) -> None:
    """What `full` makes for a causal mask is -inf throughout: both types hold that, so nothing here stays in fp32."""
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1))
    program = export(how, x)
    plan = classify(program, calibrate(program, [x], progress=False))
    assert plan.high_precision_nodes == (), [plan.explain(name) for name in plan.high_precision_nodes]
    expected, found = program.module()(x), insert_casts(program, plan).module()(x)
    assert float((found - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("low_type", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("how", WAYS)
def test_a_fully_masked_row_stays_finite(how: Callable[..., Any], low_type: torch.dtype) -> None:
    """In fp16 alone -65504 - 20 is -inf, and a row of that is NaN."""
    _, expected, found, _ = case(how, mask_of(LOWEST, whole_row=True), low_type, shift=3.0)
    assert torch.isfinite(expected).all()
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("how", [added, from_a_buffer, filled])
def test_a_fully_masked_row_is_right_where_the_mask_meets_the_scores(how: Callable[..., Any]) -> None:
    """fp32 loses all scores alike against -3.4e38, so every key weighs the same; so it does with the plan."""
    _, expected, found, _ = case(how, mask_of(LOWEST, whole_row=True), torch.float16, shift=3.0)
    assert float((found - expected).norm() / expected.norm()) < 1e-3


class _Chosen(nn.Module):
    """Softmax of the scores where `keep` is true."""

    def forward(self, scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return torch.where(keep, scores * 2, LOWEST).softmax(-1)


def test_a_number_that_half_does_not_hold_is_spelt_out_as_what_is_stored() -> None:
    """PyTorch takes `where(keep, scores, -3.4e38)` in fp16; decomposed, or built, it was an error."""
    inputs = (SCORES, ~PADDING)
    program = torch.export.export(_Chosen(), inputs)
    plan = classify(program, measure(program, [inputs], progress=False))
    mixed = insert_casts(program, plan)
    (chosen,) = [node for node in mixed.graph.nodes if node.name == "where"]
    assert chosen.meta["val"].dtype == torch.float16
    assert chosen.args[2] == -32752.0
    found = mixed.run_decompositions().module()(*inputs)
    torch.testing.assert_close(found, program.module()(*inputs), rtol=2e-3, atol=1e-4)


def test_a_mask_in_a_buffer_is_stored_low() -> None:
    """Saturated once, when it is converted: no clamp and no cast at run time."""
    _, _, _, mixed = case(attention_with_a_buffer, mask_of(LOWEST), torch.float16)
    (stored,) = [tensor for name, tensor in mixed.state_dict.items() if name == "kept"]
    assert stored.dtype == torch.float16
    assert float(stored.min()) == -32752.0
    assert not any(node.target is torch.ops.aten.clamp.default for node in mixed.graph.nodes)


def test_a_mask_that_comes_in_is_saturated_by_a_cast() -> None:
    """Half the least finite value, so that adding scores inside an attention does not overflow either."""
    _, _, _, mixed = case(attention, mask_of(LOWEST), torch.float16)
    (clamp,) = [node for node in mixed.graph.nodes if node.target is torch.ops.aten.clamp.default]
    assert (clamp.name, clamp.args[1]) == ("mask_saturated", -32752.0)
    assert [user.name for user in clamp.users] == ["mask_as_float16"]


def test_without_masks_in_the_data_nothing_is_saturated() -> None:
    """The plan knows what calibration saw."""
    plan, _, _, mixed = case(attention, torch.zeros(16, 16), torch.float16)
    assert plan.masks == ()
    assert not any(node.target is torch.ops.aten.clamp.default for node in mixed.graph.nodes)


class _Sparse(nn.Module):
    """The three largest of each row's 16 scores, and the softmax of them: topk, a comparison, `where`."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, scores: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        masked = scores.neg().masked_fill(padding, self.value)
        lost = masked < masked.topk(3, -1).values[:, -1:]
        return lost, torch.where(lost, -math.inf, masked).softmax(-1)


# In steps that both types hold, so that nothing but a mask can be out of order; rows with 16 to 1 valid scores.
SCORES = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(n)) / 4.0 for n in range(16)])
PADDING = torch.ones(16, 16, dtype=torch.bool).triu(1)
CHAIN = {"masked_fill", "topk", "slice_1", "lt"}


def sparse(value: float, low_type: torch.dtype, scale: float = 1.0, **limits: Any) -> Any:
    """The plan; the casts of it leave the same scores out as fp32."""
    inputs = (SCORES * scale, PADDING)
    program = torch.export.export(_Sparse(value), inputs)
    plan = classify(program, calibrate(program, [inputs], progress=False), low_type, **limits)
    mixed = insert_casts(program, plan)
    (lost, _), (ours, weights) = program.module()(*inputs), mixed.module()(*inputs)
    assert torch.equal(ours, lost)
    assert torch.isfinite(weights).all()
    return plan


@pytest.mark.parametrize("low_type", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("value", [-math.inf, -1e4])
def test_a_mask_that_is_selected_and_compared_keeps_nothing_in_fp32(value: float, low_type: torch.dtype) -> None:
    """Also in rows with fewer valid scores than are selected, where masks are compared with masks."""
    assert sparse(value, low_type).high_precision_nodes == ()


@pytest.mark.parametrize("value", [-1e9, LOWEST])
def test_a_sentinel_that_the_low_type_does_not_hold_is_compared_in_fp32(value: float) -> None:
    """Some nodes of the chain in fp16 would have -32752 or -inf where others have -1e9."""
    plan = sparse(value, torch.float16)
    assert set(plan.high_precision_nodes) & CHAIN == CHAIN
    assert "it takes a mask's sentinel to a comparison, together with masked_fill" in plan.explain("lt")
    assert "softmax" in plan.low_precision_nodes


@pytest.mark.parametrize("value", [-math.inf, -1e9, LOWEST])
@pytest.mark.parametrize("node", sorted(CHAIN))
def test_masks_are_compared_in_one_type_whatever_the_user_lists(node: str, value: float) -> None:
    """One node excluded, the others included: else -inf of one side would meet -32752 of the other."""
    others = [f"^{name}$" for name in CHAIN - {node}]
    plan = sparse(value, torch.float16, nodes_to_exclude=[f"^{node}$"], nodes_to_include=others)
    assert set(plan.high_precision_nodes) >= CHAIN


def test_scores_as_low_as_a_mask_are_compared_in_fp32() -> None:
    """The model's own scores of -60,000 count as masks once they are among them, and would all become -32752."""
    plan = sparse(-math.inf, torch.float16, scale=16000.0)
    assert set(plan.high_precision_nodes) >= CHAIN
    assert plan.explain("masked_fill").startswith("masked_fill (aten.masked_fill.Scalar) stays in its exported type")
