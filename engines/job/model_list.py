"""[[models]]: makes the job of each model from one job file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibcast.engines.job.errors import JobError
from calibcast.engines.job.settings import Job, Model, Output

_OF_MODEL = tuple(Model.model_fields)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def models_of(raw: Mapping[str, Any], path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name and raw job of each model: the file's tables, where the model's own keys replace those of the file.

    A model's artifacts go to a folder of its name inside the job's folder. Raises JobError.
    """
    models = raw["models"]
    if "model" in raw:
        raise JobError(f"{path}: has both [model] and [[models]]: put the one model among the others")
    if not isinstance(models, list) or not models or not all(isinstance(one, dict) for one in models):
        raise JobError(f"{path}: [[models]] are tables, one a model: name, location, and tables such as models.data")
    found = [(_name(one, path), one) for one in models]
    names = [name for name, _ in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise JobError(f"{path}: two of [[models]] are called {twice[0]}")
    shared = {key: value for key, value in raw.items() if key != "models"}
    return [(name, _job_of(name, one, shared, path)) for name, one in found]


def _name(model: Mapping[str, Any], path: Path) -> str:
    name = model.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise JobError(
            f"{path}: each of [[models]] has a name of letters, digits, '_', '-' and '.', which its folder gets too; "
            f"got {name!r}"
        )
    return name


def _job_of(name: str, model: Mapping[str, Any], shared: Mapping[str, Any], path: Path) -> dict[str, Any]:
    own = {key: value for key, value in model.items() if key not in {"name", *_OF_MODEL}}
    if unknown := [key for key in own if key not in Job.model_fields]:
        tables = ", ".join(table for table in Job.model_fields if table != "model")
        raise JobError(
            f"{path}: [[models]] {name}: unknown key {unknown[0]!r}; there are name, {', '.join(_OF_MODEL)}, and the "
            f"tables {tables}"
        )
    job: dict[str, Any] = {**shared, **{key: _over(shared.get(key), value) for key, value in own.items()}}
    job["model"] = {key: model[key] for key in _OF_MODEL if key in model}
    output = dict(job.get("output") or {})
    output["folder"] = f"{str(output.get('folder', Output().folder)).rstrip('/')}/{name}"
    if output.get("scratch"):
        output["scratch"] = f"{output['scratch']}/{name}"
    return {**job, "output": output}


def _over(shared: Any, own: Any) -> Any:
    return {**shared, **own} if isinstance(shared, dict) and isinstance(own, dict) else own
