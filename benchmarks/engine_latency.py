"""Accuracy and latency of trained models through `engines.compile` with the TensorRT backend, on a GPU.

    python benchmarks/engine_latency.py --output benchmarks/results/engine_latency.md

Two networks, both trained here on the handwritten digits that calibcast ships, and judged on held-out images: the
demo's `EnergyClassifier`, which whole fp16 breaks, and a ResNet-18 on the same images at 96 x 96. Each runs eager in
fp32, whole in fp16, as an fp32 TensorRT engine, and as calibcast's fp16 and bf16 engines. Latencies are medians over
interleaved rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from calibcast import engines
from calibcast.engines.demo import Digits, correct, load_digits, train

from benchmarks import machine

ROUNDS, CALLS = 15, 20
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Images:
    """Digits as [N, 3, 96, 96] images of 0 to 1."""

    digits: Digits

    def __iter__(self) -> Iterator[Batch]:
        for pixels, labels in self.digits:
            image = (pixels / 255.0).view(-1, 1, 8, 8)
            image = nn.functional.interpolate(image, size=96, mode="bilinear").expand(-1, 3, -1, -1)
            yield image.contiguous(), labels


def train_resnet(data: Images, epochs: int) -> nn.Module:
    """A ResNet-18 trained in fp32 on the GPU."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).cuda()
    batches = [(image.cuda(), label.cuda()) for image, label in data]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for image, label in batches:
            loss = nn.functional.cross_entropy(model(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def variants(
    model: nn.Module, inputs: torch.Tensor, calibration: Any
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """What is compared: each takes fp32 inputs on the GPU."""
    half = copy.deepcopy(model).half()
    common = {"inputs": (inputs,), "backend": "tensorrt"}
    calibrated = {
        "calibration_dataloader": calibration,
        "transform": lambda batch: batch[0].cuda(),
        "progress": False,
    }

    def no_grad(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return torch.no_grad()(function)

    return {
        "eager fp32": no_grad(model),
        "eager whole fp16": no_grad(lambda x: half(x.half())),
        "TensorRT fp32": engines.compile(model, enable_autocast=False, **common),
        "calibcast fp16": engines.compile(model, **common, **calibrated),
        "calibcast bf16": engines.compile(model, low_precision_type=torch.bfloat16, **common, **calibrated),
    }


def latencies(runs: dict[str, Callable[[torch.Tensor], torch.Tensor]], inputs: torch.Tensor) -> dict[str, list[float]]:
    """Milliseconds per call, one number per round; the variants take turns within a round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(ROUNDS + 3):  # three to warm up
        for name, run in runs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(CALLS):
                run(inputs)
            stop.record()
            torch.cuda.synchronize()
            if round_ >= 3:
                times[name].append(start.elapsed_time(stop) / CALLS)
    return times


def table(name: str, model: nn.Module, calibration: Any, held: Any) -> str:
    """Markdown rows of one network."""
    inputs = next(iter(calibration))[0].cuda()
    program = torch.export.export(model, (inputs,))
    runs = variants(model, inputs, calibration)
    times = latencies(runs, inputs)
    lines = [
        f"\n## {name}, batch {len(inputs)}\n",
        "| variant | accuracy % | rel. L2 | SQNR dB | NaN or Inf | ms median (min to max) | nodes low / high |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, run in runs.items():
        run_device = _OnGpu(run, torch.device("cuda"))
        report = engines.verify(
            run_device, program, held, transform=lambda b: b[0], metrics={"accuracy": correct}, progress=False
        )
        row, ms = report.frame.row(0, named=True), times[label]
        plan = getattr(run, "plan", None)
        nodes = (
            ""
            if plan is None or not plan.low_precision_nodes
            else f"{len(plan.low_precision_nodes)} / {len(plan.high_precision_nodes)}"
        )
        lines.append(
            f"| {label} | {100 * report.metrics['accuracy']:.2f} | {row['rel_l2']:.2e} | {row['sqnr_db']:.1f} | "
            f"{row['nonfinite']} | {statistics.median(ms):.3f} ({min(ms):.3f} to {max(ms):.3f}) | {nodes} |"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class _OnGpu:
    run: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="write the Markdown there, too")
    parser.add_argument("--epochs", type=int, default=8, help="of the ResNet")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    training, calibration, held = load_digits()
    small = train(training).cuda()
    resnet = train_resnet(Images(training), options.epochs)
    parts = [
        "# Trained models through engines.compile on a GPU\n",
        machine.header(),
        "TF32 is off in eager mode. `rel. L2` and SQNR are of the logits against eager fp32 on 600 held-out images.",
        table("EnergyClassifier (the demo's)", small, calibration, held),
        table("ResNet-18 on digits at 96 x 96", resnet, Images(calibration), Images(held)),
    ]
    machine.write(options.output, "\n".join(parts))


if __name__ == "__main__":
    main()
