"""A plan run with fp32 kernels: it rounds where the cast graph rounds, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from calibcast.calib import MismatchError, calibrate
from calibcast.calib.rounded_runner import RoundedRunner
from calibcast.calib.rounding import fp32_kernels, rounded
from calibcast.passes import classify, insert_casts
from calibcast.passes.emulation import emulate, emulated
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom


class Net(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def exported(function: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(Net(function), (x,))


def low_everywhere(program: torch.export.ExportedProgram, low_type: torch.dtype) -> RoundedRunner:
    names = [n.name for n in program.graph.nodes if n.op == "call_function"]
    return RoundedRunner(program, names, low_type)


def test_it_gives_what_half_kernels_give() -> None:
    """On a network, emulated and cast graph have the same error against fp32, within a fraction of a dB."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.Softmax(-1)).eval()
    x = torch.randn(64, 32)
    program = torch.export.export(model, (x,))
    plan = classify(program, None, low_precision_type=torch.float16, rules=())
    reference = model(x).detach()
    ours = (emulate(program, plan, x) - reference).norm()
    theirs = (insert_casts(program, plan).module()(x).detach() - reference).norm()
    assert ours > 0
    assert abs(20 * math.log10(ours / theirs)) < 0.5


def test_only_low_nodes_round() -> None:
    """A high node between low ones computes on what it is given, and gives it on unrounded."""
    x = torch.rand(1000)
    program = exported(lambda x: x.exp().sin(), x)
    [value] = RoundedRunner(program, ["exp"], torch.bfloat16).run([x])
    half = rounded(rounded(x, torch.bfloat16).exp(), torch.bfloat16)
    assert torch.equal(value, half.sin())
    [value] = RoundedRunner(program, ["sin"], torch.bfloat16).run([x])
    assert torch.equal(value, rounded(rounded(x.exp(), torch.bfloat16).sin(), torch.bfloat16))
    [value] = RoundedRunner(program, [], torch.bfloat16).run([x])
    assert torch.equal(value, x.exp().sin())


def test_numbers_in_a_call_are_rounded() -> None:
    """1e-9 is 0 in float16; the eps of a norm is no such number."""
    x = torch.zeros(4)
    program = exported(lambda x: (x + 1e-9).log(), x)
    [value] = low_everywhere(program, torch.float16).run([x])
    assert (value == -math.inf).all()
    program = exported(lambda x: F.layer_norm(x, (4,), eps=1e-9), x)
    [value] = low_everywhere(program, torch.float16).run([x])
    assert value.isfinite().all()


def test_writes_in_place_are_rounded_where_they_land() -> None:
    """A write through a view is seen rounded by all who share the storage, and the caller's tensor is left alone."""

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 1.0
        y[0].add_(1 / 3)
        return y + 0

    x = torch.rand(2, 3)
    before = x.clone()
    [value] = low_everywhere(exported(function, x), torch.float16).run([x])
    assert torch.equal(x, before)
    expected = rounded(x, torch.float16)
    third = float(torch.tensor(1 / 3).half())
    assert torch.equal(value[0], rounded(expected[0] + third, torch.float16))
    assert torch.equal(value[1], expected[1])


def test_masks_are_saturated() -> None:
    """-1e9 beyond a float16's range stays finite, and the row attends as before."""

    def function(x: torch.Tensor) -> torch.Tensor:
        keep = torch.tensor([True, False, True, False])
        mask = torch.where(keep, 0.0, -1e9)
        return F.softmax(x + mask, -1)

    x = torch.randn(4, 4)
    program = exported(function, x)
    ranges = calibrate(program, [x], progress=False)
    plan = classify(program, ranges, low_precision_type=torch.float16)
    value = emulate(program, plan, x)
    assert value.isfinite().all()
    assert (value - function(x)).abs().max() < 1e-3


def test_the_process_is_left_as_it_was() -> None:
    """Flags of fp32 precision are put back, after an error too."""
    owner = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, inside = owner.fp32_precision, []

    def fail() -> None:
        inside.append(owner.fp32_precision)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), fp32_kernels():
        fail()
    assert inside == ["ieee"]
    assert owner.fp32_precision == before


def test_a_plan_of_another_program_is_refused() -> None:
    x = torch.rand(4)
    plan = classify(exported(lambda x: x.exp().sin(), x), None)
    with pytest.raises(MismatchError):
        emulated(exported(lambda x: x.sin().exp(), x), plan)
