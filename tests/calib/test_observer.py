"""What is measured, when it is measured, and what measuring costs, against a run that keeps everything."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from operator import getitem
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib import RangeTable, calibrate
from calibcast.calib.batches import signature_of
from calibcast.calib.calibration_run import measure_weights, prepare
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.kernel import HostKernel
from calibcast.calib.small_tensors import SmallTensors
from polars.testing import assert_frame_equal
from torch import fx, nn
from torch.export import ExportedProgram

from tests.functions import Apply, exported


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Keeper(fx.Interpreter):
    """Keeps a copy of every floating tensor at the moment when its node has run."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.kept: dict[tuple[str, int], torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output" and n.target is not getitem:
            items = result if isinstance(result, (tuple, list)) else [result]
            for output, item in enumerate(items):
                if isinstance(item, torch.Tensor) and item.is_floating_point():
                    self.kept[n.name, output] = item.detach().double().flatten().clone()
        return result


def kept_values(program: ExportedProgram, *inputs: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
    """Every tensor of one run of `program`, as float64 copies, by (node, output)."""
    state = {**program.state_dict, **program.constants}
    flat = iter(inputs)
    values = [
        state[spec.target].detach().clone() if spec.target is not None else next(flat).clone()
        for spec in program.graph_signature.input_specs
    ]
    keeper = Keeper(program.graph_module)
    with torch.no_grad():
        keeper.run(*values)
    return keeper.kept


def row(table: RangeTable, node: str, output: int = 0) -> dict[str, Any]:
    return table.frame.row(by_predicate=(pl.col("node") == node) & (pl.col("output") == output), named=True)


def assert_rows_hold(table: RangeTable, kept: dict[tuple[str, int], torch.Tensor]) -> None:
    """Each tensor has one row, and the row says what the kept copy says."""
    assert sorted(table.frame.select("node", "output").rows()) == sorted(kept)
    for (node, output), x in kept.items():
        found = row(table, node, output)
        assert found["elements"] == x.numel(), node
        assert (found["min"], found["max"]) == (float(x.min()), float(x.max())), node
        assert found["absmax"] == float(x.abs().max()), node
        assert found["zeros"] == int((x == 0).sum()), node
        assert found["mean"] == pytest.approx(float(x.mean()), rel=1e-5, abs=1e-5 * float(x.abs().max())), node
        assert found["rms"] == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5), node


def channels(x: torch.Tensor) -> torch.Tensor:
    y = x.view(2, 3, 4).permute(1, 2, 0)
    return y.reshape(3, 8).t().contiguous().flatten().unsqueeze(0).squeeze(0) * 2


def halves(x: torch.Tensor) -> torch.Tensor:
    first, second = x.split(12)
    return first.view(3, 4).t() + second.reshape(4, 3)


def idle(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout(x, 0.5, training=False).contiguous().to(torch.float32).detach() + 1


def expanded(x: torch.Tensor) -> torch.Tensor:
    return x.view(24, 1).expand(24, 5).transpose(0, 1)[1:].reshape(-1)


def narrowed(x: torch.Tensor) -> torch.Tensor:
    return x[:12] + x[12:] + x[::2].view(12) + x.view(2, 12).select(0, 0)


def written_between(x: torch.Tensor) -> torch.Tensor:
    y = x + 0
    view = y.view(4, 6)
    y.mul_(-3)
    return view.view(6, 4)


def written_through_view(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y.view(4, 6)[0].zero_()
    return y.view(2, 12)


def widened(x: torch.Tensor) -> torch.Tensor:
    return x.half().double().view(4, 6).bfloat16().float()


GRAPHS = [channels, halves, idle, expanded, narrowed, written_between, written_through_view, widened]


@pytest.mark.parametrize("function", GRAPHS, ids=lambda function: function.__name__)
def test_every_row_is_what_its_node_gave(function: Callable[..., Any]) -> None:
    """Whatever shares or rewrites storage, a row holds the values of its node at the time when it ran."""
    program = exported(function, noise(24))
    x = noise(24, seed=1)
    assert_rows_hold(calibrate(program, [x], progress=False), kept_values(program, x))


def test_views_are_copied_from_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of views of one tensor is measured once, and every row gets the same numbers."""
    measured: list[int] = []
    plain, plain_small = HostKernel.measure, SmallTensors.put

    def counting(self: HostKernel, tensor: torch.Tensor, mask_at_most: float | None) -> Any:
        measured.append(tensor.numel())
        return plain(self, tensor, mask_at_most)

    def counting_small(self: SmallTensors, place: int, tensor: torch.Tensor) -> None:
        measured.append(tensor.numel())
        plain_small(self, place, tensor)

    monkeypatch.setattr(HostKernel, "measure", counting)
    monkeypatch.setattr(SmallTensors, "put", counting_small)
    program = exported(lambda x: x.view(4, 6).t().reshape(24).unsqueeze(0), noise(24))
    table = calibrate(program, [noise(24)], progress=False)
    views = table.frame.filter(pl.col("op").is_in(["aten.view.default", "aten.t.default"]))
    names = ["min", "max", "smallest", "mean", "rms", "zeros", "histogram"]
    assert 0 < len(measured) < len(table)
    assert views.height == 2
    assert views.select(names).row(0) == views.select(names).row(1) == table.frame.select(names).row(0)


def test_inplace_relu_does_not_change_what_was_measured_before() -> None:
    """The convolution before an in-place ReLU keeps its negative minimum; the ReLU has none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten()).eval()
    program = torch.export.export(model, (noise(1, 2, 6, 6),))
    x = noise(1, 2, 6, 6, seed=3)
    table = calibrate(program, [x], progress=False)
    before = model[0](x).detach()
    assert row(table, "conv2d")["min"] == float(before.min()) < 0
    assert row(table, "relu_")["min"] == 0
    assert row(table, "relu_")["zeros"] == int((before <= 0).sum())
    assert_rows_hold(table, kept_values(program, x))


@pytest.mark.parametrize("function", GRAPHS, ids=lambda function: function.__name__)
def test_inference_mode_gives_the_same_rows(function: Callable[..., Any]) -> None:
    """Tensors made under `inference_mode` keep no version, so nothing is taken for unchanged."""
    program = exported(function, noise(24))
    plain = calibrate(program, [noise(24)], progress=False)
    with torch.inference_mode():
        inside = calibrate(program, [noise(24)], progress=False)
    assert inside.frame.equals(plain.frame)


@pytest.mark.parametrize("function", GRAPHS, ids=lambda function: function.__name__)
def test_device_kernel_gives_the_same_table(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An observer that measures as it would on a device fills the same rows."""
    program = exported(function, noise(24))
    host = calibrate(program, [noise(24)] * 2, progress=False).frame
    monkeypatch.setattr("calibcast.calib.observer.HostKernel", lambda histogram: None)
    device = calibrate(program, [noise(24)] * 2, progress=False).frame
    sums = ["mean", "rms"]
    assert device.drop(sums).equals(host.drop(sums))
    assert_frame_equal(device.select(sums), host.select(sums), rel_tol=1e-5, abs_tol=1e-6)


def lazily_negated(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(x, x.abs() + 1).conj().imag * 2


def test_lazily_negated_tensors_are_measured() -> None:
    """The imaginary part of a conjugate, whose sign is flipped only on reading, has a row with that sign."""
    program = exported(lazily_negated, noise(24))
    table = calibrate(program, [noise(24)], progress=False)
    assert row(table, "imag")["max"] == -float(noise(24).abs().min() + 1)


def test_empty_tensors_have_a_row_that_saw_nothing() -> None:
    """A tensor without elements keeps its row: no batch, no element, no range."""
    table = calibrate(exported(lambda x: x[:0] * 2 + x.sum(), noise(24)), [noise(24)] * 2, progress=False)
    found = row(table, "mul")
    assert (found["batches"], found["elements"], found["min"], found["rms"]) == (0, 0, None, None)


def test_zero_dimensional_tensors_are_measured() -> None:
    """A scalar tensor is a tensor of one element."""
    x = noise(24).abs()
    found = row(calibrate(exported(lambda x: x.sum() * 2, noise(24)), [x, x * 3], progress=False), "mul")
    assert (found["batches"], found["elements"]) == (2, 2)
    assert (found["min"], found["max"]) == (float(x.sum() * 2), float((x * 3).sum() * 2))


def everything_in(thing: Any, seen: set[int]) -> Iterator[Any]:
    """All objects reachable from `thing` through attributes and containers."""
    if id(thing) in seen or isinstance(thing, (type, str)):
        return
    seen.add(id(thing))
    yield thing
    inner: list[Any] = list(thing.items()) if isinstance(thing, dict) else []
    if isinstance(thing, (list, tuple, set)):
        inner += thing
    if not isinstance(thing, torch.Tensor):
        inner += vars(thing).values() if hasattr(thing, "__dict__") else []
    for item in inner:
        yield from everything_in(item, seen)


def held_bytes(thing: Any) -> int:
    """Bytes of tensors and of containers that `thing` keeps alive."""
    return sum(
        item.untyped_storage().nbytes() if isinstance(item, torch.Tensor) else sys.getsizeof(item)
        for item in everything_in(thing, set())
        if not isinstance(item, (int, float))
    )


def test_observer_does_not_grow_with_batches() -> None:
    """After twenty batches an observer holds the bytes that it held after the first, whatever their sizes."""
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Apply(halving), (noise(8),), dynamic_shapes={"args": ({0: length},)})
    run = prepare(program, None, True, "warn")
    measure_weights(run)
    sizes = []
    for index in range(20):
        run.observer.start(index)
        flat = signature_of(program).flatten(noise(8 * (index + 1)), index)
        run.runner.run_batch(flat, index, run.observer.watch)
        run.observer.finish()
        sizes.append(held_bytes(run.observer))
    assert sizes[0] > 256 * 8 * len(run.specs)
    assert set(sizes) == {sizes[0]}


def test_small_and_large_tensors_of_one_batch_keep_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the buffer of small tensors fills up, and whatever is measured between, also views of either."""
    monkeypatch.setattr("calibcast.calib.small_tensors._ROWS", 2)
    monkeypatch.setattr("calibcast.calib.small_tensors.MOST", 30)

    def mixed(x: torch.Tensor) -> torch.Tensor:
        small = x[:20] * 2
        large = (torch.cat([x, x]) + 1).view(6, 8)
        again = small.view(4, 5).t() - 1
        return (large.t().sum() + again.relu().reshape(20) + small.view(20)).view(2, 10) * large.view(48)[:10]

    program = exported(mixed, noise(24))
    x = noise(24, seed=1)
    assert_rows_hold(calibrate(program, [x], progress=False), kept_values(program, x))


def test_a_batch_that_is_left_out_leaves_nothing_behind() -> None:
    """Small tensors that were put aside for a batch with NaN are not measured with the next one."""
    program = exported(lambda x: (x * 2).sigmoid(), noise(24))
    bad = noise(24)
    bad[3] = float("nan")
    found = calibrate(program, [noise(24), bad, noise(24, seed=1)], on_nonfinite="skip", progress=False)
    without = calibrate(program, [noise(24), noise(24, seed=1)], progress=False)
    assert found.frame.drop("absmax_batch").equals(without.frame.drop("absmax_batch"))
    assert found.calibration.skipped == (1,)


def halving(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).relu().view(-1).sigmoid() + 1


def test_activations_are_freed_after_their_last_reader() -> None:
    """While a chain runs, only the newest result and what it was made from are alive."""
    program = exported(lambda x: (x + 1).exp().sin().cos().tanh().sigmoid(), noise(24))
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def watch(name: str, node: fx.Node, result: Any, arguments: dict[fx.Node, Any]) -> None:
        if node.op == "call_function":
            made.append(weakref.ref(result))
        alive.append(sum(reference() is not None for reference in made))

    ProgramRunner(program).run([noise(24)], watch)
    assert len(made) == 6
    assert max(alive) == 2


def test_nothing_keeps_a_gradient() -> None:
    """No watched tensor requires grad, though weights and inputs do; gradient mode is as before afterwards."""
    model = nn.Linear(4, 3)
    program = torch.export.export(model, (noise(2, 4),))
    kept: list[bool] = []

    def watch(name: str, node: fx.Node, result: Any, arguments: dict[fx.Node, Any]) -> None:
        if node.op == "call_function":
            kept.append(result.requires_grad)

    ProgramRunner(program).run([noise(2, 4).requires_grad_()], watch)
    assert kept == [False]
    assert torch.is_grad_enabled()
