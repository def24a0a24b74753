"""What evidence of rounding costs, and how well it predicts a run.

    python benchmarks/rounding_cost.py --output benchmarks/results/rounding_cost.md
    python benchmarks/rounding_cost.py --device cuda --output benchmarks/results/rounding_cost_on_gpu.md

Evidence: the time that one batch takes beside its ranges, for both low types together, as the ratio to the plain
forward pass of the same round, halved: per batch and type. Check: one run of a plan with all nodes low, as a ratio too.
On a GPU the first batch records a CUDA graph, which later ones replay: so the first, a later one, and the mean of four
batches (the default of `calibrate`) are told, and of eight for checks (the default of `tune`). The median of the rounds
is quoted. Memory: the peak of a process that does only this: resident on the CPU, of the
allocator on a GPU. Predicted: -10 log10 of the sum of `noise` over all
edges; seen: the same of that run.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from calibcast.calib.execution import ProgramRunner
from calibcast.calib.masks import mask_tensors
from calibcast.calib.output_noise import channel_noise
from calibcast.calib.replayed_runner import ReplayedRunner
from calibcast.calib.rounded_runner import RoundedRunner
from calibcast.calib.rounding import fp32_kernels
from calibcast.calib.rounding_evidence import RoundingObserver

from benchmarks import machine
from benchmarks.networks import NETWORKS, made

LOW_TYPES = (torch.float16, torch.bfloat16)
BATCHES, CHECKED = 4, 8
DEFAULT = ("resnet18", "encoder", "restoration")


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds that `work` takes."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Subject:
    """A network on a device, and what is done with it."""

    def __init__(self, name: str, device: str, times: int = 1) -> None:
        model, inputs = made(name)
        inputs = tuple(torch.cat([value] * times) for value in inputs)
        self.program = torch.export.export(model, inputs)
        self.device = device
        self.runner = ProgramRunner(self.program, device)
        self.flat = self.runner.to_device(list(inputs))
        # A copy: moved itself, it would take the program's weights along, and leave its constants.
        self.module = copy.deepcopy(model).to(device)
        low = [n.name for n in self.program.graph.nodes if n.op == "call_function"]
        masks = mask_tensors(self.program)
        self.checks = {kind: RoundedRunner(self.program, low, kind, masks, device) for kind in LOW_TYPES}

    def forward(self) -> None:
        with torch.no_grad(), fp32_kernels():  # as the evidence is: torch allows convolutions TF32
            self.module(*self.flat)

    def evidence(self) -> RoundingObserver:
        made_of = RoundingObserver(self.runner, 1)
        made_of.measure(self.flat, 0, {})
        return made_of

    def evidences(self) -> list[float]:
        """Seconds that each of a calibration's batches takes."""
        made_of = RoundingObserver(self.runner, BATCHES)
        return [timed(lambda i=i: made_of.measure(self.flat, i, {}), self.device) for i in range(BATCHES)]

    def checks_of(self) -> list[float]:
        """Seconds that each batch of a run of a plan takes."""
        runner = ReplayedRunner(self.checks[torch.float16])
        return [timed(lambda i=i: runner.run_batch(self.flat, i), self.device) for i in range(CHECKED)]


def rounds(subject: Subject, count: int) -> tuple[float, list[float], list[float]]:
    """Milliseconds of a forward pass; the ratios of evidence (per type) and of a check to it: of the first batch, of a
    later one, and their mean.
    """
    found = []
    for number in range(count + 1):
        forward = statistics.median(timed(subject.forward, subject.device) for _ in range(5))
        evidence = [seconds / forward / 2 for seconds in subject.evidences()]
        check = [seconds / forward for seconds in subject.checks_of()]
        if number:  # the first warms up
            found.append((forward * 1e3, *_told(evidence), *_told(check)))
    forward, *ratios = (statistics.median(part) for part in zip(*found, strict=True))
    return forward, ratios[:3], ratios[3:]


def _told(ratios: Sequence[float]) -> tuple[float, float, float]:
    return ratios[0], statistics.median(ratios[1:]), statistics.mean(ratios)


def predictions(subject: Subject) -> list[str]:
    """Predicted and seen dB, for each low type."""
    frame = subject.evidence().record.frame()
    reference = subject.runner.run(subject.flat)
    cells = []
    for kind, runner in subject.checks.items():
        noise = frame.filter(frame["low_precision_type"] == str(kind).removeprefix("torch."))["noise"].sum()
        pairs = zip(runner.run(subject.flat), reference, strict=True)
        seen = sum(float(channel_noise(ours, theirs).mean()) for ours, theirs in pairs)
        cells.append(f"{-10 * math.log10(noise):.1f} / {-10 * math.log10(seen):.1f}")
    gaps = frame["noise"].is_null().sum()
    return [*cells, f"{frame.height // 2}", f"{gaps}", f"{(frame['method'] == 'run').sum()}"]


def peak(name: str, device: str, times: int, kind: str) -> float:
    """MB at the peak of a process of its own that does this and nothing else."""
    command = [sys.executable, __file__, "--only", kind, "--device", device, "--times", str(times), name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def only(name: str, device: str, times: int, kind: str) -> None:
    subject = Subject(name, device, times)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    getattr(subject, kind)()
    print((torch.cuda.max_memory_allocated() if device != "cpu" else resident_peak()) / 1e6)


def resident_peak() -> int:
    """Bytes, of this process alone: `ru_maxrss` begins with what the parent held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def row(name: str, device: str, times: int, count: int) -> str:
    subject = Subject(name, device, times)
    nodes = sum(node.op == "call_function" for node in subject.program.graph.nodes)
    forward, evidence, check = rounds(subject, count)
    memory = [f"{peak(name, device, times, kind):.0f}" for kind in ("forward", "evidence")]
    ratios = [" / ".join(f"{ratio:.1f}" for ratio in part) for part in (evidence, check)]
    cells = [name, f"{nodes}", f"{forward:.1f}", *ratios, *memory, *predictions(subject)]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=DEFAULT, help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=1, help="batches of so many times the usual size")
    parser.add_argument("--only", choices=("forward", "evidence"), help="measure the memory of this in this process")
    parser.add_argument("--output")
    given = parser.parse_args(arguments)
    if given.only:
        only(given.names[0], given.device, given.times, given.only)
        return
    lines = [
        "| network | nodes | forward, ms | evidence, forwards per type: 1st / later / mean of 4 "
        "| check, forwards: 1st / later / mean of 8 | MB forward | MB evidence "
        "| fp16 dB predicted / seen | bf16 dB predicted / seen | edges | without evidence | by runs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in given.names:
        lines.append(row(name, given.device, given.times, given.rounds))
        machine.write(given.output, f"# Rounding evidence: cost\n\n{machine.header()}\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
