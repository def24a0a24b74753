"""Engines of networks before and after rescaling: latency, error and equal bits, for `rescaling.py --gpu`.

One process a network, all at once, as nearly all of the time goes into imports and builders. They take turns at the
GPU when all have built, so that none is timed while another computes. Each row is written as JSON when it is known: a
process that dies or is late costs its own rows alone, and the table says which.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

HEADER = (
    "| network | variant | fp32 nodes | ms median (min to max) | SQNR dB | NaN or Inf | note |",
    "|---|---|---|---|---|---|---|",
)
DEFAULT = ("T5 encoder (transformers)", "Llama (transformers)", "latent decoder", "ViT, growth")
VARIANTS = ("bits", "fp32", "whole-half", "plan", "plan, rescaled", "whole-half, rescaled")
_WARM_CALLS, _TIMED_CALLS = 5, 30


@dataclass(frozen=True)
class Row:
    """A line of the table. variant: "bits" says whether fp32 results of both programs are the same bits here."""

    network: str
    variant: str
    high: int | None = None
    ms: float | None = None
    ms_min: float | None = None
    ms_max: float | None = None
    sqnr_db: float | None = None
    nonfinite: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Shared:
    """What all processes have: where rows go, when to stop, and how many build."""

    rows: Path
    deadline: float  # of time.time()
    networks: int
    rounds: int
    backend: str
    device: str

    def append(self, row: Row) -> None:
        """Write a row; one line, so that those of other processes stay whole."""
        with self.rows.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(row)) + "\n")

    def ready(self, network: str) -> None:
        """Say that this network has built, and wait until all have, or half of the time that is left has passed."""
        folder = self.rows.parent / f"{self.rows.stem}-ready"
        folder.mkdir(exist_ok=True)
        (folder / str(os.getpid())).write_text(network)
        until = time.time() + max(0.0, (self.deadline - time.time()) / 2)
        while time.time() < until and len(list(folder.iterdir())) < self.networks:
            time.sleep(0.1)


def run(networks: Sequence[str], options: Any) -> None:
    """Measure all networks at once, and write the table as rows come."""
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = output.with_suffix(".jsonl")
    rows.unlink(missing_ok=True)
    rows.touch()
    ready = rows.parent / f"{rows.stem}-ready"
    for file in ready.iterdir() if ready.exists() else ():
        file.unlink()
    deadline = time.time() + options.seconds
    shared = [str(rows), str(deadline), str(len(networks)), str(options.rounds), options.backend]
    command = [sys.executable, __file__]
    children = {name: subprocess.Popen([*command, name, *shared], start_new_session=True) for name in networks}
    ended: dict[str, str] = {}
    while len(ended) < len(children):
        for name, child in children.items():
            if name not in ended and (code := child.poll()) is not None:
                ended[name] = "" if code == 0 else _ending(code)
                if code:
                    (ready / f"{child.pid}-dead").parent.mkdir(exist_ok=True)
                    (ready / str(child.pid)).write_text(name)  # nobody has to wait for it
            elif name not in ended and time.time() > deadline:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                ended[name] = f"was stopped after {options.seconds:g} s"
        output.write_text(_text(networks, rows, ended), encoding="utf-8")
        time.sleep(0.5)
    print(output.read_text(encoding="utf-8"))


def _ending(code: int) -> str:
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _text(networks: Sequence[str], rows: Path, ended: dict[str, str]) -> str:
    from benchmarks import machine

    found = [Row(**json.loads(line)) for line in rows.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()]
    last = {(row.network, row.variant): row for row in found}
    lines = ["# Rescaling on a GPU\n", machine.header()]
    lines += [
        "Engines in turns; medians with the range. SQNR against fp32 without TF32, on data that calibration did not "
        "see; of what an engine runs in fp32, TensorRT may use TF32. `bits`: the two programs in fp32, TF32 off.\n",
        *HEADER,
    ]
    for name in networks:
        lines += [_line(last[name, variant]) for variant in VARIANTS if (name, variant) in last]
        if ended.get(name):
            lines.append(_line(Row(name, "(all)", note=f"its process {ended[name]}")))
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    time_ = "" if row.ms is None else f"{row.ms:.3f} ({row.ms_min:.3f} to {row.ms_max:.3f})"
    cells = [
        row.network, row.variant, "" if row.high is None else str(row.high), time_,
        "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}", "" if row.nonfinite is None else str(row.nonfinite),
        row.note.replace("|", "/").replace("\n", " ")[:200],
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def measure(name: str, shared: Shared) -> None:
    """All variants of one network: built in this process, then timed while no other network is."""
    from calibcast.calib.calibration import calibrate
    from calibcast.calib.rounding import fp32_kernels
    from calibcast.passes.rescaling.rescaling import rescale

    from benchmarks.rescaling_networks import CASES, LARGE

    case, device = {**CASES, **LARGE}[name], torch.device(shared.device)
    program = case.program()
    unseen = [tuple(t.to(device) for t in case.batch(10 + i)) for i in range(2)]
    with fp32_kernels():
        ranges = calibrate(program, [case.batch(i) for i in range(3)], progress=False, device=device)
        fitted = rescale(program, ranges)
        want, ours = _outputs(program, unseen, device), _outputs(fitted.program, unseen, device)
    same = all(map(torch.equal, want, ours))
    bits = "the same" if same else f"NOT the same, {_sqnr(want, ours)[0]:.1f} dB"
    shared.append(Row(name, "bits", note=f"{bits}; {fitted.reason}"))
    engines: dict[str, tuple[Any, Row]] = {}
    for variant, (source, table, plan) in _plans(program, ranges, fitted).items():
        built = _built(name, variant, source, table, plan, shared)
        if isinstance(built, Row):
            shared.append(built)
        else:
            row = _judged(built, name, variant, want, unseen)
            shared.append(row)
            if row.sqnr_db is not None:
                engines[variant] = built, row
    shared.ready(name)
    with ExitStack() as stack:
        turn = stack.enter_context((shared.rows.parent / f"{shared.rows.stem}-turn").open("w"))
        fcntl.flock(turn, fcntl.LOCK_EX)
        _timed(engines, unseen[0], shared)


def _plans(program: Any, ranges: Any, fitted: Any) -> dict[str, tuple[Any, Any, Any]]:
    from calibcast.passes.classification import classify
    from calibcast.passes.plan import PrecisionPlan

    from benchmarks.rescaling import whole_half

    def half(source: Any, table: Any) -> Any:
        return source, table, whole_half(source, table, torch.float16)

    found = {
        "fp32": (program, ranges, PrecisionPlan.from_types(program)),
        "whole-half": half(program, ranges),
        "plan": (program, ranges, classify(program, ranges)),
        "plan, rescaled": (fitted.program, fitted.ranges, classify(fitted.program, fitted.ranges)),
        "whole-half, rescaled": half(fitted.program, fitted.ranges),
    }
    if found["plan, rescaled"][2].low_precision_nodes == found["whole-half, rescaled"][2].low_precision_nodes:
        del found["whole-half, rescaled"]
    return found


def _built(name: str, variant: str, program: Any, ranges: Any, plan: Any, shared: Shared) -> Any:
    """An engine, or the row that says why there is none."""
    from calibcast.engines.building import build
    from calibcast.passes.cast_insertion import insert_casts

    from benchmarks.onnx_engine import OnnxEngine

    if time.time() > shared.deadline - 10:
        return Row(name, variant, note="not built: the time was up")
    try:
        if shared.backend == "onnx":
            return OnnxEngine(program, plan)
        return build(
            insert_casts(program, plan), plan, ranges, backend=shared.backend, isolate=False, cache=False,
            progress=False, on_failure="error" if "half" in variant else "fallback",
        )  # fmt: skip
    except Exception as error:  # whatever a builder raises is a row
        return Row(name, variant, note=f"fails: {type(error).__name__}: {str(error).strip()}")


def _judged(engine: Any, name: str, variant: str, want: list[torch.Tensor], unseen: Any) -> Row:
    high = len(engine.plan.high_precision_nodes)
    remedies = [text.split(", as ")[0] for text in engine.record.get("remedies", ())]
    note = "; ".join([engine.backend, *remedies])
    try:
        sqnr, nonfinite = _sqnr(want, [t for batch in unseen for t in _tensors(engine(*batch))])
    except Exception as error:  # the runtime's own
        return Row(name, variant, high, note=f"does not run: {type(error).__name__}: {str(error).strip()}; {note}")
    return Row(name, variant, high, sqnr_db=sqnr, nonfinite=nonfinite, note=note)


def _timed(engines: dict[str, tuple[Any, Row]], inputs: Any, shared: Shared) -> None:
    times: dict[str, list[float]] = {variant: [] for variant in engines}
    for engine, _ in engines.values():
        _milliseconds(engine, inputs, _WARM_CALLS)
    for _ in range(shared.rounds):
        for variant, (engine, _) in engines.items():
            times[variant].append(_milliseconds(engine, inputs, _TIMED_CALLS))
    for variant, (_, row) in engines.items():
        taken = times[variant]
        timing = {"ms": statistics.median(taken), "ms_min": min(taken), "ms_max": max(taken)}
        shared.append(Row(**{**asdict(row), **timing}))


def _outputs(program: Any, batches: Any, device: torch.device) -> list[torch.Tensor]:
    from calibcast.calib.execution import ProgramRunner

    runner = ProgramRunner(program, device)
    return [t for batch in batches for t in runner.run(list(batch))]


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _sqnr(want: list[torch.Tensor], got: list[torch.Tensor]) -> tuple[float, int]:
    """SQNR of the worst result over what is finite, dB, and how many values are not."""
    worst, bad = math.inf, 0
    for reference, value in zip(want, got, strict=True):
        finite = torch.isfinite(value)
        bad += int((~finite).sum())
        error = torch.where(finite, value.double() - reference.double(), 0.0).square().sum()
        signal = torch.where(finite, reference.double(), 0.0).square().sum()
        worst = min(worst, float(10 * torch.log10(signal / error)) if float(signal) else math.nan)
    return worst, bad


def _milliseconds(engine: Any, inputs: Any, calls: int) -> float:
    on_gpu = inputs[0].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        engine(*inputs)
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls * 1e3


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    network, file, until, many, turns, chosen = sys.argv[1:]
    measure(
        network,
        Shared(Path(file), float(until), int(many), int(turns), chosen, "cuda" if torch.cuda.is_available() else "cpu"),
    )
