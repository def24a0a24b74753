"""How long rescaling takes of a large program: proposing exponents, and disposing of a candidate."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from calibcast.calib.calibration import calibrate
from calibcast.passes.number_formats import format_of
from calibcast.passes.rescaling import rescaling as stages
from calibcast.passes.rescaling.breaks import input_breaks, segment_breaks
from calibcast.passes.rescaling.costs import CostReader, Costs
from calibcast.passes.rescaling.judging import judged
from calibcast.passes.rescaling.measures import Measures
from calibcast.passes.rescaling.rewriting import rewritten
from calibcast.passes.rescaling.system import system_of
from calibcast.passes.settings import Settings
from torch import nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.rescaling_networks import _Block


class Deep(nn.Module):
    """Blocks of attention and MLP whose sum grows from 1 to 10^5."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.last = nn.Sequential(*[_Block(16, 2) for _ in range(blocks)]), nn.Linear(16, 4)
        with torch.no_grad():
            for block in self.blocks:
                block.out.weight.mul_(1e4)
                block.down.weight.mul_(1e4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(F.layer_norm(self.blocks(x), (16,)))
        return found


def seconds(blocks: int, rounding_batches: int) -> str:
    """Processor seconds of each stage; on a machine that others use, wall time says little."""
    x = torch.randn(1, 4, 16)
    program = torch.export.export(Deep(blocks).eval(), (x,))
    ranges = calibrate(program, [(x,)], rounding_batches=rounding_batches, progress=False)
    low, settings, spent = torch.float16, Settings(), dict[str, float]()

    def timed(name: str, stage: Callable[..., Any], *arguments: Any) -> Any:
        began = time.process_time()
        found = stage(*arguments)
        spent[name] = spent.get(name, 0.0) + time.process_time() - began
        return found

    measures = timed("proposing", Measures.of, program, ranges)
    limit = stages._limit(settings, ranges, low)
    plain = timed("proposing", system_of, program)
    solutions = timed("proposing", stages.solved, program, plain)
    breaks = {**input_breaks(measures, limit), **timed("proposing", segment_breaks, measures, solutions, limit)}
    system = timed("proposing", system_of, program, breaks)
    reader = CostReader(measures, format_of(low))
    for share, floor in stages._WEIGHINGS:
        exponents, _ = timed(
            "proposing", stages._proposed, program, system, reader, Costs(limit * share, floor), measures, ()
        )
    made = timed("disposing", rewritten, program, exponents)
    scaled = timed("disposing", stages._scaled_ranges, program, ranges, exponents, made, "")
    judgement = timed("disposing", judged, made, scaled, low, settings)
    shown = ", ".join(f"{name} {value:.2f} s" for name, value in spent.items())
    return f"{len(program.graph.nodes)} nodes, evidence from {rounding_batches} batches: {shown}; {judgement}"
