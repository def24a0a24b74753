"""The worked example of Torch-TensorRT's autocast proposal, from model to cast graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibcast.passes import PrecisionPlan, classify, insert_casts
from torch import nn
from torch.export import ExportedProgram

from tests.unmeasured import calibrate


class ConvNet(nn.Module):
    """Two rounds of convolution, ReLU and pooling, then a linear layer that the user keeps in fp32."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.fc = nn.Linear(16 * 8 * 8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        with torch.autocast(device_type=self._device_type, dtype=torch.float32):
            return self.fc(x)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def program(request: pytest.FixtureRequest, export: Callable[..., ExportedProgram]) -> ExportedProgram:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # neither device has an autocast to fp32 here: the region only marks
        return export(ConvNet(request.param), images())


@pytest.fixture(scope="module")
def plan(program: ExportedProgram) -> PrecisionPlan:
    ranges = calibrate(program, [images()], progress=False)
    return classify(program, ranges, nodes_to_exclude={"^conv2d$"}, data_max=512)


def test_the_plan_is_that_of_the_proposal(plan: PrecisionPlan) -> None:
    """conv2d is excluded by its exact name, the region is kept, and everything between runs low."""
    assert plan.low_precision_nodes == ("relu", "max_pool2d", "conv2d_1", "relu_1", "max_pool2d_1", "flatten")
    assert plan.high_precision_nodes == ("conv2d",)
    assert plan["conv2d"].reason == "it matches nodes_to_exclude '^conv2d$'"
    kept = {d.node: d.rule for d in plan.decisions if d.precision == "kept"}
    assert kept == {"submod_1.linear": "autocast_region", "linear": "autocast_region", "getitem": "getitem"}


def test_the_cast_graph(program: ExportedProgram, plan: PrecisionPlan, picture: Callable[..., list[str]]) -> None:
    """
    before: conv2d - relu - max_pool2d - conv2d_1 - relu_1 - max_pool2d_1 - flatten - [linear]
    after:  conv2d - CAST f16 - relu ... flatten - CAST f32 - [linear]
    """
    assert picture(insert_casts(program, plan)) == [
        "conv2d: conv2d f32",
        "conv2d_as_float16: cast f16 <- conv2d",
        "relu: relu f16",
        "max_pool2d: max_pool2d f16",
        "conv2d_1: conv2d f16",
        "relu_1: relu f16",
        "max_pool2d_1: max_pool2d f16",
        "flatten: flatten f16",
        "flatten_as_float32: cast f32 <- flatten",
        "linear: wrap_with_autocast f32",
        "output: getitem",
    ]


def test_weights_follow(program: ExportedProgram, plan: PrecisionPlan) -> None:
    """Those of the low convolution are stored in fp16; conv2d's and the region's stay, and stay shared."""
    mixed = insert_casts(program, plan)
    types = {name: tensor.dtype for name, tensor in mixed.state_dict.items()}
    low, high = torch.float16, torch.float32
    assert types == {
        "conv1.weight": high,
        "conv1.bias": high,
        "conv2.weight": low,
        "conv2.bias": low,
        "fc.weight": high,
        "fc.bias": high,
    }
    assert mixed.state_dict["fc.weight"] is program.state_dict["fc.weight"]


def test_it_runs_and_matches(program: ExportedProgram, plan: PrecisionPlan, run: Callable[..., list[Any]]) -> None:
    """The rewritten program gives fp32 outputs within fp16 rounding of the model's."""
    mixed = insert_casts(program, plan)
    (mine,), (reference,) = run(mixed, images()), run(program, images())
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, reference, rtol=2e-3, atol=2e-3)
    assert not torch.equal(mine, reference)
    torch.testing.assert_close(mixed.module()(images()), mine, rtol=0, atol=0)


def test_all_laws_hold(
    program: ExportedProgram, plan: PrecisionPlan, case_of: Callable[..., Any], law: Callable[[Any], None]
) -> None:
    """The laws of cast insertion, on the proposal's own model."""
    law(case_of(program, plan, (images(),)))
