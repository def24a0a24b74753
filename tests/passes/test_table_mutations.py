"""What a rule decides when one operator is not in its set, or one constant is another: each was changed once unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from calibcast.calib import calibrate
from calibcast.calib.operators import CHECKS_NUMBERS, SUMS
from calibcast.calib.sentinels import reads_order, sentinels_of
from calibcast.passes import Literal, NodeFacts, PrecisionPlan, TensorFacts, classify
from calibcast.passes.rules import LiteralRange
from calibcast.passes.tensor_rules import Storage
from torch import nn


def plan_of(function: Callable[..., Any], x: torch.Tensor, **settings: Any) -> PrecisionPlan:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return function(x)

    with torch.no_grad():
        program = torch.export.export(Net(), (x,))
        return classify(program, calibrate(program, [(x,)], progress=False, rounding_batches=0), **settings)


LARGE = torch.full((1, 1, 16, 16, 16), 300.0) + torch.rand(1, 1, 16, 16, 16)
SUMMED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda x: x.sum(-1).sum(-1).sum(-1),
    "mean": lambda x: x.mean((-1, -2, -3)),
    "nansum": lambda x: x.nansum((-1, -2, -3)),
    "nanmean": lambda x: x.nanmean((-1, -2, -3)),
    "cumsum": lambda x: x.flatten().cumsum(0),
    "avg_pool1d": lambda x: F.avg_pool1d(x.flatten(2), 1024),
    "avg_pool2d": lambda x: F.avg_pool2d(x[0], 16),
    "avg_pool3d": lambda x: F.avg_pool3d(x, 16),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 1),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x.flatten(2, 3), 1),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, 1),
}


def test_all_sums_are_tried() -> None:
    """The table has these and no others."""
    assert set(SUMMED) == SUMS


@pytest.mark.parametrize("name", SUMMED)
def test_sum_that_overflows_inside_is_kept(name: str) -> None:
    """4096 terms of 300 pass what fp16 holds, though their mean does not."""
    plan = plan_of(SUMMED[name], LARGE, data_max=float("inf"))
    assert any(v.rule == "interior" for d in plan.decisions for v in d.verdicts)


@pytest.mark.parametrize("function", [torch.log, torch.log2, torch.log10, torch.reciprocal, torch.rsqrt])
def test_small_values_are_kept_for_what_blows_them_up(function: Any) -> None:
    """1e-6 is subnormal in fp16, and a logarithm or a division sees its share."""
    x = torch.cat([torch.rand(64) + 0.5, torch.full((4,), 1.3e-6)])
    assert plan_of(function, x).high_precision_nodes
    assert plan_of(torch.sqrt, x).high_precision_nodes == ()


def test_numbers_that_kernels_refuse_are_those_of_the_table() -> None:
    """Their names, as tried on torch 2.14; each is called in `test_operators`."""
    assert (
        set(
            """
        masked_fill fill full full_like new_full scalar_tensor index_fill fill_diagonal scatter clamp clamp_min
        clamp_max hardtanh threshold pow constant_pad_nd pad linspace
        """.split()  # noqa: SIM905
        )
        == CHECKS_NUMBERS
    )


def faint(absmax: float) -> NodeFacts:
    """A tensor of about that magnitude, which fp16 holds with some 30 dB: the noise of its subnormals is not less."""
    counts = [0] * 256
    counts[127 - 13 if absmax > 2.0**-13 else 127 - 14] = 1000
    counts[127 - 19] = 9000
    tensor = TensorFacts(
        "x", min=-absmax, max=absmax, absmax=absmax, mean=0.0, rms=1e-6, smallest=2.0**-20, histogram=counts
    )
    return NodeFacts("n", inputs=(tensor,))


@pytest.mark.parametrize(("normals", "kept"), [(1.5, True), (3.9, True), (4.1, False)])
def test_faint_is_what_peaks_below_four_normals(normals: float, kept: bool) -> None:
    """Such a tensor must keep 40 dB over the rounding of its subnormals, another one 20."""
    verdict = Storage()(faint(normals * 2.0**-14))
    assert (verdict is not None) is kept
    assert verdict is None or verdict.limit == 40.0


@pytest.mark.parametrize(("least", "kept"), [(99e-12, True), (101e-12, False)])
def test_bound_is_never_reached_a_hundred_times_above_it(least: float, kept: bool) -> None:
    """The 1e-12 of a normalisation does nothing where all that was measured is above a hundred times that."""

    facts = NodeFacts(
        "n",
        base="clamp",
        inputs=(TensorFacts("x", min=least, max=1.0, absmax=1.0),),
        literals=(Literal("min", 1e-12),),
    )
    assert (LiteralRange()(facts) is not None) is kept


@pytest.mark.parametrize(("number", "safe"), [(-4000.0, True), (-6000.0, False), (-20000.0, False)])
def test_number_that_is_above_all_masks_has_a_margin(number: float, safe: bool) -> None:
    """A comparison with a number is the same before and after a mask is saturated only if the number is well above."""

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.masked_fill(x > 1, -1e9) > number

    graph_module = torch.export.export(Net(), (torch.rand(4),)).graph_module
    compare = [node for node in graph_module.graph.nodes if node.op == "call_function"][-1]
    assert reads_order(compare, sentinels_of(graph_module, set())) is safe
