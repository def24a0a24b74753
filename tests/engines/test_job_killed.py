"""A job that is killed with SIGKILL goes on with the same command, and its table is that of an uninterrupted run.

What is covered: SIGKILL in each of twelve batches between the first and the last, twice in each, at the very place in
the code, in five phases of a batch; and at moments that only the clock chooses. One process on the CPU, one thread. Not
covered: a power cut, for which checkpoints are synced to the disk before they are renamed.
"""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from calibcast.calib import RangeTable
from calibcast.calib.checkpoint import Checkpoint
from calibcast.engines.locations import load_model

BATCHES, EVERY = 14, 3
PHASES = ("loading", "running", "merging", "writing", "written")
# Two phases in each batch, another two in the next.
POINTS = [(PHASES[(2 * batch + turn) % 5], batch) for batch in range(2, BATCHES) for turn in (0, 1)]
CALIBRATION = f"checkpoint_batches = {EVERY}\ncheckpoint_seconds = 1e9"
DATA = 'folder = "../rows"\nbatch_size = 2\ntransform = "functions.py:note"\nheld_out_share = 0.0'
MODEL = 'location = "../net.pt2"'


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, make_job: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("killed")
    make_job(folder, 2 * BATCHES)  # the rows, and the functions of which one gives the model
    torch.export.save(load_model(f"{folder}/functions.py:model"), folder / "net.pt2")
    return folder


def scenario(make_job: Any, folder: Path, **more: Any) -> dict[str, Any]:
    if not folder.exists():
        (folder / "rows").mkdir(parents=True)  # not needed: the data are one folder up
        # No proof of the plan: it would read calibration batches again, and here every reading is counted.
        make_job(folder, model=MODEL, calibration=CALIBRATION, data=DATA, plan="prove_batches = 0")
    return {"job": str(folder / "job.toml"), "environment": {"NOTES": str(folder / "notes")}, **more}


@pytest.fixture(scope="module")
def whole(base: Path, make_job: Any, run_forked: Any) -> RangeTable:
    """What a run that nobody disturbs measures."""
    (outcome,) = run_forked([scenario(make_job, base / "whole")])
    assert outcome["codes"] == [0], outcome["err"]
    assert transformed(base / "whole") == list(range(BATCHES))
    return RangeTable.load(base / "whole/out/ranges.parquet")


@pytest.fixture(scope="module")
def outcomes(base: Path, make_job: Any, run_forked: Any, when_asked: Any) -> dict[tuple[str, int], Any]:
    """Each kill point: the run that was killed, and the same command again."""

    def run(point: tuple[str, int]) -> list[dict[str, Any]]:
        phase, batch = point
        folder, kill = base / f"{phase}-{batch}", {"phase": phase, "batch": batch}
        found: list[dict[str, Any]] = run_forked([scenario(make_job, folder, kill=kill), scenario(make_job, folder)])
        return found

    made: dict[tuple[str, int], Any] = when_asked(run)
    return made


def transformed(folder: Path) -> list[int]:
    """The batches that went into the model's inputs, in turn, over all runs in a folder."""
    return [int(line) // 2 for line in (folder / "notes").read_text().split()]


def finished_before(phase: str, batch: int) -> int:
    """How many batches the last checkpoint holds when the `batch`-th is killed in `phase`."""
    if phase in {"loading", "running", "merging"}:
        return (batch - 1) // EVERY * EVERY
    due = -(-batch // EVERY) * EVERY  # the next one to be written, at this batch or later
    due = min(due, BATCHES)  # the last one comes at the end
    return due if phase == "written" else (due - 1) // EVERY * EVERY


@pytest.mark.parametrize(("phase", "batch"), POINTS)
def test_killed_and_started_again_gives_the_table_of_an_uninterrupted_run(
    phase: str, batch: int, base: Path, whole: RangeTable, outcomes: Any
) -> None:
    killed, resumed = outcomes[phase, batch]
    assert killed["codes"] == [-signal.SIGKILL]
    assert resumed["codes"] == [0], resumed["err"]
    folder = base / f"{phase}-{batch}"
    table = RangeTable.load(folder / "out/ranges.parquet")
    assert table.frame.equals(whole.frame, null_equal=True)
    assert table.calibration == whole.calibration
    assert (folder / "out/ranges.parquet").read_bytes() == (base / "whole/out/ranges.parquet").read_bytes()
    # Only what came after the last checkpoint is done again: never as much as the distance between two.
    kept = finished_before(phase, batch)
    begun = batch if phase in {"loading", "running", "merging"} else min(-(-batch // EVERY) * EVERY, BATCHES)
    redone = [number for number, times in Counter(transformed(folder)).items() if times > 1]
    assert redone == list(range(kept, begun))
    assert len(redone) <= EVERY
    assert not list((folder / "out/checkpoints").iterdir())
    assert not [path.name for path in (folder / "out").iterdir() if path.name.startswith(".ranges")]


def test_the_kill_points_are_between_the_first_and_the_last_batch() -> None:
    assert len(POINTS) >= 20
    assert {batch for _, batch in POINTS} == set(range(2, BATCHES))
    assert {phase for phase, _ in POINTS} == set(PHASES)


def test_killed_at_any_moment_the_clock_chooses(base: Path, make_job: Any, run_forked: Any, whole: RangeTable) -> None:
    """Wherever SIGKILL falls, also in export, plan or build: in the end the same table, and no batch done thrice."""
    folder = base / "clock"
    runs = [scenario(make_job, folder, after=0.5 + 0.25 * number) for number in range(8)]
    for run in runs:
        run["environment"] = {**run["environment"], "SLOW": "0.05"}
    *killed, last = run_forked([*runs, scenario(make_job, folder)])
    assert last["codes"] == [0], last["err"]
    assert {code for run in killed for code in run["codes"]} <= {0, -signal.SIGKILL}
    assert -signal.SIGKILL in [run["codes"][0] for run in killed]
    table = RangeTable.load(folder / "out/ranges.parquet")
    assert table.frame.equals(whole.frame, null_equal=True)
    assert table.calibration == whole.calibration


POLITE = [(name, phase) for name in ("SIGTERM", "SIGINT") for phase in ("loading", "running", "merging")]


@pytest.mark.parametrize(("name", "phase"), POLITE)
def test_a_polite_signal_leaves_a_checkpoint_of_every_finished_batch(
    name: str, phase: str, base: Path, whole: RangeTable, make_job: Any, run_forked: Any
) -> None:
    folder, kill = base / f"{name}-{phase}", {"phase": phase, "batch": 8, "signal": name}
    (outcome,) = run_forked([scenario(make_job, folder, kill=kill)])
    position = Checkpoint.load(folder / "out/checkpoints/rank-0-of-1.npz").position
    assert outcome["codes"] == [{"SIGTERM": 143, "SIGINT": 130}[name]], outcome["err"]
    assert "Traceback" not in outcome["err"][0]
    assert "the same command goes on from here" in outcome["err"][0]
    # In the loader nothing of the eighth is measured yet; inside it, the signal waits until it is whole.
    assert position == (7 if phase == "loading" else 8)
    (resumed,) = run_forked([scenario(make_job, folder)])
    assert resumed["codes"] == [0], resumed["err"]
    assert f"going on after {position} batches" in resumed["err"][0]
    assert RangeTable.load(folder / "out/ranges.parquet").frame.equals(whole.frame, null_equal=True)
    redone = [n for n, times in Counter(transformed(folder)).items() if times > 1]
    assert redone == ([7] if phase == "loading" else [])
