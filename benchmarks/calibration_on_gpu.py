"""What calibration costs on a GPU: time a batch and peak memory, against the plain eager forward in the same run.

    python benchmarks/calibration_on_gpu.py --output benchmarks/results/calibration_on_gpu.md

Ways: the interpreter alone; measured by some twenty kernels a tensor (`Observer`); by one (`DeviceObserver`), in the
interpreter and, as `calibrate` does, as a replayed CUDA graph; Torch-TensorRT's tracer, where it is installed. TF32 is
off. Times are medians over interleaved rounds. Batches are on the GPU already, or brought there from the host, and then
compared with a forward that brings them, too. Peak memory is what torch has allocated above the network and its inputs,
at few and at many batches. The break-even is the number of batches after which capturing a graph, with its one batch
that runs in the interpreter, has paid for itself.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from calibcast.calib.calibration_run import prepare
from calibcast.calib.captured_execution import CapturedRunner
from calibcast.calib.device_observer import DeviceObserver, fused_problem
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.graph import tensor_specs
from calibcast.calib.masks import mask_tensors
from calibcast.calib.observer import Observer

from benchmarks import machine
from benchmarks.engine_networks import subject

NETWORKS = ("resnet50", "vit_b_16", "bert_base", "nafnet")
FEW, MANY, ROUNDS = 2, 16, 7
FROM_HOST = ", batches on the host"
Way = Callable[[int], Any]  # runs so many batches


def measured(program: Any, flat: list[Any], histogram: bool, kind: type[Observer]) -> Way:
    """Batches that run in the interpreter, measured by this observer."""
    run = prepare(program, None, histogram, "warn")
    observer = run.observer = kind(run.specs, run.runner.device, histogram, mask_tensors(program))

    def batches(count: int) -> None:
        for index in range(count):
            observer.start(index)
            run.runner.run_batch(flat, index, run.watch)
            observer.finish()

    return batches


def calibrated(program: Any, flat: list[Any], histogram: bool) -> Way:
    """Batches as `calibrate` takes them: captured, hashed."""
    run = prepare(program, None, histogram, "warn")

    def batches(count: int) -> None:
        for index in range(count):
            run.measure(index, flat)

    return batches


def ways(name: str) -> dict[str, Callable[[], Way]]:
    """What is compared; each is created again, so that memory that it keeps counts as its own."""
    net = subject(name, "cuda")
    inputs = net.held_out[0]
    with torch.no_grad():
        program = torch.export.export(net.model, inputs)
    flat, module = list(inputs), program.module()

    host = [value.cpu() for value in inputs]

    def forward() -> Way:
        return lambda n: [net.model(*inputs) for _ in range(n)] and None

    def from_host() -> Way:
        return lambda n: [net.model(*(value.to("cuda") for value in host)) for _ in range(n)] and None

    def interpreter() -> Way:
        runner = ProgramRunner(program)
        return lambda n: [runner.run(flat) for _ in range(n)] and None

    def tracer() -> Way:
        from torch_tensorrt.dynamo.lowering.passes.pass_utils import trace_intermediate_node_outputs

        return lambda n: trace_intermediate_node_outputs(module, [inputs] * n, set())

    found: dict[str, Callable[[], Way]] = {"forward": forward, "interpreter": interpreter}
    for text, histogram in (("ranges", False), ("all", True)):
        found[f"many kernels, {text}"] = lambda h=histogram: measured(program, flat, h, Observer)
        if fused_problem(torch.device("cuda")) is None:
            found[f"one kernel, {text}"] = lambda h=histogram: measured(program, flat, h, DeviceObserver)
            found[f"captured, {text}"] = lambda h=histogram: calibrated(program, flat, h)
    found["Torch-TensorRT's tracer"] = tracer
    found[f"forward{FROM_HOST}"] = from_host
    for text, histogram in (("ranges", False), ("all", True)):
        found[f"captured, {text}{FROM_HOST}"] = lambda h=histogram: calibrated(program, host, h)
    return found


def milliseconds(run: Way, batches: int = 4) -> float:
    """Of a batch."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(batches)
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / batches


def peak(make: Callable[[], Way], batches: int) -> float:
    """MB that torch allocated at most above what was there before."""
    gc.collect()  # networks and graphs that were measured before
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    make()(batches)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def rows(name: str, wanted: list[str]) -> list[str]:
    """A Markdown row for each way. Batches on the GPU first, then on the host: what one keeps is not there for both."""
    found = {label: make for label, make in ways(name).items() if any(part in label for part in ["forward", *wanted])}
    on_host = {label: make for label, make in found.items() if label.endswith(FROM_HOST)}
    on_gpu = {label: make for label, make in found.items() if label not in on_host}
    return [*_measured_rows(name, on_gpu, ""), *_measured_rows(name, on_host, FROM_HOST)]


def _measured_rows(name: str, found: dict[str, Callable[[], Way]], where: str) -> list[str]:
    made: dict[str, Way] = {}
    lines = []
    first: dict[str, float] = {}
    for label, make in found.items():
        try:
            few, many = peak(make, FEW), peak(make, 4 if "tracer" in label else MANY)
            run = make()
            run(1)
            start = time.perf_counter()
            run(1)  # a captured way captures here
            torch.cuda.synchronize()
            first[label] = 1000 * (time.perf_counter() - start)
        except Exception as error:  # the peer, or a GPU that lacks what a way needs
            lines.append(f"| {name} | {label} | fails: {type(error).__name__}: {str(error)[:120]} | | | | |")
            continue
        made[label] = run
        first[f"{label} few"], first[f"{label} many"] = few, many
    times: dict[str, list[float]] = {label: [] for label in made}
    for _ in range(ROUNDS):
        for label, run in list(made.items()):
            try:
                times[label].append(milliseconds(run, 2 if "tracer" in label else 4))
            except torch.OutOfMemoryError as error:  # the tracer's, beside the graphs that the captured ways keep
                del made[label]
                lines.append(f"| {name} | {label} | fails: {type(error).__name__} in a round | | | | |")
            torch.cuda.empty_cache()
    base = statistics.median(times[f"forward{where}"])
    for label in made:
        middle = statistics.median(times[label])
        plain = times.get(label.replace("captured", "one kernel"))
        pays = ""
        if label.startswith("captured") and plain:
            saved = statistics.median(plain) - middle
            pays = f"{1 + max(0.0, first[label] - middle) / saved:.0f}" if saved > 0 else "never"
        lines.append(
            f"| {name} | {label} | {middle:.2f} ({min(times[label]):.2f} to {max(times[label]):.2f}) | "
            f"{middle / base:.2f} | {first[f'{label} few']:.0f} | {first[f'{label} many']:.0f} | {pays} |"
        )
    return lines


def graphs_replay() -> str:
    """Whether capturing works here at all, said in a line."""
    program = torch.export.export(torch.nn.Linear(8, 8).cuda(), (torch.ones(2, 8, device="cuda"),))
    runner = ProgramRunner(program)
    observer = DeviceObserver(tensor_specs(program), runner.device, True)
    captured = CapturedRunner(runner, observer)
    for index in range(3):
        captured.run_batch([torch.full((2, 8), float(index), device="cuda")], index, observer.watch)
        observer.finish()
    row = next(i for i, spec in enumerate(tensor_specs(program)) if spec.kind == "input")
    seen = observer.total.values[row].tolist()[:2]
    return f"captured batches replayed: {captured.replayed} of 3; the input's range is {seen}, to be [0.0, 2.0]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="write the Markdown there, too")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--ways", nargs="*", default=[""], help="only those that have one of these in their names")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    problem = fused_problem(torch.device("cuda"))
    lines = [
        "# Cost of calibration on a GPU\n",
        machine.header(),
        graphs_replay() if problem is None else f"no fused kernel: {problem}",
        f"\n| network | way | ms a batch: median of {ROUNDS} rounds (range) | ratio | peak MB, {FEW} batches | "
        f"{MANY} batches (tracer: 4) | pays after |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in options.networks:
        lines += rows(name, options.ways)
        machine.write(options.output, "\n".join(lines))


if __name__ == "__main__":
    main()
