"""Running a program node by node: what it gives, what it leaves alone, and how its errors are told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibcast.calib import BatchError, CalibcastError, ProgramError, calibrate
from calibcast.calib.execution import NodeError, ProgramRunner, input_structure, output_names, output_structure
from torch import fx, nn
from torch.export import ExportedProgram

from tests.functions import Apply


def exported(model: nn.Module | Callable[..., Any], *args: torch.Tensor) -> ExportedProgram:
    return torch.export.export(model if isinstance(model, nn.Module) else Apply(model), args)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Regions(nn.Module):
    """Autocast in autocast in no_grad, with a mutated buffer outside and a literal inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        self.steps.add_(1)
        with torch.no_grad():
            y = self.linear(x)
            with torch.autocast("cpu", torch.bfloat16):
                low = self.linear(y) * torch.tensor(2.0)
                with torch.autocast("cpu", enabled=False):
                    high = self.linear(low.float())
        return {"low": low, "pair": (high, x + self.steps)}


@pytest.fixture(scope="module")
def regions() -> Regions:
    torch.manual_seed(0)
    return Regions().eval()


@pytest.fixture(scope="module")
def program(regions: Regions) -> ExportedProgram:
    return torch.export.export(regions, (noise(2, 4),))


def test_run_gives_what_the_program_gives(program: ExportedProgram) -> None:
    """Watched or not, the outputs are those of the program itself, in its structure, every time from its state."""
    x = noise(2, 4, seed=1)
    expected = copy.deepcopy(program).module()(x)  # a module shares its buffers with the program, and writes them
    runner = ProgramRunner(program)
    for _ in range(2):
        found = output_structure(program, runner.run([x], lambda *_: None))
        assert torch.equal(found["low"], expected["low"])
        assert torch.equal(found["pair"][0], expected["pair"][0])
        assert torch.equal(found["pair"][1], expected["pair"][1])


def test_watch_sees_every_node_once_under_its_qualified_name(program: ExportedProgram) -> None:
    """Each node is reported once with what it gave, nodes of regions by the path of their region."""
    seen: list[str] = []
    linears: dict[str, torch.dtype] = {}

    def watch(name: str, node: fx.Node, result: Any, arguments: dict[fx.Node, Any]) -> None:
        assert name.rpartition(".")[2] == node.name
        seen.append(name)
        if node.target is torch.ops.aten.linear.default:
            linears[name] = result.dtype

    ProgramRunner(program).run([noise(2, 4)], watch)
    assert len(seen) == len(set(seen))
    assert {name.count("."): dtype for name, dtype in linears.items()} == {
        1: torch.float32,
        2: torch.bfloat16,
        3: torch.float32,
    }


def test_outputs_are_named_as_they_are_reached(program: ExportedProgram) -> None:
    """A name says how to get at an output of the model."""
    assert output_names(program) == ["output['low']", "output['pair'][0]", "output['pair'][1]"]
    assert output_names(exported(lambda x: x + 1, noise(3))) == ["output"]


class Named(nn.Module):
    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        return x * scale


def test_flat_inputs_get_their_structure_back() -> None:
    """Flat inputs become the arguments and keyword arguments of the call."""
    x, scale = noise(3), noise(3, seed=1)
    args, kwargs = input_structure(torch.export.export(Named(), (noise(3),), {"scale": noise(3)}), [x, scale])
    assert args[0] is x
    assert kwargs["scale"] is scale


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids).relu()


def test_node_that_raises_is_named_with_its_batch() -> None:
    """An index out of range is told as batch, input shapes, node, module and cause; earlier batches are kept."""
    program = exported(Lookup(), torch.tensor([1, 2, 3]))
    message = r"batch 1 \(input shapes \(3,\)\): node embedding \(table, .*\) raised IndexError: index out of range"
    with pytest.raises(BatchError, match=message) as caught:
        calibrate(program, [torch.tensor([1, 2, 9]), torch.tensor([1, 10, 3])], progress=False)
    assert caught.value.ranges is not None
    assert caught.value.ranges.calibration.batches == 1
    assert isinstance(caught.value.__cause__, IndexError)


class LookupInRegion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.table(ids).relu()


def test_node_that_raises_inside_a_region_is_named_by_its_path() -> None:
    """An error in a region names the node inside, once."""
    program = exported(LookupInRegion(), torch.tensor([1, 2, 3]))
    with pytest.raises(NodeError, match=r"^node submod_\d+\.embedding \(table, .*raised IndexError") as caught:
        ProgramRunner(program).run([torch.tensor([1, 2, 30])])
    assert str(caught.value).count("raised") == 1
    assert caught.value.name.endswith(".embedding")


class Attention(nn.Module):
    """Drops attention weights inside the op, as `nn.MultiheadAttention` does."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class InRegion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.drop(x + 1)


TRAINING: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "dropout": (nn.Dropout(0.5), (3, 4)),
    "dropout in place": (nn.Dropout(0.5, inplace=True), (3, 4)),
    "dropout of channels": (nn.Dropout2d(0.5), (2, 3, 4, 4)),
    "alpha dropout": (nn.AlphaDropout(0.5), (3, 4)),
    "batch norm": (nn.BatchNorm1d(4), (3, 4)),
    "instance norm": (nn.InstanceNorm1d(3, track_running_stats=True), (2, 3, 4)),
    "rrelu": (nn.RReLU(), (3, 4)),
    "attention": (Attention(), (3, 2, 4)),
    "lstm": (nn.LSTM(4, 4, num_layers=2, dropout=0.5), (3, 2, 4)),
    "gru": (nn.GRU(4, 4, num_layers=2, dropout=0.5), (3, 2, 4)),
    "rnn": (nn.RNN(4, 4, num_layers=2, dropout=0.5), (3, 2, 4)),
    "inside a region": (InRegion(), (3, 4)),
}


@pytest.mark.parametrize("name", TRAINING)
def test_model_in_train_mode_is_refused(name: str) -> None:
    """What drops, or updates running statistics, has ranges of training: the error names the node and the cure."""
    model, shape = TRAINING[name]
    program = exported(model.train(), noise(*shape))
    with pytest.raises(ProgramError, match=r"^node \w+ .*training mode.*Call model.eval\(\)"):
        calibrate(program, [noise(*shape)], progress=False)


@pytest.mark.parametrize("name", TRAINING)
def test_the_same_model_in_eval_mode_is_calibrated(name: str) -> None:
    """After `eval()` every one of them is deterministic, and two runs give one table."""
    model, shape = TRAINING[name]
    program = exported(model.eval(), noise(*shape))
    first = calibrate(program, [noise(*shape)], progress=False)
    assert len(first) > 1
    assert calibrate(program, [noise(*shape)], progress=False).frame.equals(first.frame)


HARMLESS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "dropout of nothing": (nn.Dropout(0.0), (3, 4)),
    "batch norm without statistics": (nn.BatchNorm1d(4, track_running_stats=False), (3, 4)),
    "instance norm": (nn.InstanceNorm1d(3), (2, 3, 4)),
    "lstm of one layer": (nn.LSTM(4, 4), (3, 2, 4)),
    "lstm that drops nothing": (nn.LSTM(4, 4, num_layers=2), (3, 2, 4)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_train_mode_that_changes_nothing_is_allowed(name: str) -> None:
    """Train mode is only refused where it makes calls differ."""
    model, shape = HARMLESS[name]
    program = exported(model.train(), noise(*shape))
    first = calibrate(program, [noise(*shape)], progress=False)
    assert calibrate(program, [noise(*shape)], progress=False).frame.equals(first.frame)


def test_program_without_floating_tensors_is_refused() -> None:
    """Where there is nothing to measure, that is the error."""
    program = exported(lambda x: x * 2 + 1, torch.tensor([1, 2, 3]))
    with pytest.raises(ProgramError, match="no floating-point tensor"):
        calibrate(program, [torch.tensor([1, 2, 3])], progress=False)


@pytest.mark.parametrize("weighted", [True, False], ids=["with weights", "without"])
@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_device_that_is_not_there_is_named(device: str, weighted: bool) -> None:
    """A device that does not exist, or is not in this machine, is a CalibcastError that names it."""
    program = exported(nn.Linear(4, 4) if weighted else lambda x: x + 1, noise(2, 4))
    with pytest.raises(CalibcastError, match=f"cannot be moved to device='{device}'"):
        calibrate(program, [noise(2, 4)], device=device, progress=False)


def test_unchanged_weights_are_shared() -> None:
    """A runner on the program's own device copies no weight."""
    program = exported(nn.Linear(4, 4), noise(2, 4))
    places = {tensor.data_ptr() for tensor in program.state_dict.values()}
    seen: set[int] = set()

    def watch(name: str, node: fx.Node, result: Any, arguments: dict[fx.Node, Any]) -> None:
        if node.op == "placeholder":
            seen.add(result.data_ptr())

    ProgramRunner(program).run([noise(2, 4)], watch)
    assert places < seen


def test_half_kernels_that_the_host_lacks_are_emulated() -> None:
    """An operator without a half kernel here runs in fp32 and is rounded, as a device with it would give."""
    program = exported(lambda x: torch.cdist(x, x + 1), noise(4, 3))
    x = noise(4, 3, seed=1)
    graph = program.graph_module
    runner = ProgramRunner(program)
    found = runner.run([x.half()])[0]
    expected = torch.cdist(x.half().float(), (x.half() + 1).float()).half()
    assert graph is program.graph_module
    assert found.dtype == torch.float16
    assert torch.equal(found, expected)


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,)) + 0.5


def test_programs_with_branches_are_calibrated() -> None:
    """`torch.cond` runs the branch that the data choose; its result has a row."""
    program = torch.export.export(Branches(), (noise(3),))
    up, down = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, -2.0, -3.0])
    frame = calibrate(program, [up, down], progress=False).frame
    assert frame.filter(node="cond").select("min", "max").row(0) == (-4.0, 6.0)
    assert frame.filter(node="add").select("min", "max").row(0) == (-3.5, 6.5)


@pytest.mark.parametrize("watched", [False, True])
def test_a_run_leaves_no_gradients_behind(watched: bool) -> None:
    """Also of an input that asks for some and is written to, of which the program gets a copy."""

    class Written(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1)

    program = torch.export.export(Written(), (torch.ones(2),))
    [given] = ProgramRunner(program).run([torch.ones(2, requires_grad=True)], (lambda *_: None) if watched else None)
    assert not given.requires_grad
