"""What a builder cannot do in the low type is in fp32 before it is asked, and the engine's plan says why."""

from dataclasses import replace

import pytest
import torch
from calibcast.calib import BuildError
from calibcast.calib.execution import ProgramRunner
from calibcast.engines import build
from calibcast.engines.tensorrt.limits import buildable
from calibcast.passes import PrecisionPlan, insert_casts
from torch import nn

from benchmarks.rtx_builder import has_builder


class Raised(nn.Module):
    """Convolution, its transpose, convolution."""

    def __init__(self, rank=2, **options):
        super().__init__()
        plain, transposed = getattr(nn, f"Conv{rank}d"), getattr(nn, f"ConvTranspose{rank}d")
        self.down, self.up, self.last = plain(4, 4, 3), transposed(4, 4, 2, **options), plain(4, 2, 1)

    def forward(self, x):
        return self.last(self.up(self.down(x).relu()))


class Summed(nn.Module):
    """A running sum, multiplied: TensorRT's matrix product takes no two types."""

    def __init__(self, dtype=None):
        super().__init__()
        self.layer, self.dtype = nn.Linear(8, 8), dtype

    def forward(self, x):
        return self.layer(x).cumsum(-1, dtype=self.dtype) @ x.transpose(-1, -2)


def low(model, x, low_type):
    """The cast graph with everything low, and its plan."""
    program = torch.export.export(model.eval(), (x,))
    plan = PrecisionPlan.from_types(program)
    decisions = tuple(replace(d, precision="low", rule=None) for d in plan.decisions)
    plan = replace(
        plan, decisions=decisions, low_precision_type=low_type, flips={"bfloat16": {"conv_transpose2d": 3.0}}
    )
    return insert_casts(program, plan), plan


def type_of(program, name):
    return next(node for node in program.graph.nodes if node.name == name).meta["val"].dtype


IMAGE, SERIES = torch.randn(2, 4, 9, 9), torch.randn(2, 6, 8)


def test_a_transposed_convolution_in_bf16_is_kept_in_fp32():
    """before: conv16 -> relu16 -> transposed16 -> conv16   after: conv16 -> relu16 -> transposed32 -> conv16"""
    mixed, plan = low(Raised(), IMAGE, torch.bfloat16)
    given = buildable(mixed, plan, is_rtx=True)
    assert list(given.kept) == ["conv_transpose2d"]
    names = ("conv2d", "relu", "conv_transpose2d", "conv2d_1")
    low16, wide = torch.bfloat16, torch.float32
    assert [type_of(given.program, name) for name in names] == [low16, low16, wide, low16]
    assert "(builder): TensorRT-RTX has no bf16 kernel" in given.plan.explain("conv_transpose2d")
    assert given.plan.flips == {"bfloat16": {"conv_transpose2d": None}}
    assert given.plan.low_precision_nodes == tuple(n for n in plan.low_precision_nodes if n != "conv_transpose2d")
    (ours,), (theirs,) = (ProgramRunner(p).run([IMAGE]) for p in (given.program, mixed))
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("low_type", "is_rtx"), [(torch.float16, True), (torch.bfloat16, False)])
def test_where_there_is_a_kernel_nothing_changes(low_type, is_rtx):
    mixed, plan = low(Raised(), IMAGE, low_type)
    given = buildable(mixed, plan, is_rtx)
    assert given.program is mixed
    assert (given.plan, given.kept) == (plan, {})


@pytest.mark.parametrize("low_type", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("is_rtx", [True, False])
def test_a_running_sum_is_kept_in_fp32(low_type, is_rtx):
    mixed, plan = low(Summed(), SERIES, low_type)
    given = buildable(mixed, plan, is_rtx)
    assert [type_of(given.program, name) for name in ("cumsum", "matmul")] == [torch.float32, low_type]
    assert "(builder): Torch-TensorRT makes an fp32 sum of it" in given.plan.explain("cumsum")


def test_a_program_without_a_plan_is_given_as_well():
    mixed, _ = low(Summed(), SERIES, torch.float16)
    given = buildable(mixed, None, is_rtx=True)
    assert (given.plan, list(given.kept)) == (None, ["cumsum"])


needs_builder = pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")
AHEAD = {"backend": "tensorrt", "ahead_of_time": True, "cache": False, "progress": False}
CASES = {
    "one dimension": (
        Raised(1, stride=2, padding=1, output_padding=1),
        IMAGE[..., 0],
        torch.bfloat16,
        "conv_transpose1d",
    ),
    "in groups": (Raised(2, stride=2, groups=4, bias=False), IMAGE, torch.bfloat16, "conv_transpose2d"),
    "a running sum": (Summed(), SERIES, torch.float16, "cumsum"),
    "a running sum that states its type": (Summed(torch.float32), SERIES, torch.bfloat16, None),
}


@needs_builder
@pytest.mark.parametrize("name", CASES)
def test_the_real_builder_takes_it_without_being_asked_twice(name):
    model, x, low_type, kept = CASES[name]
    engine = build(*low(model, x, low_type), **AHEAD)
    assert engine.record["remedies"] == []
    assert list(engine.record["kept_in_fp32"]) == ([] if kept is None else [kept])
    if kept is not None:
        assert engine.plan[kept].rule == "builder"
        planned = {row["node"]: row["planned"] for row in engine.ledger.iter_rows(named=True)}
        assert planned[kept] == "high"


@needs_builder
@pytest.mark.parametrize("name", ["in groups", "a running sum"])
def test_the_real_builder_still_has_the_limit(name, monkeypatch):
    """When a new version takes these, the limit is to be taken out."""
    model, x, low_type, _ = CASES[name]
    monkeypatch.setattr("calibcast.engines.tensorrt.limits._limit", lambda node, is_rtx: None)
    monkeypatch.setattr("calibcast.engines.tensorrt.attempts.restated", lambda program: program)
    with pytest.raises(BuildError):
        build(*low(model, x, low_type), **AHEAD)
