"""Reading a job file: TOML that is checked against the settings. Every mistake is reported with its place and the known
keys."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibcast.calib.errors import known
from calibcast.calib.file_kinds import JOB, wrong_kind
from calibcast.engines.job.errors import JobError
from calibcast.engines.job.keys import model_of, type_words
from calibcast.engines.job.model_list import models_of
from calibcast.engines.job.settings import SOURCES, Job, Source
from pydantic import ValidationError
from pydantic_core import ErrorDetails

# Keys of [data] that have no meaning in [held_out].
_NOT_INHERITED = {"max_batches", "held_out_share"}


@dataclass(frozen=True)
class JobFile:
    """A job as read from `path`. Paths in it are relative to the folder of the file. name: the model's name, in a job
    of several models."""

    path: Path
    job: Job
    name: str | None = None

    @property
    def base(self) -> Path:
        """What paths in the file are relative to."""
        return self.path.resolve().parent

    def local(self, path: str) -> Path:
        """A path given in the file, as a path from here."""
        return self.base / Path(path).expanduser()

    def function(self, location: str) -> str:
        """`file.py:function`, with the file's full path."""
        file, colon, name = location.rpartition(":")
        return f"{self.local(file)}:{name}" if colon else str(self.local(location))


def load_job(path: Path) -> JobFile:
    """Read and check a job file of one model. Raises JobError that lists every mistake."""
    files = load_jobs(path)
    if files[0].name is not None:
        raise JobError(f"{path} is a job of several models ([[models]]); one with a [model] was expected")
    return files[0]


def load_jobs(path: Path) -> tuple[JobFile, ...]:
    """Read and check a job file: one job, or one for each of its [[models]]. Raises JobError that lists every
    mistake."""
    try:
        wrong = wrong_kind(path, JOB) if path.exists() else None
        if wrong is not None:
            raise JobError(wrong)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise JobError(f"{path}: no such file; `calibcast init` writes one") from error
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path} cannot be read: {error}") from error
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{path} is not TOML: {error}") from error
    if "models" not in raw:
        return (_checked(path, raw, text),)
    return tuple(replace(_checked(path, own, text, name), name=name) for name, own in models_of(raw, path))


def _checked(path: Path, raw: dict[str, Any], text: str, name: str = "") -> JobFile:
    try:
        return JobFile(path, Job.model_validate(_with_inherited(raw)))
    except ValidationError as error:
        found = [_mistake(detail, raw, text) for detail in error.errors(include_url=False)]
        mistakes = [mistake for mistake in found if mistake is not None]
        # Report each mistake once, in the order of the file: pydantic reports a union once for each of its members.
        lines = [text for _, text, _ in sorted(mistakes, key=lambda mistake: mistake[0])]
        tables = [_known_keys(table) for _, _, table in mistakes]
        title = f"{path}: the model {name}:" if name else f"{path}:"
        raise JobError("\n  ".join([title, *dict.fromkeys(lines), *dict.fromkeys(tables)])) from error


def _with_inherited(raw: dict[str, Any]) -> dict[str, Any]:
    """[held_out] with the keys that it leaves out taken from [data]; a source of its own replaces that of [data]."""
    held, data = raw.get("held_out"), raw.get("data")
    if not isinstance(held, dict) or not isinstance(data, dict):
        return raw
    names = {_spelt(name) for name in SOURCES}
    dropped = _NOT_INHERITED | (
        names | {"arguments", "config", "revision", "split", "watch"} if names & set(held) else set()
    )
    return {**raw, "held_out": {**{key: value for key, value in data.items() if key not in dropped}, **held}}


def _mistake(detail: ErrorDetails, raw: dict[str, Any], text: str) -> tuple[int, str, str | None] | None:
    """One mistake: its line (0: unknown), what is wrong and where, and the table whose keys to list."""
    path = _keys(detail["loc"])
    table = str(path[0]) if path and path[0] in Job.model_fields else None
    if table == "held_out" and len(path) > 1 and path[1] not in raw["held_out"]:
        return None  # inherited from [data], which reports it
    key = str(path[1]) if table and len(path) > 1 else str(path[0]) if path and not table else None
    line = _line(text, table, key) or 0
    what = _what(detail, table, key, path)
    return line, f"line {line}: {what}" if line else what, table


def _what(detail: ErrorDetails, table: str | None, key: str | None, path: list[int | str]) -> str:
    place = f"[{table}]" if table else "the job"
    where = f"{place} {key}" if key and table else place
    kind, came = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"unknown {'key' if table else 'table'} {key!r} in {place}; {known(str(key), _fields(table))}"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "value_error":
        return f"{where}: {detail['msg'].removeprefix('Value error, ')}"
    if kind in {"model_type", "model_attributes_type"}:
        return f"{where} is a table, but is {came!r} ({_type(came)}) here"
    item = "".join(f"[{part!r}]" for part in path[2:])
    if kind.endswith("_type") and table and key:
        field = next(f for name, f in model_of(table).model_fields.items() if key == (f.alias or name))
        return f"{where} should be {type_words(field.annotation)}; {where}{item} is {came!r} ({_type(came)})"
    return f"{where}{item}: {detail['msg'].replace('Input should', 'should')}, but is {came!r} ({_type(came)})"


def _known_keys(table: str | None) -> str:
    return f"Known {f'keys of [{table}]' if table else 'tables'}: {', '.join(_fields(table))}"


def _keys(location: tuple[int | str, ...]) -> list[int | str]:
    """A location without the names of union members, which pydantic adds after the key."""
    own = [part for part in location[2:] if isinstance(part, int) or not (part == "str" or part.startswith("tuple["))]
    return [*location[:2], *own]


def _fields(table: str | None) -> list[str]:
    """The keys of a table as they are spelt in TOML; without a table, the tables."""
    model = Job if table is None else model_of(table)
    return [item.alias or name for name, item in model.model_fields.items()]


def _spelt(name: str) -> str:
    return Source.model_fields[name].alias or name


def _type(value: Any) -> str:
    names = {str: "a string", bool: "a boolean", int: "an integer", float: "a float", list: "an array", dict: "a table"}
    return names.get(type(value), type(value).__name__)


def _line(text: str, table: str | None, key: str | None) -> int | None:
    """The line of a key, or else of its table; tomllib does not keep line numbers."""
    section: str | None = None
    found = None
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[?\s*([\w.\-]+)", line):
            section = header[1]
            if section.split(".")[0] == (table or key):
                found = found or number
            if key and section == f"{table}.{key}":
                return number
        elif key and section == table and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]", line):
            return number
    return found
