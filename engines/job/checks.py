"""Checks that run before the first stage, so that a typo in the last stage's settings does not waste hours of work."""

from __future__ import annotations

from typing import Any

import torch
from calibcast.calib.errors import BuildError, PlanError
from calibcast.engines.backends import chosen
from calibcast.engines.job.errors import JobError
from calibcast.engines.job.job_file import JobFile
from calibcast.engines.job.settings import Build
from calibcast.engines.locations import load_function
from calibcast.passes.regions import candidates
from calibcast.passes.settings import Settings, low_type_of
from torch.export import ExportedProgram

# Arguments of `build` that are not keys of [build] but are allowed in its settings; all other settings are the
# backend's.
_OF_BUILD = {"isolate", "cache", "cache_size"}
_OF_THE_JOB = {"mixed", "plan", "ranges", "progress"}


def check_job(file: JobFile, program: ExportedProgram, processes: int = 1) -> None:
    """Check for every stage what can be checked without data: functions, patterns, settings, the backend, the device.

    processes: how many processes share the batches. Raises JobError or LocationError for a mistake in the job file,
    BuildError for a backend that cannot be used here.
    """
    job = file.job
    if job.calibration.carry_state and processes > 1:
        raise JobError(
            f"{file.path}: [calibration] carry_state = true runs the batches one after another, and {processes} "
            "processes would share them out: start one"
        )
    for location in job.verification.metrics.values():
        load_function(file.function(location))
    rules = [load_function(file.function(location)) for location in job.plan.rules]
    apart = {"rules", "low_precision_type", "rescale", "min_sqnr_db", "prove_batches"}
    arguments = job.plan.model_dump(exclude=apart)
    try:
        low_type = low_type_of(job.plan.low_precision_type)
        Settings(rules=rules, **arguments).judge(candidates(program), None, low_type)
    except PlanError as error:
        raise JobError(f"{file.path}: [plan] {error}") from error
    if job.calibration.device is not None:
        _check_device(file, job.calibration.device)
    _check_build(file, job.build)


def _check_device(file: JobFile, device: str) -> None:
    try:
        torch.device(device)
    except RuntimeError as error:
        raise JobError(f"{file.path}: [calibration] device {device!r}: give cpu, cuda or cuda:1") from error


def _check_build(file: JobFile, asked: Build) -> None:
    for name in asked.settings:
        if name in Build.model_fields:
            raise JobError(f"{file.path}: [build] settings: {name!r} is a key of [build] itself: set it there")
        if name in _OF_THE_JOB:
            raise JobError(f"{file.path}: [build] settings: {name!r} cannot be set here, the job gives it")
    backend, _ = chosen(asked.backend, asked.ahead_of_time)
    backend.require(asked.ahead_of_time)
    own: dict[str, Any] = {name: value for name, value in asked.settings.items() if name not in _OF_BUILD}
    if own:
        try:
            backend.check_settings(own, asked.ahead_of_time)
        except BuildError as error:
            raise JobError(f"{file.path}: [build] settings: {error}") from error
