"""What rescaling makes of networks that fp16 cannot hold: before and after, on data that calibration did not see.

    python benchmarks/rescaling.py --output benchmarks/results/rescaling.md
    python benchmarks/rescaling.py --gpu --output benchmarks/results/rescaling_on_gpu.md   # latency and SQNR of engines

"plan dB" is the worst output's SQNR of the cast program of `classify`, run with fp32 kernels that round; "half dB" that
of a plan that keeps nothing. "same bits" is `torch.equal` of the two programs in fp32, TF32 off. Rows are written as
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
from calibcast.passes.cast_insertion import insert_casts
from calibcast.passes.classification import classify
from calibcast.passes.emulation import emulated
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.rescaling.judging import judged
from calibcast.passes.rescaling.rescaling import rescale
from calibcast.passes.rescaling.result import Rescaling
from calibcast.passes.settings import Settings, low_type_of
from torch.export import ExportedProgram

from benchmarks import machine
from benchmarks.rescaling_laws import run
from benchmarks.rescaling_networks import CASES, Case

HEADER = (
    "| network | fp32 nodes | work low | bytes low | casts | plan dB | half dB | same bits | added | s |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
GPU_HEADER = (
    "| network | variant | ms median (min to max) | SQNR dB | same bits | note |",
    "|---|---|---|---|---|---|",
)
ON_GPU = ("latent decoder", "ViT, growth", "characters, trained, massive channels", "raw audio")


def row(name: str, case: Case) -> str:
    """One line of the table on a CPU."""
    low = torch.bfloat16 if name.endswith("bf16") else torch.float16
    program = case.program()
    ranges = calibrate(program, [case.batch(i) for i in range(3)], rounding_batches=0, progress=False)
    began = time.perf_counter()
    fitted = rescale(program, ranges, low)
    seconds = time.perf_counter() - began
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


def gpu_rows(name: str, case: Case, rounds: int, backend: str) -> list[str]:
    """fp32, whole-half, the plan before and after: interleaved latency, SQNR on unseen data, and equal bits in fp32."""
    from calibcast.engines.building import build

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # of convolutions and RNNs alike
    program = case.program()
    ranges = calibrate(program, [case.batch(i) for i in range(3)], rounding_batches=0, progress=False, device="cuda")
    fitted = rescale(program, ranges)
    unseen = [tuple(t.cuda() for t in case.batch(10 + i)) for i in range(2)]
    want = _on_gpu(program, unseen)
    same = all(map(torch.equal, want, _on_gpu(fitted.program, unseen)))
    low = low_type_of("fp16")
    plans = {
        "fp32": (program, ranges, PrecisionPlan.from_types(program)),
        "whole-half": (program, ranges, whole_half(program, ranges, low)),
        "plan": (program, ranges, classify(program, ranges)),
        "whole-half, rescaled": (fitted.program, fitted.ranges, whole_half(fitted.program, fitted.ranges, low)),
        "plan, rescaled": (fitted.program, fitted.ranges, classify(fitted.program, fitted.ranges)),
    }
    engines, lines = {}, []
    for variant, (source, table, plan) in plans.items():
        try:
            engines[variant] = build(
                insert_casts(source, plan), plan, table, backend=backend, on_failure="fallback", progress=False
            )
        except Exception as error:  # a row says so, and the others go on
            lines.append(f"| {name} | {variant} | | | | {type(error).__name__}: {str(error)[:160]} |")
    times: dict[str, list[float]] = {variant: [] for variant in engines}
    for _ in range(rounds):
        for variant, engine in engines.items():
            times[variant].append(_milliseconds(engine, unseen[0]))
    for variant, engine in engines.items():
        taken = sorted(times[variant])
        got = [t for batch in unseen for t in _tensors(engine(*batch))]
        cells = f"{taken[len(taken) // 2]:.3f} ({taken[0]:.3f} to {taken[-1]:.3f}) | {_sqnr(want, got):.1f}"
        lines.append(f"| {name} | {variant} | {cells} | {'yes' if same else 'NO'} | {engine.backend} |")
    return lines


def _on_gpu(program: ExportedProgram, batches: Any) -> list[torch.Tensor]:
    from calibcast.calib.execution import ProgramRunner

    runner = ProgramRunner(program, "cuda")
    return [t for batch in batches for t in runner.run(list(batch))]


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _milliseconds(engine: Any, inputs: Any, calls: int = 20) -> float:
    for _ in range(3):
        engine(*inputs)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        engine(*inputs)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/rescaling.md")
    parser.add_argument("--networks", nargs="*", default=None, choices=list(CASES), metavar="NETWORK")
    parser.add_argument("--gpu", action="store_true", help="build engines and time them")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--backend", default="auto", help="of the engines: auto, tensorrt, inductor")
    options = parser.parse_args()
    header = GPU_HEADER if options.gpu else HEADER
    lines = [f"# Rescaling{' on a GPU' if options.gpu else ''}\n", machine.header(), *header]
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.networks or (ON_GPU if options.gpu else CASES):
        try:
            lines += (
                gpu_rows(name, CASES[name], options.rounds, options.backend)
                if options.gpu
                else [row(name, CASES[name])]
            )
        except Exception as error:
            lines.append(f"| {name} | failed: {type(error).__name__}: {str(error)[:200]} |")
        print(lines[-1], flush=True)
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
