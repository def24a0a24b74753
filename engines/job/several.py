"""A job of several models: each is a job of its own, in a folder of its own; one manifest and one verdict for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calibcast.calib.artifacts import save_json
from calibcast.calib.errors import CalibcastError, GateError
from calibcast.engines.job.errors import Stopped
from calibcast.engines.job.folder import MANIFEST, JobFolder, Store
from calibcast.engines.job.job_file import JobFile
from calibcast.engines.job.logs import Say
from calibcast.engines.job.manifest import Manifest
from calibcast.engines.job.ranks import Ranks

KIND = "job of several models"
# The worst first: the job's status is the worst status of its models.
_WORST = ("stopped", "failed", "rejected", "running", "done")


def run_several(files: Sequence[JobFile], run_one: Callable[[JobFile], None], say: Say) -> None:
    """Run each model's job, even after one has failed; then write the common manifest and give the verdict.

    Raises GateError when the only failures are gates that said no, CalibcastError for other failures, and Stopped
    without running the other models.
    """
    failed: dict[str, CalibcastError] = {}
    stopped: Stopped | None = None
    for file in files:
        assert file.name is not None
        say(f"model       {file.name}: {file.job.model.location}")
        try:
            run_one(file)
        except CalibcastError as error:
            failed[file.name] = error
            say(f"model       {file.name}: {error}")
        except Stopped as error:
            stopped = error
            break
    _write(files, failed, say)
    if stopped is not None:
        raise stopped
    raise_for(failed)


def raise_for(failed: Mapping[str, CalibcastError]) -> None:
    """Raise one error for those of several models, if there is any: a GateError where all are."""
    if failed:
        text = "; ".join(f"{name}: {error}" for name, error in failed.items())
        gates = all(isinstance(error, GateError) for error in failed.values())
        raise (GateError(text) if gates else CalibcastError(text))


def _write(files: Sequence[JobFile], failed: Mapping[str, CalibcastError], say: Say) -> None:
    """Write the common manifest, in the process that writes artifacts; the others do nothing."""
    if not Ranks.here().first:
        return
    rows = {str(file.name): _row(file, failed.get(str(file.name))) for file in files}
    status = min((row["status"] for row in rows.values()), key=_WORST.index)
    first = JobFolder.of(files[0])
    above = first.path.parent
    above.mkdir(parents=True, exist_ok=True)
    save_json(above / MANIFEST, KIND, {"status": status, "models": rows})
    if first.url is not None:
        Store(first.url.rpartition("/")[0], above).put(MANIFEST)
    say(f"manifest    {status}: {(first.url or str(first.path)).rpartition('/')[0]}/{MANIFEST}")


def _row(file: JobFile, error: CalibcastError | None) -> dict[str, Any]:
    """The manifest's row for one model."""
    folder = JobFolder.of(file)
    found = Manifest.load(folder.path)
    status, reason = ("failed", "") if found is None else (found.status, found.reason)
    if error is not None and status == "done":  # it failed before it could write its own status
        status = "failed"
    return {
        "status": status,
        "reason": reason or ("" if error is None else str(error)),
        "folder": Path(folder.path).name,
        "model": file.job.model.location,
        "stages": {} if found is None else {name: record.result["summary"] for name, record in found.stages.items()},
    }
