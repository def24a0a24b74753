"""Regions that export leaves flat (`torch.vmap`, `jvp`, `associative_scan`): measured, kept, and left in order."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibcast.calib.calibration import calibrate
from calibcast.calib.errors import BatchError
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.flat_regions import MARKERS, blocks, flat_regions
from calibcast.passes.cast_insertion import insert_casts
from calibcast.passes.classification import classify
from calibcast.passes.comparison import compare
from calibcast.passes.plan import PrecisionPlan
from torch import nn
from torch._export import verifier
from torch._higher_order_ops.associative_scan import associative_scan
from torch.export import ExportedProgram

SIZE = 16


class Between(nn.Module):
    """A linear layer, what is under test, and another linear layer: both ends may be low."""

    def __init__(self, middle: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.before, self.after, self.middle = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.middle(self.before(x), self.before.weight))


def _vmap(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda row: ((row.sin() * w).softmax(0) * 50).amax(0))(x)


def _nested(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda row: torch.vmap(lambda a: a.exp() + row.sum())(row))(x)


def _in_place(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda row: (row * 3).mul_(2).add_(1))(x)


def _jvp(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    value, tangent = torch.func.jvp(lambda a: (a @ w).tanh(), (x,), (torch.ones_like(x),))
    return value + tangent


def _scan(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return associative_scan(torch.add, x, 0, combine_mode="generic")


REGIONS = [_vmap, _nested, _in_place, _jvp, _scan]


def _exported(middle: Callable[..., torch.Tensor]) -> tuple[ExportedProgram, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, SIZE)
    program = torch.export.export(Between(middle).eval(), (x,))
    if not flat_regions(program.graph):
        pytest.skip("this torch traces through it, and leaves no region")
    return program, x


def _works() -> None:
    torch.randn(2)
    assert not torch._C._functorch.peek_interpreter_stack()
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("middle", REGIONS, ids=lambda f: f.__name__)
def test_a_region_runs_and_is_measured(middle: Callable[..., torch.Tensor]) -> None:
    """The interpreter gives what torch gives, each tensor inside has a row, and the thread is left as it was."""
    program, x = _exported(middle)
    with torch.no_grad():
        expected = program.module()(x)
    torch.testing.assert_close(ProgramRunner(program).run([x])[0], expected, rtol=0, atol=0)
    ranges = calibrate(program, [x, x * 2], progress=False)
    inside = {node.name for node in flat_regions(program.graph) if isinstance(node.target, torch._ops.OpOverload)}
    rows = ranges.frame.filter(ranges.frame["node"].is_in(sorted(inside)))
    measured = rows.filter(rows["elements"] > 0)
    assert inside
    assert measured["batches"].to_list() == [2] * len(measured)
    assert len(measured) >= len(rows) - 2  # a scan slices some tensors to nothing
    _works()


def test_inside_a_vmap_all_samples_are_measured() -> None:
    """The range of a tensor inside is that of all samples, before what a later in-place op makes of it."""
    program, x = _exported(_in_place)
    ranges = calibrate(program, [x], progress=False)
    rows = {row["node"]: row for row in ranges.frame.iter_rows(named=True)}
    row = rows["mul"]
    assert row["elements"] == x.numel()
    assert row["absmax"] == pytest.approx(3 * rows["linear"]["absmax"])
    assert rows["mul_"]["absmax"] == pytest.approx(2 * row["absmax"])


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("middle", REGIONS, ids=lambda f: f.__name__)
def test_a_region_is_kept_and_its_surroundings_are_cast(middle: Callable[..., torch.Tensor], low: torch.dtype) -> None:
    """Nodes of a region run as the user wrote them, whatever stands around them runs low, and it saves and loads."""
    program, x = _exported(middle)
    plan = classify(program, calibrate(program, [x], progress=False), low_precision_type=low)
    rules = {decision.node: decision.rule for decision in plan.decisions}
    assert all(rules[node.name] == "flat_region" for node in flat_regions(program.graph))
    assert {"linear", "linear_1"} <= set(plan.low_precision_nodes)
    mixed = insert_casts(program, plan)
    with torch.no_grad():
        expected, got = program.module()(x), mixed.module()(x)
        again = insert_casts(mixed, PrecisionPlan.from_types(mixed))
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    assert [n.target for n in again.graph.nodes] == [n.target for n in mixed.graph.nodes]
    for block in blocks(mixed.graph.nodes):
        if block.region:
            assert not any("_to_copy" in str(node.target) for node in block.nodes)
    frame = compare(program, mixed, [x], progress=False).frame
    assert frame["nonfinite_alone"].sum() == 0
    _works()


def test_an_error_inside_leaves_the_thread_in_order() -> None:
    """A batch that raises inside a region, or one that an interrupt ends there, breaks nothing after it."""
    program, x = _exported(lambda x, w: torch.vmap(lambda row: row.gather(0, row.abs().long().clamp(max=3)))(x))
    graph = program.graph_module
    inside = next(n for n in graph.graph.nodes if n.target == torch.ops.aten.gather.default)
    inside.target = torch.ops.aten.linalg_cholesky.default
    inside.args = (inside.args[0],)
    with pytest.raises(BatchError, match="batch 0"):
        calibrate(program, [x], progress=False)
    _works()


def test_every_region_that_export_may_leave_is_known() -> None:
    """What torch's own verifier allows in a program beside operators, and begins something, is in the table."""
    source = inspect.getsource(verifier)
    begins: list[Any] = [name for name in ("_enter_", "_increment_nesting") if name in source]
    assert begins
    known = {marker.__name__ for marker in MARKERS} | {m.leave.__name__ for m in MARKERS.values()}
    listed = {word.strip(" ,").rpartition(".")[2] for word in source.split() if "predispatch._" in word}
    assert {name for name in listed if "nesting" in name or "dual_level" in name} <= known
    assert {"_enter_autocast", "_exit_autocast"} <= known
