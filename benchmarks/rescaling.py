"""What rescaling makes of networks that fp16 cannot hold: before and after, on data that calibration did not see.

    python benchmarks/rescaling.py --output benchmarks/results/rescaling.md
    python benchmarks/rescaling.py --rounding-batches 2 --output benchmarks/results/rescaling_budget.md
    python benchmarks/rescaling.py --size 185                   # seconds of a program of 5,556 nodes
    python benchmarks/rescaling.py --gpu --output benchmarks/results/rescaling_on_gpu.md   # latency and SQNR of engines

"plan dB" is the worst output's SQNR of the cast program of `classify`, run with fp32 kernels that round; "half dB" that
of a plan that keeps nothing. "same bits" is `torch.equal` of the two programs in fp32, TF32 off;
"s" are processor seconds of `rescale`. Rows are written as
they come.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from calibcast.calib.calibration import calibrate
from calibcast.calib.ranges import RangeTable
from calibcast.passes.classification import classify
from calibcast.passes.emulation import emulated
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.rescaling.judging import judged
from calibcast.passes.rescaling.rescaling import rescale
from calibcast.passes.rescaling.result import Rescaling
from calibcast.passes.settings import Settings
from torch.export import ExportedProgram

from benchmarks import machine, rescaling_on_gpu, rescaling_size
from benchmarks.rescaling_laws import run
from benchmarks.rescaling_networks import CASES, Case

HEADER = (
    "| network | fp32 nodes | work low | bytes low | casts | plan dB | half dB | same bits | added | s |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def row(name: str, case: Case, rounding_batches: int) -> str:
    """One line of the table on a CPU."""
    low = torch.bfloat16 if name.endswith("bf16") else torch.float16
    program = case.program()
    ranges = calibrate(program, [case.batch(i) for i in range(3)], rounding_batches=rounding_batches, progress=False)
    began = time.process_time()
    fitted = rescale(program, ranges, low)
    seconds = time.process_time() - began
    before = judged(program, ranges, low, Settings())
    after = judged(fitted.program, fitted.ranges, low, Settings())
    unseen = [case.batch(10 + i) for i in range(2)]
    want = run(program, unseen)
    same = all(map(torch.equal, want, run(fitted.program, unseen)))
    plan = [_sqnr(want, _planned(*pair, low, unseen)) for pair in _pairs(program, ranges, fitted)]
    half = [_sqnr(want, _whole_half(*pair, low, unseen)) for pair in _pairs(program, ranges, fitted)]
    added = ", ".join(fitted.rewrite.multiplied) or ""
    return (
        f"| {name} | {before.high} -> {after.high} | {before.work_low:.1%} -> {after.work_low:.1%} | "
        f"{before.bytes_low:.1%} -> {after.bytes_low:.1%} | {before.bytes_cast / 1e3:.4g} -> "
        f"{after.bytes_cast / 1e3:.4g} kB | {plan[0]:.1f} -> {plan[1]:.1f} | {half[0]:.1f} -> {half[1]:.1f} | "
        f"{'yes' if same else 'NO'} | {added} | {seconds:.1f} |"
    )


def _pairs(program: ExportedProgram, ranges: RangeTable, fitted: Rescaling) -> Any:
    return ((program, ranges), (fitted.program, fitted.ranges))


def _planned(program: ExportedProgram, ranges: RangeTable, low: torch.dtype, data: Any) -> list[torch.Tensor]:
    plan = classify(program, ranges, low, weights="ignore")
    return _emulated(program, plan, data)


def _whole_half(program: ExportedProgram, ranges: RangeTable, low: torch.dtype, data: Any) -> list[torch.Tensor]:
    return _emulated(program, whole_half(program, ranges, low), data)


def _emulated(program: ExportedProgram, plan: PrecisionPlan, data: Any) -> list[torch.Tensor]:
    runner = emulated(program, plan)
    return [t for batch in data for t in runner.run(list(batch))]


def whole_half(program: ExportedProgram, ranges: RangeTable, low: torch.dtype) -> PrecisionPlan:
    """A plan that keeps nothing but what no target runs in half precision."""
    return classify(program, ranges, low, nodes_to_include=[".*"], weights="ignore")


def _sqnr(want: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """Of the worst output, over all batches; NaN where something is not finite."""
    worst = math.inf
    for reference, value in zip(want, got, strict=True):
        error = (value.double() - reference.double()).square().sum()
        if not torch.isfinite(value).all():
            return math.nan
        worst = min(worst, float(10 * torch.log10(reference.double().square().sum() / error)))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/rescaling.md")
    parser.add_argument("--networks", nargs="*", default=None, choices=list(CASES), metavar="NETWORK")
    parser.add_argument("--gpu", action="store_true", help="build engines and time them")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--backend", default="tensorrt", help="of the engines: tensorrt, inductor, eager")
    parser.add_argument("--seconds", type=float, default=140.0, help="after which what is not done is given up")
    parser.add_argument("--rounding-batches", type=int, default=0, help="plan for a budget, not by rules of magnitude")
    parser.add_argument("--size", type=int, default=0, help="time a network of so many blocks, of 30 nodes each")
    options = parser.parse_args()
    if options.size:
        print(rescaling_size.seconds(options.size, options.rounding_batches))
        return
    if options.gpu:
        rescaling_on_gpu.run(options.networks or rescaling_on_gpu.DEFAULT, options)
        return
    lines = ["# Rescaling\n", machine.header(), *HEADER]
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.networks or CASES:
        try:
            lines.append(row(name, CASES[name], options.rounding_batches))
        except Exception as error:
            lines.append(f"| {name} | failed: {type(error).__name__}: {str(error)[:200]} |")
        print(lines[-1], flush=True)
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
