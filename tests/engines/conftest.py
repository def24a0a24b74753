"""What the tests of engines share: a cache of their own; jobs over numbered rows, and processes that can be killed."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys

# Before anything builds: tests neither read nor fill the user's cache, also from processes that they start.
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

_CACHE = tempfile.TemporaryDirectory(prefix="calibcast-test-cache-")
os.environ["CALIBCAST_CACHE"] = _CACHE.name


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache of this test alone."""
    monkeypatch.setenv("CALIBCAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


ROOT = Path(__file__).resolve().parents[2]

FUNCTIONS = '''
import os, signal, time
import torch
from torch import nn
from torch.export import Dim

started = 0

def model(seed=0, scale=1.0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        net[0].weight.mul_(scale)
    return net, (torch.randn(3, 4),), {}, ({0: Dim("batch", max=4096)},)

def note(batch):
    """Writes down which batch was transformed, and dies where it is told to."""
    global started
    number = int(batch["row"][0])
    if "NOTES" in os.environ:
        with open(os.environ["NOTES"], "a") as stream:
            stream.write(f"{number}\\n")
    if "SLOW" in os.environ:
        time.sleep(float(os.environ["SLOW"]))
    started += 1
    if "DIE_AT" in os.environ:
        at, signum = map(int, os.environ["DIE_AT"].split())
        if started == at:
            os.kill(os.getpid(), signum)
    batch["row"] += 1000  # a transform may change its batch in place
    return {"input": batch["x"]}

def agreement(output, reference):
    return (output.argmax(-1) == reference.argmax(-1)).float().mean().item()
'''


def rows(count: int) -> dict[str, Any]:
    """`count` rows: their number, and four features whose size varies from row to row."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 4, generator=generator) * (1 + torch.arange(count)[:, None] % 7)
    return {"row": list(range(count)), "x": x.tolist()}


@pytest.fixture(scope="session", autouse=True)
def _no_hub(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


JobMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def make_job() -> JobMaker:
    """A function that writes a job over `count` rows into a folder, with `tables` of TOML text on top."""

    def make(
        folder: Path, count: int = 28, batch_size: int = 2, name: str = "job.toml", data: str = "", **tables: str
    ) -> Path:
        import datasets

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "functions.py").write_text(FUNCTIONS)
        if not (folder / "rows").exists():
            datasets.disable_progress_bar()
            datasets.Dataset.from_dict(rows(count)).save_to_disk(folder / "rows")
        parts = {
            "model": 'location = "functions.py:model"',
            "data": data or f'folder = "rows"\nbatch_size = {batch_size}\ntransform = "functions.py:note"',
            "build": 'backend = "eager"',
            "output": 'folder = "out"',
            **tables,
        }
        job = folder / name
        job.write_text("\n".join(f"[{table}]\n{text}\n" for table, text in parts.items()))
        return job

    return make


# Seconds for one scenario. It only stops what hangs: a job takes as long as the machine is busy.
HANGS = 600.0


class ForkedJobs:
    """`forked_jobs.py`, started when it is first asked: its imports take longer than a job does."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._process = folder, None

    def run(self, scenarios: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for scenario in scenarios:
            if scenario.get("world", 1) > 1:
                scenario.setdefault("port", free_port())
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        process.stdin.write(json.dumps(scenarios) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], HANGS * len(scenarios))
        line = process.stdout.readline() if ready else ""
        if not line:
            self.stop()
            pytest.fail(f"{'it ended' if ready else 'it hangs'}: {(self._folder / 'stderr').read_text()[-3000:]}")
        found: list[dict[str, Any]] = json.loads(line)
        return found

    def _started(self) -> subprocess.Popen[str]:
        with (self._folder / "stderr").open("w") as errors:
            return subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("forked_jobs.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT / ".package"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip

    def stop(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


@pytest.fixture(scope="session")
def run_forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """A function that runs scenarios of `forked_jobs.py`, one after the other, and gives their outcomes."""
    jobs = ForkedJobs(tmp_path_factory.mktemp("forked"))
    yield jobs.run
    jobs.stop()


class WhenAsked(dict[Any, Any]):
    """Values that are made when they are first asked for: a test waits for its own jobs alone."""

    def __init__(self, made: Callable[[Any], Any]) -> None:
        super().__init__()
        self._made = made

    def __missing__(self, key: Any) -> Any:
        self[key] = self._made(key)
        return self[key]


@pytest.fixture(scope="session")
def when_asked() -> type[WhenAsked]:
    return WhenAsked


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
