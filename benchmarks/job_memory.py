"""Whether a long calibration grows: the memory of a job over many small batches, on a program of many tensors.

    python benchmarks/job_memory.py --batches 100000 --tensors 3000 --output benchmarks/results/job_memory.md

The slope is of a straight line through the resident memory, by least squares, over the last four fifths of the run.
What a checkpoint takes for a moment (24 MB at 3000 tensors) may or may not be in a reading, which tilts the line of a
short run; so the most in each fifth is told, too. At 3000 tensors a batch takes some tenth of a second, and the full
run hours.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine
from benchmarks.job_files import run, write_job


class Chain(nn.Module):
    """`length` small operations, one after the other."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [8, 16]."""
        for number in range(self.length):
            x = torch.tanh(x) if number % 2 else x * 1.5
        return x


def slope(points: list[tuple[float, float]]) -> float:
    """Of the straight line with the least squares, in y per x."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--tensors", type=int, default=3_000)
    parser.add_argument("--output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        inputs = (torch.randn(8, 16),)
        # The input is a tensor, too.
        torch.export.save(torch.export.export(Chain(options.tensors - 1), inputs), folder / "net.pt2")
        torch.save(inputs, folder / "inputs.pt")
        job = write_job(folder, options.batches, every=max(options.batches // 100, 1))
        took = run(job)
        rows = [tuple(map(float, line.split())) for line in (folder / "memory").read_text().splitlines()]
    points = [(x, y) for x, y in rows if x >= options.batches / 5]
    fifths = [max(y for x, y in rows if part <= 5 * x / options.batches < part + 1) for part in range(5)]
    grows = 10_000 * slope(points)
    text = (
        f"# Memory of a long job\n\n{machine.header()}\n"
        f"{options.batches} batches, {options.tensors} tensors, {1000 * took / options.batches:.2f} ms a batch.\n"
        f"Resident memory: {rows[0][1]:.1f} MB at the first batch, {points[0][1]:.1f} MB after a fifth, "
        f"{points[-1][1]:.1f} MB at the end, {max(y for _, y in rows):.1f} MB at most.\n"
        f"Most in each fifth: {', '.join(f'{most:.1f}' for most in fifths)} MB.\n"
        f"Slope over the last four fifths: {grows:+.3f} MB per 10,000 batches."
    )
    machine.write(options.output, text)


if __name__ == "__main__":
    main()
