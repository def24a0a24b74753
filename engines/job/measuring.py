"""The calibration of one process's share of the batches. It can be resumed, and it checks its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibcast.calib.calibration_run import Run, measure_weights, prepare
from calibcast.calib.checkpoint import Checkpoint, Pace
from calibcast.calib.errors import ArtifactError, BatchError, GateError, MismatchError
from calibcast.calib.measuring import Keeper, measure_all
from calibcast.engines.job.errors import Stopped
from calibcast.engines.job.feed import Item, feed
from calibcast.engines.job.logs import tell
from calibcast.engines.job.progress import Progress
from calibcast.engines.job.settings import CalibrationTable, Limits
from calibcast.engines.job.settling import Early
from calibcast.engines.job.shares import Share
from calibcast.engines.job.signals import Signals
from calibcast.engines.job.sources import Batches, Done
from calibcast.engines.job.trust import DataReport, check_share, refuse_nonfinite
from torch.export import ExportedProgram

# A stream does not tell its length, so the share of bad batches is first judged after this many batches.
_ENOUGH_TO_JUDGE = 100


@dataclass(frozen=True)
class Task:
    """What to calibrate, on which batches and how, and where the checkpoint goes.

    made_of: fingerprints of everything that the statistics depend on. kept: called after a checkpoint was written.
    """

    program: ExportedProgram
    batches: Batches
    share: Share
    transform: Callable[[Any], Any]
    calibration: CalibrationTable
    limits: Limits
    made_of: Mapping[str, str]
    path: Path
    device: str | None = None
    kept: Callable[[Path], None] = lambda path: None


def measure_shard(task: Task, signals: Signals, bar: bool = True) -> Checkpoint:
    """Measure this process's batches, continuing from a checkpoint at `task.path` if there is one. Returns the final
    checkpoint.

    Raises GateError for data beyond the limits, BatchError for a source that cannot go on, Stopped for a signal;
    the checkpoint is written before any of these.
    """
    settings = task.calibration
    rounding = math.ceil(settings.rounding_batches / task.share.world)
    run = prepare(task.program, task.device, settings.histogram, settings.on_nonfinite, settings.carry_state, rounding)
    shard = _Shard(task, run)
    shard.resume()
    shard.check()
    mine, _ = counts(task.batches.length, task.share)
    progress = Progress("calibrate", mine, shard.keeper.position, bar, quiet=task.share.rank > 0)
    loaded = task.batches.read(task.share, Done(shard.keeper.position, shard.keeper.last_hash))
    try:
        watched = shard.keeper.watched(loaded, lambda one: one.batch)
        items = feed(watched, task.transform, run.signature)
        measure_all(run, shard.counted(items, progress), shard.take, shard.keeper, signals.held)
    except (Stopped, GateError, BatchError):
        shard.keeper.write()
        done = shard.keeper.position
        tell(f"checkpoint after {done} batches: {task.path}", event="checkpoint", batches=done)
        raise
    finally:
        progress.close()
        loaded.close() if hasattr(loaded, "close") else None
    with signals.held():
        return shard.keeper.write()


def counts(length: int | None, share: Share) -> tuple[int | None, int | None]:
    """How many batches this process has, and how many all processes have together; None where that is unknown."""
    if length is None:
        return None, None
    alone = Share(share.held_out_share, share.held_out, share.most)
    return sum(1 for _ in share.numbers(length)), sum(1 for _ in alone.numbers(length))


class _Shard:
    """One process's share: how far it is, and what was noticed about its data."""

    def __init__(self, task: Task, run: Run) -> None:
        self._task, self._run = task, run
        self._report, self._early = DataReport(), Early()
        self._every = counts(task.batches.length, task.share)[1]
        pace = Pace(task.calibration.checkpoint_batches, task.calibration.checkpoint_seconds)
        self.keeper = Keeper(run, task.path, pace, task.made_of, self._notes, task.kept)

    def resume(self) -> None:
        """Continue from the checkpoint of an earlier run of the same task, or start."""
        path = self._task.path
        for left in path.parent.glob(f".{path.name}.*"):  # half-written by a process that was killed
            left.unlink(missing_ok=True)
        if self._task.calibration.carry_state and path.exists():
            tell("starting again: with carry_state, what the batches before have left is not in a checkpoint")
            path.unlink()
        try:
            found = self.keeper.resume()
        except (ArtifactError, MismatchError) as error:
            tell(f"starting again: {error}")
            measure_weights(self._run)
            return
        if found is not None:
            tell(f"going on after {found.position} batches: {path}", event="resumed", batches=found.position)
            self._report, self._early = DataReport.from_json(found.notes["report"]), Early(found.early)

    def take(self, item: Item) -> None:
        """Measure one batch, or note why it cannot be measured."""
        error = item.error
        if error is None:
            nonfinite = self._report.look(item.number, self._run.signature, item.flat)
            if not nonfinite or self._task.limits.on_nonfinite_inputs == "warn":
                error = self._measured(item)
            elif self._task.limits.on_nonfinite_inputs == "stop":
                refuse_nonfinite(f"batch {item.number}", nonfinite)
            else:
                self._run.skipped.append(item.number)
        if error is not None:
            self._report.note_raised(item.number, error, looked_at=item.error is None)
        self._early.note(self.keeper.position + 1, self._run.observer.total)

    def counted(self, items: Iterable[Item], progress: Progress) -> Iterator[tuple[Any, Item]]:
        """Each item with its batch as loaded. Raises GateError when too many batches could not be used."""
        for item in items:
            yield item.batch, item
            self.check()
            progress.advance()

    def check(self) -> None:
        """Raise GateError as soon as the share of failed batches must exceed its limit, even if all later ones are
        good.
        """
        limits = self._task.limits
        if self._every is not None or limits.max_bad_share == 0 or self._report.batches >= _ENOUGH_TO_JUDGE:
            check_share(self._report, limits, self._every)

    def _measured(self, item: Item) -> str | None:
        try:
            self._run.measure(item.number, item.flat)
        except BatchError as error:
            if self._task.calibration.on_nonfinite == "stop" and self._run.observer.first_nonfinite() is not None:
                raise GateError(str(error)) from error
            return str(error)
        return None

    def _notes(self) -> Mapping[str, Any]:
        share = self._task.share
        notes = {"rank": share.rank, "world": share.world, "report": self._report.to_json()}
        return {"early": dict(self._early.copies), "notes": notes}
