"""What it costs to watch an engine in service: `engine.monitor(every=1000)` against the engine alone.

    python -m benchmarks.monitor_cost [--device cuda] [--every 1000] [--rounds 9] [-o R.md]

Each round runs the same number of calls alone and watched, in turns, so that a change of the machine's speed meets
both. The calls are those of a service: one after another, waited for at the end of a round. The engine is the cast
graph in PyTorch (`backend="eager"`), or, with `--backend`, one that is built. What one watched and one unwatched call
cost is also measured by itself, by `every=1` and by a runtime that does nothing; the last column is what these two make
together, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from calibcast.calib.calibration import calibrate
from calibcast.engines.building import build
from calibcast.engines.engine import Engine
from calibcast.passes.cast_insertion import insert_casts
from calibcast.passes.classification import classify

from benchmarks.machine import header, write


class Tiny(torch.nn.Module):
    """The quickest engine that there may be: one small layer. What a monitor costs shows most here."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(x))


class Encoder(torch.nn.Module):
    """Two blocks of a transformer, 2 x 16 x 64."""

    def __init__(self) -> None:
        super().__init__()
        block = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
        self.blocks = torch.nn.ModuleList([block, block])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def networks() -> Iterator[tuple[str, torch.nn.Module, tuple[int, ...]]]:
    yield "one layer, 16 x 64", Tiny().eval(), (16, 64)
    yield "two encoder blocks, 2 x 16 x 64", Encoder().eval(), (2, 16, 64)


def built(module: torch.nn.Module, shape: tuple[int, ...], device: str, backend: str) -> tuple[Engine, torch.Tensor]:
    inputs = [torch.randn(shape) for _ in range(4)]
    program = torch.export.export(module, (inputs[0],))
    ranges = calibrate(program, inputs, progress=False, rounding_batches=0)
    plan = classify(program, ranges)
    settings: dict[str, Any] = {"device": device} if backend == "eager" else {}
    engine = build(insert_casts(program, plan), plan, ranges, backend=backend, progress=False, **settings)
    return engine, inputs[0].to(device)


def seconds(call: Callable[[], Any], calls: int, device: str) -> float:
    """Wall seconds on a GPU, which works beside the host; else seconds of this thread, as the machine is shared."""
    clock = time.perf_counter if device != "cpu" else time.thread_time
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    for _ in range(calls):
        call()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def row(name: str, engine: Engine, x: torch.Tensor, device: str, options: argparse.Namespace) -> str:
    with engine.monitor(every=1):  # what is compiled once, before
        engine(x)
    once = seconds(lambda: engine(x), 50, device) / 50
    calls = max(options.every, round(options.round_s / once) // options.every * options.every)
    alone: list[float] = []
    watched: list[float] = []
    for _ in range(options.rounds if calls * once < 5 * options.round_s else 1):
        alone.append(seconds(lambda: engine(x), calls, device))
        with engine.monitor(every=options.every):
            watched.append(seconds(lambda: engine(x), calls, device))
    extra = [100 * (w / a - 1) for w, a in zip(watched, alone, strict=True)]
    each, never = watched_call(engine, x, device, max(5, min(300, round(1 / once)))), unwatched_call(engine, x)
    said = (each + (options.every - 1) * never) / options.every / once
    usual = 1e6 * statistics.median(alone) / calls
    return (
        f"| {name} | {usual:.1f} | {len(extra)} x {calls} | {statistics.median(extra):+.2f}% "
        f"| {min(extra):+.2f} to {max(extra):+.2f} | {1e6 * each:.0f} | {1e6 * never:.2f} | {100 * said:.3f}% |"
    )


def watched_call(engine: Engine, x: torch.Tensor, device: str, calls: int) -> float:
    """Seconds that a watched call takes longer, median of rounds in turns."""
    found = []
    for _ in range(7):
        alone = seconds(lambda: engine(x), calls, device)
        with engine.monitor(every=1):
            engine(x)
            found.append((seconds(lambda: engine(x), calls, device) - alone) / calls)
    return statistics.median(found)


def unwatched_call(engine: Engine, x: torch.Tensor, calls: int = 100_000) -> float:
    """Seconds that an unwatched call takes longer: those of the monitor itself, before a runtime that does nothing."""

    class Nothing:
        device = engine.device

        def __call__(self, *args: Any, **kwargs: Any) -> None:
            return None

    idle: Any = replace(engine, runtime=Nothing())
    found = []
    for _ in range(7):
        alone = seconds(lambda: idle(None), calls, "cpu")
        with idle.monitor(every=10**9) as monitor:
            monitor.run(engine.runtime, (x,), {})  # the first call, which is watched
            found.append((seconds(lambda: idle(None), calls, "cpu") - alone) / calls)
            assert monitor.watched == 1
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--round-s", type=float, default=1.0, help="seconds of a round")
    parser.add_argument("-o", "--output")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    lines = [
        f"# What `engine.monitor(every={options.every})` costs\n",
        header(),
        f"- {options.rounds} rounds in turns; backend {options.backend} on {options.device}; the bar is 1%\n",
        "| engine | us a call, alone | rounds x calls | watched, median | of all rounds | us of a watched call "
        "| us of an unwatched call | both, at this rate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, module, shape in networks():
        engine, x = built(module, shape, options.device, options.backend)
        lines.append(row(name, engine, x, options.device, options))
        write(options.output, "\n".join(lines))


if __name__ == "__main__":
    main()
