"""Jobs to measure: a program, a loader that costs nothing, and what the manifest says of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_LOADER = '''
import sys
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, {root!r})
from calibcast.engines.job.progress import resident_mb


class Same(Dataset):
    """`count` times the same batch, so that the loader is not the limit; writes down the memory now and then."""

    def __init__(self, count):
        self.inputs, self.count = torch.load({inputs!r}, weights_only=True), count

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        if number % {every} == 0:
            with open({memory!r}, "a") as stream:
                stream.write(f"{{number}} {{resident_mb()}}\\n")
        return self.inputs


def loader():
    return DataLoader(Same({count}), batch_size=None)
'''


def write_job(folder: Path, count: int, every: int = 1 << 30) -> Path:
    """A job over `count` equal batches of `inputs.pt`, of the program `net.pt2` in `folder`."""
    (folder / "loader.py").write_text(
        _LOADER.format(
            root=str(ROOT), inputs=str(folder / "inputs.pt"), count=count, every=every, memory=str(folder / "memory")
        )
    )
    job = folder / "job.toml"
    job.write_text(
        '[model]\nlocation = "net.pt2"\n[data]\nloader = "loader.py:loader"\nheld_out_share = 0.0\n'
        '[build]\nbackend = "eager"\n[output]\nfolder = "out"\n'
    )
    return job


def seconds(job: Path) -> float:
    """How long the calibration of the last run took: data, checkpoints and the table on disk."""
    manifest = json.loads((job.parent / "out/manifest.json").read_text())
    found: float = manifest["stages"]["calibrate"]["seconds"]
    return found


def run(job: Path, processes: int = 1) -> float:
    """Run a job from the start with one torch thread a process; how long its calibration took."""
    launcher = [] if processes == 1 else ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"]
    subprocess.run(
        [sys.executable, "-m", *launcher, "calibcast", "run", str(job), "--redo"], check=True, cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env={**__import__("os").environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / ".package")},
    )  # fmt: skip
    return seconds(job)
