"""How classification and cast insertion grow with the graph, and what they need for a model of gigabytes of weights.

    python benchmarks/scaling.py [-o FILE] [--nodes 1000 3000 10000] [--gigabytes 4]

Time is CPU time of one thread; the exponent is the slope of its logarithm against that of the nodes. Memory is the peak
resident size of a fresh process above what it held before the stage; the bound for insertion is the bytes of the
converted weights plus the largest one.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from calibcast.calib import calibrate
from calibcast.passes import classify, insert_casts
from torch import nn

from benchmarks.machine import header, write

MEGABYTE = 2**20


class Deep(nn.Module):
    """Blocks of five nodes: norm, linear, relu, view, add; 20 sets of weights take turns."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.blocks = nodes // 5
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in range(self.blocks):
            y = torch.relu(self.linears[block % 20](nn.functional.layer_norm(x, (8,))))
            x = x + y.view(4, 8)
        return x


class Wide(nn.Module):
    """Linear layers of 256 MB each."""

    SIDE = 8192

    def __init__(self, gigabytes: float) -> None:
        super().__init__()
        count = max(1, round(gigabytes * 2**30 / (4 * self.SIDE * self.SIDE)))
        self.layers = nn.ModuleList(nn.Linear(self.SIDE, self.SIDE, bias=False) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def grown(nodes: int) -> dict[str, float]:
    """CPU seconds of each pass over a graph of `nodes` nodes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    program = torch.export.export(Deep(nodes).eval(), (x,))
    ranges = calibrate(program, [x], progress=False, rounding_batches=0)
    plan, classified = _timed(lambda: classify(program, ranges))
    _, inserted = _timed(lambda: insert_casts(program, plan))
    calls = sum(node.op == "call_function" for node in program.graph.nodes)
    return {"nodes": calls, "classify": classified, "insert_casts": inserted}


def weighed(gigabytes: float) -> dict[str, float]:
    """Peak MB above what was held before, by stage, and the bound for insertion."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(1, Wide.SIDE)
    model = Wide(gigabytes).eval()
    program = torch.export.export(model, (x,))
    program.module()(x)
    weights = [tensor.numel() * tensor.element_size() for tensor in program.state_dict.values()]
    found: dict[str, float] = {"weights MB": sum(weights) / MEGABYTE}
    found["converted plus one MB"] = (sum(weights) / 2 + max(weights)) / MEGABYTE
    before = _peak()
    ranges = calibrate(program, [x, x], progress=False, rounding_batches=0)
    found["calibrate MB"] = _peak() - before
    plan = classify(program, ranges)
    found["classify MB"] = _peak() - before
    insert_casts(program, plan)
    found["insert_casts MB"] = _peak() - before
    return found


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _in_child(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def report(nodes: list[int], gigabytes: float) -> str:
    """Both tables."""
    rows = [_in_child("nodes", str(count)) for count in nodes]
    lines = ["## Graphs", "", "| nodes | classify, s | insert_casts, s | both, ms a node |", "|---|---|---|---|"]
    for row in rows:
        total = row["classify"] + row["insert_casts"]
        seconds = f"{row['classify']:.2f} | {row['insert_casts']:.2f}"
        lines.append(f"| {row['nodes']:.0f} | {seconds} | {1e3 * total / row['nodes']:.2f} |")
    if len(rows) > 1:
        first, last = rows[0], rows[-1]
        grew = (last["classify"] + last["insert_casts"]) / (first["classify"] + first["insert_casts"])
        lines += ["", f"exponent: {math.log(grew) / math.log(last['nodes'] / first['nodes']):.2f} (1 is linear)"]
    lines += ["", "## Weights", "", "| what | MB |", "|---|---|"]
    lines += [
        f"| {name.removesuffix(' MB')} | {value:.0f} |" for name, value in _in_child("weights", str(gigabytes)).items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", default="benchmarks/results/scaling.md")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 3000, 10000])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, size = options.child
        print(json.dumps(grown(int(size)) if kind == "nodes" else weighed(float(size))))
        return
    body = report(options.nodes, options.gigabytes)
    write(options.output, f"# Scaling of classification and cast insertion\n\n{header()}\n{body}")


if __name__ == "__main__":
    main()
