"""Copies of written state: what overlapped in memory does so in the copies, and the caller's tensors stay."""

from __future__ import annotations

import copy

import pytest
import torch
from calibcast.calib.calibration import calibrate
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.graph import same_device
from calibcast.calib.state_copies import copies_of_written
from calibcast.passes.cast_insertion import insert_casts
from calibcast.passes.classification import classify
from calibcast.passes.plan import PrecisionPlan
from torch import nn
from torch.export import ExportedProgram


class Overlapping(nn.Module):
    """Two buffers that share half of their elements; the first is written, and both are read."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.ones(32)
        self.register_buffer("first", whole[:16])
        self.register_buffer("second", whole[8:24])
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.first.add_(1.0)
        return self.linear(x) * self.first + self.second


class Strided(nn.Module):
    """A buffer, a column of it that is written, and a view of its bits as another type."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.ones(4, 4)
        self.register_buffer("whole", whole)
        self.register_buffer("column", whole[:, 1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.column.mul_(3.0)
        return x * self.whole


def _state(program: ExportedProgram) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in {**program.state_dict, **program.constants}.items()}


@pytest.mark.parametrize(("model", "size"), [(Overlapping, 16), (Strided, 4)])
def test_running_leaves_the_caller_alone_and_gives_what_the_model_gives(model: type[nn.Module], size: int) -> None:
    """Measured, run by us, and as a cast program: equal to torch, call after call, and the program is as it was."""
    torch.manual_seed(0)
    module, x = model().eval(), torch.randn(4, size)
    program = torch.export.export(module, (x,))
    before = _state(program)
    mixed = insert_casts(program, classify(program, calibrate(program, [x], progress=False)))
    same = insert_casts(program, PrecisionPlan.from_types(program))
    runner = ProgramRunner(program)
    for _ in range(2):  # a runner starts each call from the saved state
        ours = runner.run([x])[0]
    with torch.no_grad():
        cast, uncast, expected = mixed.module()(x), same.module()(x), copy.deepcopy(module)(x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    torch.testing.assert_close(uncast, expected, rtol=0, atol=0)
    torch.testing.assert_close(cast, expected, rtol=1e-2, atol=1e-2)
    after = _state(program)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_what_overlaps_is_copied_and_the_rest_is_shared() -> None:
    """Of one storage, the stretch that is written; ties stay ties, types and strides stay."""
    memory = torch.arange(64.0)
    tensors = {
        "written": memory[3:7],
        "tied": memory[3:7],
        "across": memory[5:20:2],
        "bits": memory.view(torch.int32)[6:8],
        "apart": memory[40:50],
        "other": torch.ones(3),
        "empty": memory[3:3],
    }
    copies = copies_of_written(tensors, {"written", "empty"})
    assert set(copies) == {"written", "tied", "across", "bits", "empty"}
    assert all(torch.equal(copies[name], tensors[name]) for name in copies)
    copies["written"].zero_()
    assert copies["tied"].sum() == 0
    assert copies["across"][0] == 0
    assert copies["bits"][0] == 0
    assert torch.equal(memory, torch.arange(64.0))
    assert copies["across"].stride() == (2,)
    assert copies["written"].untyped_storage().nbytes() < 100


def test_devices_are_compared_as_devices() -> None:
    """Two GPUs are not the same device, though of one type."""
    assert not same_device(torch.device("cuda:0"), torch.device("cuda:1"))
    assert not same_device(torch.device("cpu"), torch.device("cuda:0"))
    assert same_device(torch.device("cuda"), torch.device("cuda:0"))
    assert same_device(torch.device("cpu"), torch.device("cpu:0"))
