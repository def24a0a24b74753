"""What a small nightly job costs: CPU seconds and the clock of `calibcast run` over 41 batches of 8 rows.

    python benchmarks/start_up.py --output benchmarks/results/start_up.md
    python benchmarks/start_up.py --before ../a-checkout-of-an-older-version --output ...

Almost all of it is start-up: what is imported, and a builder's process. CPU seconds are those of the command and of
all processes that it starts, with one torch thread each; on a shared machine they say more than the clock. Of several
runs, taken in turns, the least is shown. For comparison: torch's import alone, and with it an export of the model.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NET = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), (
        torch.randn(8, 16),)

def loader():
    torch.manual_seed(1)
    return [torch.randn(8, 16) for _ in range(41)]
"""
JOB = """
[model]
location = "net.py:model"
[data]
loader = "net.py:loader"
[build]
{build}
[output]
folder = "{name}"
"""
BUILDS = {
    "eager": 'backend = "eager"',
    "tensorrt": 'backend = "tensorrt"\nahead_of_time = true\nsettings = { cache = false }',
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output")
    options = parser.parse_args()
    from benchmarks import machine

    with tempfile.TemporaryDirectory() as name:
        rows = measured(Path(name), options.before, options.rounds)
    text = f"# Start-up of a small job\n\n{machine.header()}\n- least of {options.rounds} runs, in turns\n\n"
    text += "| what | CPU s | clock s |" + (" CPU s before | clock s before | CPU s, share |" if options.before else "")
    text += "\n" + "|---" * (6 if options.before else 3) + "|\n" + "\n".join(rows)
    machine.write(options.output, text)


def measured(folder: Path, before: Path | None, rounds: int) -> list[str]:
    """A row of the table for each thing that is run."""
    (folder / "net.py").write_text(NET)
    runs = {
        "`import torch`": ["-c", "import torch"],
        "`import torch`, `torch.export.export`": ["-c", "import torch, net\ntorch.export.export(*net.model())"],
    }
    jobs = {"job, eager": "eager"}
    if _builder():
        jobs["job, TensorRT-RTX ahead of time"] = "tensorrt"
    for name, backend in jobs.items():
        (folder / f"{backend}.toml").write_text(JOB.format(build=BUILDS[backend], name=backend))
        runs[name] = ["-m", "calibcast", "run", f"{backend}.toml", "--redo"]
    runs["job, up to date"] = ["-m", "calibcast", "run", "eager.toml"]
    places = [ROOT, *([before] if before is not None else [])]
    found: dict[tuple[str, Path], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for name, arguments in runs.items():
            for place in places:
                found.setdefault((name, place), []).append(_run(arguments, folder, place))
    return [_row(name, [(min(c), min(s)) for c, s in (zip(*found[name, p], strict=True) for p in places)])
            for name in runs]  # fmt: skip


def _row(name: str, pairs: list[tuple[float, float]]) -> str:
    share = f" {pairs[0][0] / pairs[1][0]:.2f} |" if len(pairs) > 1 else ""
    return f"| {name} | " + "".join(f"{cpu:.1f} | {clock:.1f} | " for cpu, clock in pairs).rstrip() + share


def _run(arguments: list[str], folder: Path, place: Path) -> tuple[float, float]:
    """CPU seconds and seconds on the clock of one run, with the package of a checkout."""
    path = os.pathsep.join([str(place.resolve() / ".package"), str(folder), *filter(None, [os.getenv("PYTHONPATH")])])
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, clock


def _builder() -> bool:
    try:
        return metadata.version("torch-tensorrt-rtx") != ""
    except metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
