"""`plan_job`: says what a run of a job would do, and writes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from calibcast.calib.checkpoint import Checkpoint
from calibcast.calib.errors import ArtifactError, CalibcastError
from calibcast.calib.number_text import counted
from calibcast.engines.job.checks import check_job
from calibcast.engines.job.folder import MANIFEST, JobFolder, Store
from calibcast.engines.job.freshness import reason_to_run, unchanged
from calibcast.engines.job.job_file import JobFile, load_jobs
from calibcast.engines.job.logs import Say
from calibcast.engines.job.manifest import Manifest
from calibcast.engines.job.measuring import counts
from calibcast.engines.job.ranks import Ranks
from calibcast.engines.job.several import raise_for
from calibcast.engines.job.signals import Signals
from calibcast.engines.job.stages import JobRun
from calibcast.engines.locations import exits_refused


def plan_job(path: Path, say: Say) -> None:
    """Report what `run_job` would do, and what is up to date. Writes nothing.

    Raises what stands in the way of a model, after all models were looked at.
    """
    failed: dict[str, CalibcastError] = {}
    for file in load_jobs(path):
        try:
            _plan_one(file, say)
        except CalibcastError as error:
            if file.name is None:
                raise
            failed[file.name] = error
            say(f"model       {file.name}: {error}")
    raise_for(failed)


def _plan_one(file: JobFile, say: Say) -> None:
    if file.name is not None:
        say(f"model       {file.name}")
    folder = JobFolder.of(file)
    with Signals() as signals, exits_refused():
        run = JobRun(file, folder, Ranks(), signals)
        check_job(file, run.program)
        data, _ = run.opened(file.job.data, run.ranks)
        mine, _ = counts(data.batches.length, run.calibration_share)
        say(f"model       {file.job.model.location}: inputs {run.signature}")
        say(f"data        {data.about}{_to(mine, 'calibrate on')}")
        if run.held_out is not None:
            held, _ = run.opened(run.held_out[0], run.ranks)
            number, _ = counts(held.batches.length, run.held_out[1])
            say(f"held out    {held.about}{_to(number, 'verify with')}")
        run.refuse_nothing(data.batches.length)
        say(f"output      {folder}")
        with _there(folder) as path:
            _say_stages(run, Manifest.load(path) or Manifest(path), say)
        for left in sorted((folder.path / "checkpoints").glob("rank-*.npz")):
            say(f"checkpoint  {left.name}: {_described(left, run.made_of())}")


def _to(batches: int | None, what: str) -> str:
    return "" if batches is None else f"; {counted(batches, 'batch')} to {what}"


def _say_stages(run: JobRun, manifest: Manifest, say: Say) -> None:
    stages = run.stages()
    redone: set[str] = set()
    for stage in stages:
        why = reason_to_run(manifest, stage, redone)
        if why:
            redone.add(stage.name)
        verdict = f"would be made: {why}" if why else unchanged(manifest, stage)
        say(f"{stage.name:<12}{', '.join(stage.artifacts)}: {verdict}")
    for name in manifest.stages.keys() - {stage.name for stage in stages}:
        say(f"{name:<12}would be removed: no stage of this job any more")


@contextmanager
def _there(folder: JobFolder) -> Iterator[Path]:
    """The folder with the artifacts that a run would find: the job's folder, or a temporary copy of the store."""
    with TemporaryDirectory(prefix="calibcast-dry-run-") as copy:
        if folder.url is not None and not (folder.path / MANIFEST).exists():
            Store(folder.url, Path(copy)).pull()
            yield Path(copy)
        else:
            yield folder.path


def _described(path: Path, made_of: Mapping[str, str]) -> str:
    try:
        found = Checkpoint.load(path)
    except ArtifactError as error:
        return f"would not be used: {error}"
    difference = found.difference(made_of)
    if difference is not None:
        return f"{counted(found.position, 'batch')}; would not be used alone: {difference} is not the same"
    return f"would go on after {counted(found.position, 'batch')}"
