"""Replays of real CUDA graphs: run with `python -m pytest -m gpu` where CUDA is."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from calibcast import calibrate, classify
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.gc_pause import paused
from calibcast.calib.replayed_runner import ReplayedRunner
from calibcast.calib.rounding_evidence import RoundingObserver
from calibcast.passes.emulation import emulated
from polars.testing import assert_frame_equal
from torch import nn

from .test_cuda_graphs import MODELS, Attention

pytestmark = pytest.mark.gpu


class Block(nn.Module):
    """Convolutions in channels-last, a residual, attention by its own operator, and a class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.nn.functional.silu(self.norm(self.conv(x.contiguous(memory_format=torch.channels_last))))
        y = y.flatten(2).mT
        y = (y + torch.nn.functional.scaled_dot_product_attention(y, y, y)).mean(1)
        scores = self.head(y)
        return torch.log_softmax(scores, -1), scores.argmax(-1)


NETS = {
    **{name: made for name, made in MODELS.items() if made[1] is not None},
    "block": (Block, lambda: torch.randn(4, 3, 16, 16)),
}


@pytest.mark.parametrize("name", NETS)
def test_evidence_by_a_graph_is_that_of_launches(name: str) -> None:
    model, batch = NETS[name]
    torch.manual_seed(0)
    batches = [batch().cuda() for _ in range(4)]
    program = torch.export.export(model().eval().cuda(), (batches[0],))
    frames, replayed = [], 0
    for by_replays in (False, True):
        observer = RoundingObserver(ProgramRunner(program), 4)
        if not by_replays:
            observer.__dict__["_replays"] = None
        for index, one in enumerate(batches):
            observer.measure([one], index, {})
        replayed = 0 if observer._replays is None else observer._replays.replayed
        frames.append(observer.record.frame())
    assert replayed == 4, "one of its batches was launched kernel by kernel"
    assert_frame_equal(frames[0], frames[1], rel_tol=1e-3, abs_tol=1e-12)


def test_evidence_gives_its_memory_back_at_once() -> None:
    """Without Python's collection of cycles. The program was exported on a host, and its outputs' sizes are known."""
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 64, 64).cuda() for _ in range(4)]
    runner = ProgramRunner(torch.export.export(Block().eval(), (batches[0].cpu(),)), "cuda")
    for measured in range(2):  # first, libraries take what they keep
        observer = RoundingObserver(runner, 4)
        assert len(observer._known_outputs) == 2
        gc.collect()
        with paused():
            before = torch.cuda.memory_allocated()
            for index, one in enumerate(batches):
                observer.measure([one], index, {})
            assert not measured or torch.cuda.memory_allocated() <= before + (64 << 10)


def test_a_plan_runs_by_a_graph_as_by_launches() -> None:
    """Batches of two sizes; and the memory of the graph is free afterwards."""
    torch.manual_seed(0)
    example = torch.randn(2, 4, 6)
    program = torch.export.export(
        Attention().eval(), (example,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},)
    )
    batches: list[list[Any]] = [[torch.randn(n, 4, 6).cuda()] for n in (3, 3, 5, 5, 5)]
    plan = classify(program, calibrate(program, [(example,)], progress=False))
    runner = emulated(program, plan, "cuda")
    wanted = [[t.clone() for t in runner.run_batch(batch, i)] for i, batch in enumerate(batches)]
    ReplayedRunner(runner).run_batch(batches[0], 0)  # what libraries keep for the stream of recordings is theirs
    before = reserved()
    for _ in range(2):
        replayed = ReplayedRunner(runner)
        for i, batch in enumerate(batches):
            torch.testing.assert_close([t.clone() for t in replayed.run_batch(batch, i)], wanted[i], rtol=1e-6, atol=0)
        assert replayed._replays is not None
        assert replayed._replays.replayed == 5
        del replayed
    assert reserved() <= before + (4 << 20)


def reserved() -> int:
    """Bytes that torch holds on the GPU once it has given back what it can."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()
