"""What the offline job costs over a bare calibration of the same loader, and what a second process gives.

    python benchmarks/job_throughput.py --output benchmarks/results/job_throughput.md

Overhead: the job's calibration (data opened, inputs looked at, checkpoints, the table written) against `calibrate` over
the same DataLoader and saving its table, in one process, in interleaved rounds; the median ratio is quoted. Processes:
the calibration of one and of two processes under torchrun, one torch thread each.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from calibcast.calib import calibrate
from calibcast.engines.job.running import run_job
from calibcast.engines.locations import load_data, load_model

from benchmarks import machine
from benchmarks.job_files import run, seconds, write_job
from benchmarks.networks import NETWORKS, made

OVERHEAD, SPEEDUP = 1.05, 1.7


def export(name: str, folder: Path) -> None:
    model, inputs = made(name)
    torch.export.save(torch.export.export(model, inputs), folder / "net.pt2")
    torch.save(tuple(inputs), folder / "inputs.pt")


def overhead(folder: Path, batches: int, rounds: int) -> tuple[float, list[float]]:
    """Milliseconds per bare batch, and the ratio of the job to it in each round."""
    job = write_job(folder, batches)
    program = load_model(str(folder / "net.pt2"))
    bare, ratios = [], []
    for number in range(rounds + 1):
        loader = load_data(f"{folder}/loader.py:loader")
        began = time.perf_counter()
        calibrate(program, loader, progress=False, rounding_batches=0).save(folder / "bare.parquet")
        alone = time.perf_counter() - began
        with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
            run_job(job, lambda line: None, bar=False, redo=True)
        if number:  # the first round is the warm-up
            bare.append(alone)
            ratios.append(seconds(job) / alone)
    return 1000 * statistics.median(bare) / batches, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "encoder", "restoration"], choices=list(NETWORKS))
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["# The job's throughput", "", machine.header(),
             f"- {options.batches} batches a run, {options.rounds} rounds, one torch thread a process", "",
             "| network | bare, ms a batch | job / bare (median, least, most) | below 1.05 | "
             "two processes | at least 1.7 |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name in options.networks:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            export(name, folder)
            bare, ratios = overhead(folder, options.batches, options.rounds)
            job = write_job(folder, 4 * options.batches)
            gain = statistics.median(run(job) / run(job, 2) for _ in range(3))
        middle = statistics.median(ratios)
        lines.append(
            f"| {name} | {bare:.1f} | {middle:.3f} ({min(ratios):.3f}, {max(ratios):.3f}) | "
            f"{'yes' if middle < OVERHEAD else 'no'} | {gain:.2f} | {'yes' if gain >= SPEEDUP else 'no'} |"
        )
    machine.write(options.output, "\n".join(lines))


if __name__ == "__main__":
    main()
