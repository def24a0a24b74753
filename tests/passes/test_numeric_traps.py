"""Numbers that fp16 cannot hold: each is caught by a rule, on the data that need it, and on no other.

Each trap is run whole in fp16, where it is wrong, and with the plan, where it is right; on harmless data it is low.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from calibcast.calib import SettingError
from calibcast.calib import calibrate as measure
from calibcast.passes import classify, insert_casts
from torch import nn

# The rules as they stand without evidence from rounding: tests of plans that have it are in test_rounding_plan.py.
calibrate = partial(measure, rounding_batches=0)

Tensors = tuple[torch.Tensor, ...]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Trap:
    """A network, data on which fp16 fails, data on which it does not, and what catches it: rules by node.

    always: nodes that are high on all data, as what catches them is a number in the graph.
    """

    network: Callable[..., Any]
    harmful: Tensors
    harmless: Tensors
    caught: dict[str, str]
    always: frozenset[str] = frozenset()


def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) / 8).softmax(-1) @ k


def masked_attention(scores: torch.Tensor, mask: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (scores + mask).softmax(-1) @ v


def one_row_masked(value: float) -> torch.Tensor:
    mask = torch.zeros(8, 16)
    mask[:, 12:] = value
    mask[3] = value
    return mask


EPOCH = 1.7e9 + 86400 * torch.rand(64, generator=torch.Generator().manual_seed(0))
ROWS = noise(8, 16)
WITH_EMPTY_ROWS = torch.cat([ROWS, torch.zeros(2, 16)])

SPREAD = torch.linspace(1, 400, 64)
TRAPS = {
    "a sum that overflows, its mean does not": Trap(
        lambda x: x.sum(-1) / 4096, (40 + noise(4, 4096),), (0.02 * noise(4, 4096),), {"sum_1": "data_max"}
    ),
    "the square root of a sum of squares": Trap(
        lambda x: x / x.pow(2).sum(-1, keepdim=True).sqrt(),
        (500 * noise(8, 64).sign(),),
        (noise(8, 64),),
        {"pow_1": "data_max", "sum_1": "data_max"},
    ),
    "attention logits before scaling": Trap(
        attend,
        (100 * noise(2, 8, 64), 100 * noise(2, 8, 64)),
        (noise(2, 8, 64), noise(2, 8, 64)),
        {"matmul": "data_max"},
    ),
    "epoch seconds": Trap(lambda t: (t - t.min()) / 3600, (EPOCH,), ((EPOCH - 1.7e9) / 400,), {"sub": "data_max"}),
    "raw counts": Trap(
        lambda n: torch.log1p(n) / 10, (torch.arange(64) * 2e4,), (torch.arange(64) * 2.0,), {"log1p": "data_max"}
    ),
    "an epsilon of 1e-8 under a root": Trap(
        lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-8).sqrt(),
        (WITH_EMPTY_ROWS,),
        (torch.cat([ROWS, ROWS[:2]]),),
        {"add": "literal", "sqrt": "storage"},
    ),
    "an epsilon of 1e-12 in a divisor": Trap(
        lambda x: x / (x.norm(dim=-1, keepdim=True) + 1e-12),
        (WITH_EMPTY_ROWS,),
        (torch.cat([ROWS, ROWS[:2]]),),
        {"add": "literal", "div": "storage"},
    ),
    "signals around 1e-5, squared": Trap(
        lambda x: x / x.pow(2).mean(-1, keepdim=True).sqrt(),
        (1e-5 * noise(8, 64),),
        (noise(8, 64),),
        {"pow_1": "storage", "mean": "storage", "div": "storage"},
    ),
    "400.05 against 400.10": Trap(
        lambda x: (x - x.mean(-1, keepdim=True)) * 10,
        (400 + 0.05 * noise(8, 64),),
        (noise(8, 64),),
        {"mean": "storage", "sub": "storage"},
    ),
    "400.05 against 400.10, in tensors from 0 to 400": Trap(
        lambda a, b: (a.relu() - b.view(-1)) * 10,
        (SPREAD, SPREAD + 0.05 * noise(64).abs()),
        (SPREAD, 0.9 * SPREAD),
        {"relu": "storage", "view": "storage", "sub": "storage"},
    ),
    "a variance as the difference of two means": Trap(
        lambda x: (x * x).mean(-1) - x.mean(-1) ** 2,
        (20 + 0.2 * noise(8, 64),),
        (noise(8, 64),),
        {"mean": "storage", "pow_1": "storage", "sub": "storage"},
    ),
    "squared distances in a logsumexp": Trap(
        lambda x, c: torch.logsumexp(-(x[:, None] - c[None]).pow(2), -1),
        (300 + noise(8), noise(6)),
        (noise(8), noise(6)),
        {"pow_1": "data_max", "neg": "data_max", "logsumexp": "data_max"},
    ),
    "products of large integers": Trap(
        lambda a, b: torch.tanh((a * b).float() / 1e5),
        (torch.arange(1, 65) * 100, torch.arange(1, 65) * 30),
        (torch.arange(1, 65) % 7, torch.arange(1, 65) % 5),
        {"div": "data_max"},
        always=frozenset({"div"}),  # 1e5 is inf in fp16
    ),
    "a fully masked row": Trap(
        masked_attention,
        (20 * noise(8, 16) - 20, one_row_masked(-3.4e38), noise(16, 8, seed=1)),
        (noise(8, 16), torch.zeros(8, 16), noise(16, 8, seed=1)),
        {"add": "mask"},
    ),
    "a logarithm of small probabilities": Trap(
        lambda x: x.softmax(-1).log(), (10 * noise(8, 16),), (noise(8, 16),), {"softmax": "storage", "log": "storage"}
    ),
    "a large number in the graph": Trap(
        lambda x: torch.tanh(x * 100000 / 50000),
        (noise(8, 16),),
        (1e-3 * noise(8, 16),),
        {"mul": "literal"},
        always=frozenset({"mul"}),
    ),
}


class _Network(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


def planned(trap: Trap, data: Tensors) -> tuple[Any, Any, Any]:
    program = torch.export.export(_Network(trap.network).eval(), data)
    ranges = calibrate(program, [data], progress=False)
    return program, ranges, classify(program, ranges)


def error(program: Any, mixed: Any, data: Tensors) -> float:
    """Relative L2; inf where only the cast graph is NaN or Inf."""
    expected, found = program.module()(*data).double(), mixed.module()(*data).double()
    if not torch.isfinite(found[torch.isfinite(expected)]).all():
        return math.inf
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", TRAPS)
def test_the_plan_is_right_where_fp16_is_wrong(name: str) -> None:
    """Whole-half is off by more than 1%, or not finite; the plan is within 1%, and says which rule saw it."""
    trap = TRAPS[name]
    program, _, plan = planned(trap, trap.harmful)
    whole = insert_casts(program, classify(program, None, nodes_to_include=[".*"]))
    assert error(program, whole, trap.harmful) > 0.01
    assert error(program, insert_casts(program, plan), trap.harmful) < 0.01
    rules = {node: [verdict.rule for verdict in plan[node].verdicts] for node in trap.caught}
    assert all(rule in rules[node] for node, rule in trap.caught.items()), rules


@pytest.mark.parametrize("name", TRAPS)
def test_harmless_data_leave_the_same_network_low(name: str) -> None:
    """What decides is the data: on harmless ones only what a number in the graph forbids stays high."""
    trap = TRAPS[name]
    program, _, plan = planned(trap, trap.harmless)
    assert set(plan.high_precision_nodes) == trap.always, [plan.explain(n) for n in plan.high_precision_nodes]
    assert error(program, insert_casts(program, plan), trap.harmless) < 0.01


@dataclass(frozen=True)
class HiddenTrap:
    """An operator whose inner sums fp16 cannot hold, and the same sums spelled out in fp16."""

    network: Callable[..., Any]
    spelled: Callable[..., Any]
    harmful: Tensors
    harmless: Tensors
    node: str


HIDDEN = {
    "a mean": HiddenTrap(
        lambda x: x.mean(-1), lambda x: x.sum(-1) / 4096, (40 + noise(4, 4096),), (noise(4, 4096),), "mean"
    ),
    "a pool over the whole picture": HiddenTrap(
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: x.sum((-1, -2)) / 4096,
        (40 + noise(2, 3, 64, 64),),
        (noise(2, 3, 64, 64),),
        "adaptive_avg_pool2d",
    ),
    "a norm over |x| = 500": HiddenTrap(
        lambda x: torch.linalg.vector_norm(x, dim=-1) / 100,
        lambda x: x.pow(2).sum(-1).sqrt(),
        (500 * noise(8, 4).sign(),),
        (noise(8, 4),),
        "linalg_vector_norm",
    ),
    "a layer norm": HiddenTrap(
        lambda x: F.layer_norm(x, (64,)),
        lambda x: x.pow(2).sum(-1),
        (100 * noise(8, 64),),
        (noise(8, 64),),
        "layer_norm",
    ),
    "a group norm": HiddenTrap(
        lambda x: F.group_norm(x, 2),
        lambda x: x.pow(2).sum((1, 2, 3)),
        (60 * noise(2, 4, 8, 8),),
        (noise(2, 4, 8, 8),),
        "group_norm",
    ),
    "attention, before it scales": HiddenTrap(
        lambda q, k: F.scaled_dot_product_attention(q, k, k),
        lambda q, k: q @ k.transpose(-1, -2),
        (100 * noise(2, 1, 8, 64), 100 * noise(2, 1, 8, 64)),
        (noise(2, 1, 8, 64), noise(2, 1, 8, 64)),
        "scaled_dot_product_attention",
    ),
    "a layer norm with an eps of 1e-12, of a row without variance": HiddenTrap(
        lambda x: F.layer_norm(x, (16,), eps=1e-12),
        lambda x: x / (x.var(-1, keepdim=True) + 1e-12).sqrt(),
        (WITH_EMPTY_ROWS,),
        (ROWS,),
        "layer_norm",
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_an_operator_hides_is_measured(name: str) -> None:
    """Spelled out in fp16 it is wrong; `interior` saw it, with the number; harmless data leave the operator low."""
    trap = HIDDEN[name]
    assert not torch.isfinite(trap.spelled(*(tensor.half() for tensor in trap.harmful))).all()
    _, _, plan = planned(Trap(trap.network, trap.harmful, trap.harmless, {}), trap.harmful)
    verdicts = [verdict for verdict in plan[trap.node].verdicts if verdict.rule == "interior"]
    assert len(verdicts) == 1
    _, _, calm = planned(Trap(trap.network, trap.harmful, trap.harmless, {}), trap.harmless)
    assert calm[trap.node].precision == "low", calm.explain(trap.node)


def test_a_mean_is_not_judged_by_its_length_alone() -> None:
    """The bound from peaks, n max|x|, would keep it high for one outlier; what was summed is far less."""
    x = 0.1 * noise(4, 4096)
    x[0, 0] = 100.0
    _, ranges, plan = planned(Trap(lambda x: x.mean(-1), (x,), (x,), {}), (x,))
    assert 4096 * 100.0 > 65504 > ranges.hidden.filter(node="mean")["hidden_max"][0]
    assert plan["mean"].precision == "low"


def test_a_backend_that_accumulates_in_fp32_is_believed() -> None:
    """`wide_accumulation` names the operators whose sums are fp32 whatever their type."""
    trap = HIDDEN["a group norm"]
    program, ranges, _ = planned(Trap(trap.network, trap.harmful, trap.harmless, {}), trap.harmful)
    assert classify(program, ranges, wide_accumulation=["group_norm"])["group_norm"].precision == "low"
    assert classify(program, ranges, wide_accumulation=["layer_norm"])["group_norm"].rule == "interior"
    for name in ("aten.group_norm", "torch.ops.aten.group_norm.default", torch.ops.aten.group_norm.default):
        plan = classify(program, ranges, wide_accumulation=[name])
        assert plan["group_norm"].precision == "low"
        assert plan.settings["wide_accumulation"] == ["group_norm"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("layernorm", "near names: layer_norm"),
        ("group_nrom", "near names: group_norm"),
        ("relu", "'relu' is no operator"),
    ],
)
def test_a_misspelt_operator_that_sums_is_told_with_those_that_exist(name: str, told: str) -> None:
    program = torch.export.export(torch.nn.LayerNorm(4).eval(), (torch.randn(2, 4),))
    with pytest.raises(SettingError, match=told):
        classify(program, None, wide_accumulation=name)


class _Gate(nn.Module):
    """A squeeze-and-excite gate: sigmoid values near 0.5, multiplied or compared."""

    def __init__(self, compared: bool) -> None:
        super().__init__()
        self.compared = compared

    def forward(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(0.001 * g)[:, :, None]
        return (gate - 0.5) * 1e4 if self.compared else x * gate.expand(8, 16, 4)


@pytest.mark.parametrize("compared", [False, True], ids=["multiplied", "its offset taken away"])
def test_an_offset_matters_where_it_is_taken_away(compared: bool) -> None:
    """0.5001 against 0.4999 is noise to a product, and all there is to a difference."""
    x, g = noise(8, 16, 4), noise(8, 16, seed=1)
    program = torch.export.export(_Gate(compared).eval(), (x, g))
    plan = classify(program, calibrate(program, [(x, g)], progress=False), torch.bfloat16)
    rule = plan["sigmoid"].rule
    assert rule == ("storage" if compared else None), plan.explain("sigmoid")


class _Region(nn.Module):
    """An autocast region, nested, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ x.T
            with torch.autocast("cpu", enabled=False):
                z = y.float() * 2
        return self.after(z) + y.float()


def test_what_a_region_gives_is_measured_inside_it() -> None:
    """Its readers find the numbers of the node in it, nested too: they are decided by ranges, not for want of them."""
    x = noise(8, 8)
    program = torch.export.export(_Region().eval(), (x,))
    plan = classify(program, calibrate(program, [x], progress=False))
    assert plan["linear_1"].precision == "low", plan.explain("linear_1")
    huge = classify(program, calibrate(program, [1000 * x], progress=False))
    assert huge["linear_1"].rule == "data_max"
