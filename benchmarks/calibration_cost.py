"""What calibration costs in time and memory, against the plain forward pass in the same run.

    python benchmarks/calibration_cost.py --output benchmarks/results/calibration_cost.md

Time: milliseconds per batch over interleaved rounds, as the ratio to the eager forward of the same round; the median
ratio is quoted. Memory: the peak resident size of a child process that calibrates on 2 or on 64 batches, and of one
that only runs the plain forward or the bare interpreter on as many.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from calibcast.calib import calibrate

from benchmarks import machine
from benchmarks.networks import NETWORKS, made

ROUNDS, BATCHES = 5, 4
MEMORY_KINDS = ("forward", "interpreter", "histogram=False", "all statistics", "Torch-TensorRT tracer")


def peer_tracer() -> Callable[..., Any] | None:
    """Torch-TensorRT's own tracer, where it is installed; its import asks for a GPU that a stand-in pretends."""
    stand_ins = {"get_device_capability": (9, 0), "current_device": 0, "mem_get_info": (1 << 34, 1 << 34)}
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            for name, answer in stand_ins.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
            stack.enter_context(mock.patch.object(torch.cuda, "get_device_name", return_value="none"))
        try:
            from torch_tensorrt.dynamo.lowering.passes.pass_utils import trace_intermediate_node_outputs
        except Exception:
            return None
    return trace_intermediate_node_outputs


def ways(name: str) -> dict[str, Callable[[int], Any]]:
    """What is measured: each runs a number of batches."""
    model, inputs = made(name)
    program = torch.export.export(model, inputs)
    module = program.module()
    tracer = peer_tracer()

    def forward(batches: int) -> None:
        with torch.no_grad():
            for _ in range(batches):
                model(*inputs)

    def interpreter(batches: int) -> None:
        with torch.no_grad():
            for _ in range(batches):
                torch.fx.Interpreter(module).run(*inputs)

    def peer(batches: int) -> None:
        with torch.no_grad():
            tracer(module, [inputs] * batches, set())  # type: ignore[misc]

    def ours(histogram: bool) -> Callable[[int], Any]:
        return lambda n: calibrate(program, [inputs] * n, histogram=histogram, progress=False, rounding_batches=0)

    found: dict[str, Callable[[int], Any]] = {
        "forward": forward,
        "interpreter": interpreter,
        "histogram=False": ours(False),
        "all statistics": ours(True),
    }
    return {**found, **({"Torch-TensorRT tracer": peer} if tracer else {})}


def per_batch(run: Callable[[int], Any], repeats: int = BATCHES) -> float:
    """Seconds per batch, without what a call costs once (weights, fingerprints): a long call less a short one."""
    start = time.perf_counter()
    run(1)
    middle = time.perf_counter()
    run(1 + repeats)
    return (time.perf_counter() - middle - (middle - start)) / repeats


def time_rows(name: str) -> list[str]:
    """Median ratios to the forward pass, with the range over the rounds."""
    runs = ways(name)
    for run in runs.values():
        run(1)
    ratios: dict[str, list[float]] = {label: [] for label in runs}
    forward_times = []
    for _ in range(ROUNDS):
        base = per_batch(runs["forward"])
        forward_times.append(base)
        for label, run in runs.items():
            if label != "forward":
                ratios[label].append(per_batch(run) / base)
    cells = [f"{1000 * statistics.median(forward_times):.0f} ms"]
    for label in MEMORY_KINDS[1:]:
        values = ratios.get(label)
        cells.append(
            f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "not installed"
        )
    return [f"| {name} | {' | '.join(cells)} |"]


def peak(name: str, way: str, batches: int, threads: int) -> float | None:
    """Peak resident megabytes of a child process; None where it failed."""
    command = [sys.executable, __file__, "--child", name, way, str(batches), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def child(name: str, way: str, batches: int) -> None:
    """Run one way and print the peak of this process in MB."""
    runs = ways(name)
    if way not in runs:
        sys.exit("not installed")
    runs["forward"](2)  # so that what torch allocates on first use is in every number
    runs[way](batches)
    # Not ru_maxrss, which a child inherits from its parent. Linux only.
    status = Path("/proc/self/status").read_text()
    print(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024)


def memory_rows(name: str, threads: int, many: int) -> list[str]:
    """Peak at 2 and at `many` batches for each way, and their ratio."""
    rows = []
    base = peak(name, "forward", 2, threads)
    for way in MEMORY_KINDS:
        # The tracer keeps every activation: 64 batches would not fit, so it stops at 8.
        most = 8 if way == "Torch-TensorRT tracer" else many
        few, more = peak(name, way, 2, threads), peak(name, way, most, threads)
        if few is None or more is None or base is None:
            rows.append(f"| {name} | {way} | failed or not installed | | | |")
            continue
        rows.append(f"| {name} | {way} | {few:.0f} | {more:.0f} ({most}) | {more / few:.3f} | {more - base:+.0f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="write the Markdown there, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--many", type=int, default=64, help="batches of the long run")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        child(options.child[0], options.child[1], int(options.child[2]))
        return
    lines = ["# Cost of calibration\n", machine.header()]
    lines += ["## Time per batch, ratio to the eager forward: median (range of 5 rounds)\n"]
    lines += [
        "| network | forward | fx.Interpreter | histogram=False | all statistics | Torch-TensorRT tracer, 5 batches |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for name in options.networks:
        lines += time_rows(name)
    if not options.no_memory:
        lines += [
            f"\n## Peak resident memory, MB: 2 batches, {options.many} batches, their ratio, and above the forward\n"
        ]
        lines += [
            "| network | way | 2 batches | many (how many) | ratio | many above forward |",
            "|---|---|---|---|---|---|",
        ]
        for name in options.networks:
            lines += memory_rows(name, options.threads, options.many)
    machine.write(options.output, "\n".join(lines))


if __name__ == "__main__":
    main()
