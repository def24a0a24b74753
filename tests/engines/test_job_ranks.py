"""Several processes share a calibration: the result is that of one, a lost process leaves what it measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from calibcast.calib import RangeTable
from calibcast.calib.checkpoint import Checkpoint
from calibcast.engines.cli import _run

ROWS, BATCH = 27, 4  # 7 batches, the last of three rows
EXACT = [
    "node", "output", "batches", "elements", "min", "max", "absmax", "smallest", "nan", "posinf", "neginf", "zeros",
    "masked", "absmax_batch", "nonfinite_batch", "histogram",
]  # fmt: skip
LOADERS = """
import torch
from datasets import load_from_disk
from pathlib import Path
from torch.utils.data import DataLoader, DistributedSampler

def dataset():
    return load_from_disk(str(Path(__file__).parent / "rows")).with_format("torch")

def plain():
    return DataLoader(dataset(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1))

def generated():
    rows = dataset()
    for start in range(0, len(rows), 4):
        yield rows[start:start + 4]

def sharded(rank, world_size):
    rows = dataset()
    return [rows[start:start + 4] for start in range(4 * rank, len(rows), 4 * world_size)]

def distributed():
    return DataLoader(dataset(), batch_size=4, sampler=DistributedSampler(dataset(), shuffle=False))
"""
SOURCES = {
    "rows": f'folder = "rows"\nbatch_size = {BATCH}',
    "stream": f'folder = "rows"\nstreaming = true\nbatch_size = {BATCH}',
    "limited": f'folder = "rows"\nbatch_size = {BATCH}\nmax_batches = 5',
    "loader": 'loader = "loaders.py:plain"',
    "generator": 'loader = "loaders.py:generated"',
}
WORLDS = [(name, world) for name in SOURCES for world in (2, 3)] + [("rows", 9)]


def equal(ours: RangeTable, theirs: RangeTable) -> None:
    """Counts, min, max and histograms exactly; sums to 1e-12 of the sum of magnitudes."""
    assert ours.frame.select(EXACT).equals(theirs.frame.select(EXACT), null_equal=True)
    mine, other = ours.frame, theirs.frame
    for column in ("mean", "rms"):
        # A mean may cancel to nothing; its sum is right to 1e-12 of the magnitudes that were added.
        assert ((mine[column] - other[column]).abs() <= 1e-12 * other["rms"]).all(), column
    assert ours.calibration.batches == theirs.calibration.batches
    assert set(ours.calibration.input_hashes) == set(theirs.calibration.input_hashes)
    assert ours.calibration.input_sizes == theirs.calibration.input_sizes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, make_job: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("ranks")
    make_job(folder, ROWS)
    (folder / "loaders.py").write_text(LOADERS)
    return folder


def job(make_job: Any, base: Path, name: str, source: str, held_out: float = 0.0) -> str:
    data = f'{source}\ntransform = "functions.py:note"\nheld_out_share = {held_out}'
    return str(make_job(base, name=f"{name}.toml", data=data, output=f'folder = "{name}"'))


@pytest.fixture(scope="module")
def outcomes(base: Path, make_job: Any, run_forked: Any, when_asked: Any) -> dict[tuple[str, int], dict[str, Any]]:
    """A source with a number of processes."""

    def run(key: tuple[str, int]) -> dict[str, Any]:
        name, world = key
        (found,) = run_forked([{"job": job(make_job, base, f"{name}-{world}", SOURCES[name]), "world": world}])
        return dict(found)

    made: dict[tuple[str, int], dict[str, Any]] = when_asked(run)
    return made


@pytest.fixture(scope="module")
def alone(base: Path, outcomes: Any) -> Path:
    """The table that one process makes of all rows."""
    assert outcomes["rows", 1]["codes"] == [0], outcomes["rows", 1]["err"]
    return base / "rows-1/ranges.parquet"


@pytest.mark.parametrize(("name", "world"), WORLDS)
def test_processes_together_measure_what_one_does(name: str, world: int, base: Path, outcomes: Any) -> None:
    """Uneven shards, and with nine processes for seven batches empty ones."""
    for key in ((name, 1), (name, world)):
        assert set(outcomes[key]["codes"]) == {0}, outcomes[key]["err"]
    alone = RangeTable.load(base / f"{name}-1/ranges.parquet")
    together = RangeTable.load(base / f"{name}-{world}/ranges.parquet")
    assert alone.calibration.batches == (5 if name == "limited" else 7)
    equal(together, alone)
    assert not list((base / f"{name}-{world}/checkpoints").iterdir())
    plans = [json.loads((base / f"{name}-{n}/plan.json").read_text())["decisions"] for n in (1, world)]
    assert [d["precision"] for d in plans[0]] == [d["precision"] for d in plans[1]]


@pytest.fixture(scope="module")
def sharded(base: Path, make_job: Any, run_forked: Any) -> list[dict[str, Any]]:
    scenarios = [
        {"job": job(make_job, base, name, f'loader = "loaders.py:{name}"'), "world": 2}
        for name in ("sharded", "distributed")
    ]
    found: list[dict[str, Any]] = run_forked(scenarios)
    return found


def test_a_loader_that_takes_its_rank_gives_the_shard(base: Path, sharded: Any, alone: Path) -> None:
    assert sharded[0]["codes"] == [0, 0], sharded[0]["err"]
    equal(RangeTable.load(base / "sharded/ranges.parquet"), RangeTable.load(alone))


def test_a_distributed_sampler_is_taken_as_a_shard_and_its_repeats_are_told(base: Path, sharded: Any) -> None:
    assert sharded[1]["codes"] == [0, 0], sharded[1]["err"]
    assert "the DistributedSampler repeats 1 of 27 samples" in sharded[1]["err"][0]
    frame = RangeTable.load(base / "distributed/ranges.parquet").frame
    assert frame.filter(pl.col("kind") == "input")["elements"].item() == 28 * 4


@pytest.fixture(scope="module")
def lost(base: Path, make_job: Any, run_forked: Any) -> dict[str, Any]:
    """Two processes, of which the second is killed in its third batch; then the same command again."""
    path = job(make_job, base, "lost", f'folder = "rows"\nbatch_size = {BATCH}')
    Path(path).write_text(Path(path).read_text() + "[calibration]\ncheckpoint_batches = 1\n")
    kill = {"rank": 1, "phase": "running", "batch": 3}
    (first,) = run_forked([{"job": path, "world": 2, "kill": kill}])
    checkpoints = base / "lost/checkpoints"
    left = {file.name: Checkpoint.load(file).position for file in sorted(checkpoints.iterdir())}
    merged = _run(["merge", *map(str, sorted(checkpoints.iterdir())), "-o", str(base / "merged.parquet")])
    alone = _run(["merge", str(checkpoints / "rank-0-of-2.npz"), "-o", str(base / "one.parquet")])
    (again,) = run_forked([{"job": path, "world": 2}])
    return {"first": first, "left": left, "merged": merged, "alone": alone, "again": again}


def test_a_lost_process_leaves_its_checkpoint(lost: dict[str, Any]) -> None:
    codes = lost["first"]["codes"]
    assert codes == [1, -signal.SIGKILL]
    assert "cannot hear from process 1" in lost["first"]["err"][0]
    assert "Traceback" not in lost["first"]["err"][0]
    assert lost["left"] == {"rank-0-of-2.npz": 4, "rank-1-of-2.npz": 2}


def test_what_is_left_can_be_merged(base: Path, lost: dict[str, Any], alone: Path) -> None:
    assert (lost["merged"], lost["alone"]) == (0, 0)
    merged = RangeTable.load(base / "merged.parquet")
    assert merged.calibration.batches == 6  # of seven: the third of the second process is missing
    assert RangeTable.load(base / "one.parquet").calibration.batches == 4
    whole = RangeTable.load(alone)
    elements = merged.frame.filter(pl.col("kind") == "input")["elements"].item()
    assert elements == ROWS * 4 - BATCH * 4
    weights = pl.col("kind") == "parameter"
    assert merged.frame.filter(weights).equals(whole.frame.filter(weights), null_equal=True)


def test_the_same_command_again_finishes_it(base: Path, lost: dict[str, Any], alone: Path) -> None:
    assert lost["again"]["codes"] == [0, 0], lost["again"]["err"]
    assert "going on after 4 batches" in lost["again"]["err"][0]
    equal(RangeTable.load(base / "lost/ranges.parquet"), RangeTable.load(alone))


def test_what_a_run_of_more_processes_left_goes_when_all_is_measured(
    base: Path, make_job: Any, run_forked: Any
) -> None:
    path = job(make_job, base, "fewer", f'folder = "rows"\nbatch_size = {BATCH}')
    kill = {"rank": 1, "phase": "running", "batch": 2}
    killed, alone = run_forked([{"job": path, "world": 2, "kill": kill}, {"job": path}])
    assert killed["codes"] == [1, -signal.SIGKILL]
    assert alone["codes"] == [0], alone["err"]
    assert not list((base / "fewer/checkpoints").iterdir())


def test_the_same_process_twice_is_not_merged(alone: Path, tmp_path: Path, capsys: Any) -> None:
    ranges = str(alone)
    assert _run(["merge", ranges, ranges, "-o", str(tmp_path / "r.parquet")]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_torchrun_runs_a_job(base: Path, make_job: Any) -> None:
    """The real launcher, with the real command; the first process alone speaks."""
    path = job(make_job, base, "torchrun", f'folder = "rows"\nbatch_size = {BATCH}', held_out=0.2)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "calibcast", "run", path,
         "--log-format", "json"],
        capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / ".package"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("calibrate ") == 1
    manifest = json.loads((base / "torchrun/manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["run"]["processes"] == 2
    assert manifest["stages"]["calibrate"]["result"]["batches"] == 5  # of seven two are held out
