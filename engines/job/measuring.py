"""The calibration of one process's share of the batches: resumable, and wary of its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibcast.calib.calibration import Run, measure_weights, prepare
from calibcast.calib.checkpoint import Checkpoint, Pace
from calibcast.calib.errors import ArtifactError, BatchError, GateError, MismatchError
from calibcast.calib.loader_order import batch_hash
from calibcast.engines.job.errors import Stopped
from calibcast.engines.job.feed import Item, feed
from calibcast.engines.job.logs import tell
from calibcast.engines.job.progress import Progress
from calibcast.engines.job.settings import Calibration, Limits
from calibcast.engines.job.settling import Early
from calibcast.engines.job.shares import Share
from calibcast.engines.job.signals import Signals
from calibcast.engines.job.sources import Batches, Done
from calibcast.engines.job.trust import DataReport, check_share, refuse_nonfinite
from torch.export import ExportedProgram

# Of a stream nobody knows how long it is, so the share of bad batches is judged after so many.
_ENOUGH_TO_JUDGE = 100


@dataclass(frozen=True)
class Task:
    """What to calibrate, on which batches, how, and where the checkpoint goes.

    made_of: fingerprints of all that decides the numbers. kept: called when a checkpoint was written.
    """

    program: ExportedProgram
    batches: Batches
    share: Share
    transform: Callable[[Any], Any]
    calibration: Calibration
    limits: Limits
    made_of: Mapping[str, str]
    path: Path
    device: str | None = None
    kept: Callable[[Path], None] = lambda path: None


@dataclass
class _State:
    """How far a shard is, beside the statistics."""

    position: int = 0
    last: Any = None  # the batch itself: hashed only when a checkpoint is written
    last_hash: str = ""
    report: DataReport = field(default_factory=DataReport)
    early: Early = field(default_factory=Early)


def measure_shard(task: Task, signals: Signals, bar: bool = True) -> Checkpoint:
    """Measure this process's batches, or go on where a checkpoint at `task.path` ends. Returns the finished checkpoint.

    Raises GateError for data beyond the limits, BatchError for a source that cannot go on, Stopped for a signal;
    the checkpoint is written before any of these.
    """
    settings = task.calibration
    rounding = math.ceil(settings.rounding_batches / task.share.world)
    run = prepare(task.program, task.device, settings.histogram, settings.on_nonfinite, rounding_batches=rounding)
    state = _resumed(task, run)
    mine, every = counts(task.batches.length, task.share)
    _check_raised(state.report, task.limits, every)
    pace = Pace(task.calibration.checkpoint_batches, task.calibration.checkpoint_seconds)
    progress = Progress("calibrate", mine, state.position, bar, quiet=task.share.rank > 0)
    loaded = task.batches.read(task.share, Done(state.position, state.last_hash))
    try:
        for item in feed(loaded, task.transform, run.signature):
            with signals.held():
                _take(task, run, state, item)
                _check_raised(state.report, task.limits, every)
                if pace.tick():
                    _write(task, run, state)
                    pace.reset()
            progress.advance()
    except (Stopped, GateError, BatchError) as error:
        _write(task, run, state)
        tell(f"checkpoint after {state.position} batches: {task.path}", event="checkpoint", batches=state.position)
        if isinstance(error, BatchError):
            error.ranges = run.table() if run.batches else None
        raise
    finally:
        progress.close()
        loaded.close() if hasattr(loaded, "close") else None
    with signals.held():
        return _write(task, run, state)


def counts(length: int | None, share: Share) -> tuple[int | None, int | None]:
    """How many batches this process has, and all together; None where that is unknown."""
    if length is None:
        return None, None
    alone = Share(share.held_out_share, share.held_out, share.most)
    return sum(1 for _ in share.numbers(length)), sum(1 for _ in alone.numbers(length))


def _resumed(task: Task, run: Run) -> _State:
    """Where an earlier run of the same task was, in `run` and in what is returned; or the beginning."""
    found = _found(task)
    if found is not None:
        try:
            run.restore(found)
        except MismatchError as error:
            tell(f"beginning anew: {error}")
            found = None
    if found is None:
        measure_weights(run)
        return _State()
    tell(f"going on after {found.position} batches: {task.path}", event="resumed", batches=found.position)
    report = DataReport.from_json(found.notes["report"])
    return _State(found.position, None, found.last, report, Early(found.early))


def _found(task: Task) -> Checkpoint | None:
    for left in task.path.parent.glob(f".{task.path.name}.*"):  # half-written by a process that was killed
        left.unlink(missing_ok=True)
    if not task.path.exists():
        return None
    try:
        found = Checkpoint.load(task.path)
    except ArtifactError as error:
        tell(f"beginning anew: {error}")
        return None
    difference = found.difference(task.made_of)
    if difference is not None:
        tell(f"beginning anew: {difference} changed since the checkpoint {task.path} was written")
        return None
    return found


def _take(task: Task, run: Run, state: _State, item: Item) -> None:
    """Measure one batch, or note why not."""
    error = item.error
    if error is None:
        nonfinite = state.report.look(item.number, run.signature, item.flat)
        if not nonfinite or task.limits.on_nonfinite_inputs == "warn":
            error = _measured(task, run, item)
        elif task.limits.on_nonfinite_inputs == "stop":
            refuse_nonfinite(f"batch {item.number}", nonfinite)
        else:
            run.skipped.append(item.number)
    if error is not None:
        state.report.note_raised(item.number, error, looked_at=item.error is None)
    state.position += 1
    state.last, state.last_hash = item.batch, ""
    state.early.note(state.position, run.observer.total)


def _measured(task: Task, run: Run, item: Item) -> str | None:
    try:
        run.measure(item.number, list(item.flat))
    except BatchError as error:
        if task.calibration.on_nonfinite == "stop" and run.observer.first_nonfinite() is not None:
            raise GateError(str(error)) from error
        return str(error)
    return None


def _check_raised(report: DataReport, limits: Limits, every: int | None) -> None:
    """Raise GateError as soon as no good batch to come can bring the share of raising ones below its limit."""
    enough = every is not None or limits.max_bad_share == 0 or report.batches >= _ENOUGH_TO_JUDGE
    if enough:
        check_share(report, limits, every)


def _write(task: Task, run: Run, state: _State) -> Checkpoint:
    state.last_hash = state.last_hash or (batch_hash(state.last) if state.last is not None else "")
    notes = {"rank": task.share.rank, "world": task.share.world, "report": state.report.to_json()}
    made = run.checkpoint(
        state.position, dict(task.made_of), state.last_hash, early=dict(state.early.copies), notes=notes
    )
    made.save(task.path)
    task.kept(task.path)
    return made
