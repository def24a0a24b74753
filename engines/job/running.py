"""`run_job`: runs, in order, the stages that changed, and records the status also when something goes wrong."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from calibcast.calib.artifacts import versions
from calibcast.calib.errors import CalibcastError, GateError
from calibcast.calib.number_text import counted
from calibcast.calib.sealed_files import files_under
from calibcast.engines.backends import start_early
from calibcast.engines.job.checks import check_job
from calibcast.engines.job.errors import Stopped
from calibcast.engines.job.folder import MANIFEST, JobFolder, Store
from calibcast.engines.job.freshness import inputs_of, reason_to_run, unchanged
from calibcast.engines.job.job_file import JobFile, load_jobs
from calibcast.engines.job.logs import Say, tell
from calibcast.engines.job.manifest import Manifest, Record
from calibcast.engines.job.measuring import measure_shard
from calibcast.engines.job.messages import connected, give, tell_all
from calibcast.engines.job.ranks import Ranks
from calibcast.engines.job.several import run_several
from calibcast.engines.job.signals import Signals
from calibcast.engines.job.stage import Stage
from calibcast.engines.job.stages import JobRun
from calibcast.engines.locations import exits_refused

_SAVED = b"saved"


def run_job(path: Path, say: Say, bar: bool = True, redo: bool = False) -> None:
    """Run the job at `path`, of one model or of several. Stages that are up to date are skipped; a killed calibration
    continues.

    Under torchrun, every process calls this; the first one writes the artifacts. `say` gets the results, line by line.

    Raises:
        JobError: the job file is wrong. GateError: a gate said no; the report is written. Stopped: a signal came; a
        checkpoint is written. Other CalibcastErrors: as the stages raise them. Results of finished stages stay.
    """
    files = load_jobs(path)
    if files[0].name is None:
        _run_one(files[0], say, bar, redo)
    else:
        run_several(files, lambda file: _run_one(file, say, bar, redo), say)


def _run_one(file: JobFile, say: Say, bar: bool, redo: bool) -> None:
    """Run the job of one model."""
    ranks, folder = Ranks.here(), JobFolder.of(file)
    with Signals() as signals, connected(ranks):
        folder.prepare()
        store = None if folder.url is None else Store(folder.url, folder.path)
        run = JobRun(file, folder, ranks, signals, bar, store)
        if ranks.first:
            with folder.locked():
                _lead(run, say, redo)
        else:
            with exits_refused():
                _follow(run)


def _lead(run: JobRun, say: Say, redo: bool) -> None:
    """Run the stages in the first process, which writes the artifacts."""
    with exits_refused():
        check_job(run.file, run.program, run.ranks.world)
    run.folder.sweep()
    if run.store is not None:
        run.store.pull()
    manifest = Manifest(run.folder.path) if redo else Manifest.load(run.folder.path) or Manifest(run.folder.path)
    job = {"file": run.file.path.name, "settings": json.loads(json.dumps(run.file.job.model_dump()))}
    try:
        with exits_refused():
            _run_stages(run, manifest, say, job)
    except GateError as error:
        _finish(run, manifest, job, "rejected", str(error))
        raise
    except Stopped as error:
        _try_to_finish(run, manifest, job, "stopped", str(error))
        raise
    except Exception as error:
        _try_to_finish(run, manifest, job, "failed", f"{type(error).__name__}: {error}")
        raise
    _finish(run, manifest, job, "done", "")
    say(f"manifest    {manifest.status}: {run.folder}/manifest.json")


def _run_stages(run: JobRun, manifest: Manifest, say: Say, job: Mapping[str, Any]) -> None:
    stages = run.stages()
    if "build" not in manifest.stages or reason_to_run(manifest, stages[0], set()):
        asked = run.file.job.build
        start_early(asked.backend, asked.ahead_of_time, bool(asked.settings.get("isolate", True)))
    _drop_others(run, manifest, {stage.name for stage in stages}, job)
    for stage in stages:
        why = reason_to_run(manifest, stage, set())
        if stage.name == "calibrate" and not why:
            tell_all(run.ranks)  # nothing to do for the others
        if why:
            _begin(manifest, job)
            tell(f"{stage.name}: {why}", event="stage", stage=stage.name, why=why)
            _clear_remains(run, manifest, stage)
            _do(run, manifest, stage)
        elif changed := stage.restate():
            record = manifest.stages[stage.name]
            manifest.stages[stage.name] = replace(
                record, files=_files_of(run, stage), result={**record.result, **changed}
            )
            manifest.save()
        summary = manifest.stages[stage.name].result["summary"]
        say(f"{stage.name:<12}{', '.join(stage.artifacts)}: {'made' if why else unchanged(manifest, stage)}; {summary}")
        stage.judge(manifest.stages[stage.name].result)


def _begin(manifest: Manifest, job: Mapping[str, Any]) -> None:
    """Mark the manifest as running: until the run ends, the folder's artifacts do not belong together."""
    if manifest.status != "running" or not manifest.run:
        manifest.status, manifest.reason, manifest.job = "running", "", dict(job)
        manifest.run = {
            "id": uuid4().hex,
            "host": platform.node(),
            "process": os.getpid(),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "started": _now(),
            "versions": versions(),
        }
    manifest.save()


def _drop_others(run: JobRun, manifest: Manifest, names: set[str], job: Mapping[str, Any]) -> None:
    """Remove stages that the job no longer has: their files would be mistaken for results of the new run."""
    dropped = {name: manifest.stages.pop(name) for name in list(manifest.stages) if name not in names}
    if dropped:
        _begin(manifest, job)
    for name, record in dropped.items():
        tell(f"{name}: no stage of this job any more; what it made is removed", event="stage", stage=name)
        for file in record.files:
            (run.folder.path / file).unlink(missing_ok=True)
            if run.store is not None:
                run.store.drop(file)


def _clear_remains(run: JobRun, manifest: Manifest, stage: Stage) -> None:
    """Remove an artifact folder that lost its own manifest because a run was killed while replacing it."""
    record = manifest.stages.get(stage.name)
    for artifact in stage.artifacts:
        path = run.folder.path / artifact
        if record is None or not path.is_dir() or (path / MANIFEST).exists():
            continue
        if set(files_under(path, run.folder.path)) <= set(record.files):
            shutil.rmtree(path)


def _do(run: JobRun, manifest: Manifest, stage: Stage) -> None:
    inputs, began = inputs_of(manifest, stage), time.monotonic()
    result = stage.work()
    files = _files_of(run, stage)
    seconds = round(time.monotonic() - began, 3)
    manifest.stages[stage.name] = Record(inputs, dict(stage.settings), files, result, seconds, _now())
    manifest.save()
    if stage.name == "calibrate":
        _drop_checkpoint(run)
        tell_all(run.ranks, _SAVED)


def _files_of(run: JobRun, stage: Stage) -> dict[str, str]:
    files: dict[str, str] = {}
    for artifact in stage.artifacts:
        files |= files_under(run.folder.path / artifact, run.folder.path)
    return files


def _finish(run: JobRun, manifest: Manifest, job: dict[str, Any], status: str, reason: str) -> None:
    """Write the final status, unless the manifest has it already, and copy everything to the store."""
    if (manifest.status, manifest.reason) != (status, reason) or manifest.job != job:
        manifest.status, manifest.reason, manifest.job = status, reason, job
        manifest.run = {**manifest.run, "finished": _now()}
        manifest.save()
    if run.store is not None:
        tell(f"{counted(run.store.push(), 'file')} written to {run.folder.url}")


def _try_to_finish(run: JobRun, manifest: Manifest, job: dict[str, Any], status: str, reason: str) -> None:
    """Write the status after a failure. The failure may be that nothing can be written."""
    try:
        manifest.status, manifest.reason, manifest.job = status, reason, job
        manifest.save()
    except CalibcastError as error:
        tell(f"the manifest cannot be written either: {error}", 40)


def _follow(run: JobRun) -> None:
    """Run a process other than the first: calibrate its share, and nothing else."""
    decided = tell_all(run.ranks)
    if not decided:
        return
    made = measure_shard(run.task(json.loads(decided)), run.signals, bar=False)
    give(made.to_bytes())
    if tell_all(run.ranks) == _SAVED:
        _drop_checkpoint(run)


def _drop_checkpoint(run: JobRun) -> None:
    """Remove the checkpoints after the table is written, also those of a run with another number of processes."""
    own = run.folder.checkpoint(run.ranks.rank, run.ranks.world)
    every = {own, *own.parent.glob("rank-*.npz")} if run.ranks.first else {own}
    for path in every:
        path.unlink(missing_ok=True)
        if run.store is not None:
            run.store.drop(path.relative_to(run.folder.path).as_posix())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
