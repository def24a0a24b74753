"""The plan of `torch.autocast`: each node in the type that autocast runs it in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from calibcast.passes import PrecisionPlan, insert_casts
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.last(self.norm(self.conv(x).relu()))
        return y.softmax(-1), y.argmax(-1)


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("low_type", [torch.float16, torch.bfloat16])
def test_products_are_low_and_norms_are_not(low_type: torch.dtype) -> None:
    """On a GPU autocast runs products in the low type, norms and softmax in fp32, and the rest in what comes."""
    plan = PrecisionPlan.from_autocast(torch.export.export(Net().eval(), (X,)), low_type)
    assert plan.low_precision_type == low_type
    assert {"conv2d", "relu", "linear", "argmax"} == set(plan.low_precision_nodes)
    assert {"layer_norm", "softmax"} == set(plan.high_precision_nodes)
    assert "torch.autocast" in plan.explain("softmax")


def test_cast_program_is_what_autocast_gives() -> None:
    """On the CPU, whose lists are others, the cast program gives what the model gives under autocast."""
    model = Net().eval()
    program = torch.export.export(model, (X,))
    plan = PrecisionPlan.from_autocast(program, torch.bfloat16, device_type="cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs, _ = model(X)
    ours, _ = insert_casts(program, plan).module()(X)
    torch.testing.assert_close(ours, theirs.float(), rtol=2e-2, atol=2e-2)


def test_what_follows_runs_in_what_comes() -> None:
    """A sum of a low and an fp32 tensor is in fp32; dynamic sizes and state of autocast are left alone."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return F.relu(y + y) + x

    sizes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(Residual(), (torch.randn(4, 8),), dynamic_shapes=sizes)
    plan = PrecisionPlan.from_autocast(program)
    assert plan.low_precision_nodes == ("linear", "add", "relu")
    assert plan.high_precision_nodes == ("add_1",)
    assert not torch.is_autocast_enabled("cuda")


def test_plan_survives_a_file(tmp_path) -> None:
    """Saved, loaded, and of the same program."""
    program = torch.export.export(Net().eval(), (X,))
    plan = PrecisionPlan.from_autocast(program)
    plan.save(tmp_path / "plan.json")
    assert PrecisionPlan.load(tmp_path / "plan.json").low_precision_nodes == plan.low_precision_nodes
