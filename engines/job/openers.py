"""Opening the data of a job: its source, its fingerprint, and its batches."""

from __future__ import annotations

import glob
import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import xxhash
from calibcast.calib.artifacts import versions
from calibcast.calib.errors import CalibcastError, first_line
from calibcast.calib.number_text import counted
from calibcast.calib.recording import RecordedCalls
from calibcast.engines.job.errors import JobError
from calibcast.engines.job.job_file import JobFile
from calibcast.engines.job.settings import Source
from calibcast.engines.job.sources import Batches, LoaderBatches, RowBatches, StreamBatches, as_it_is
from calibcast.engines.locations import call, load_data, load_function
from torch.utils.data import DataLoader

_BUILDERS = {"parquet": "parquet", "json_lines": "json", "csv": "csv"}


@dataclass(frozen=True)
class OpenedData:
    """batches: the batches of the data. columns: names of the columns, where the source has any. about: a description
    for users."""

    batches: Batches
    columns: tuple[str, ...] | None
    about: str


def fingerprints(file: JobFile, source: Source) -> dict[str, str]:
    """Fingerprints that change when the data, or the way they are read, change. Reads no data."""
    return {"data": _fingerprint(file, source), "how the data are read": _reading(file, source)}


def open_data(file: JobFile, source: Source, rank: int = 0, world: int = 1) -> OpenedData:
    """Open the data that a table of a job file names. Raises JobError for data that do not exist, CalibcastError for
    data that cannot be opened."""
    if source.kind == "loader":
        assert source.loader is not None
        make, sharded = _loader(file, source, rank, world)
        return OpenedData(LoaderBatches(make, sharded), None, f"loader {source.loader}")
    if source.recorded is not None:
        calls: Any = RecordedCalls(_path(file, source.recorded))
        make = partial(DataLoader, calls, batch_size=None, num_workers=source.workers, collate_fn=as_it_is)
        return OpenedData(LoaderBatches(make), None, f"{len(calls)} recorded calls in {source.recorded}")
    with _told(source.kind):
        dataset = _dataset(file, source)
    place = getattr(source, source.kind)
    about = f"{_spelt(source.kind)} {place if isinstance(place, str) else ', '.join(place)}"
    if source.streaming:
        columns = None if dataset.features is None else tuple(dataset.features)
        return OpenedData(StreamBatches(dataset, source.batch_size), columns, f"{about}, streamed")
    batches = RowBatches(dataset.with_format("torch"), source.batch_size, source.workers)
    about = f"{about}, {counted(len(dataset), 'row')} in {counted(batches.length, 'batch')}"
    return OpenedData(batches, tuple(dataset.column_names), about)


def _dataset(file: JobFile, source: Source) -> Any:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        found = _loaded(file, source, datasets)
    finally:
        if shown:
            datasets.enable_progress_bar()
    if isinstance(found, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if source.split not in found:
            raise JobError(f"the data have no split {source.split!r}; there are {', '.join(map(str, found))}")
        found = found[source.split]
    if source.streaming and isinstance(found, datasets.Dataset):
        found = found.to_iterable_dataset()
    if source.shuffle:
        memory = {} if source.streaming else {"keep_in_memory": True}
        found = found.shuffle(seed=source.seed, **memory)
    return found


def _loaded(file: JobFile, source: Source, datasets: Any) -> Any:
    common = {"split": source.split, "streaming": source.streaming}
    if source.folder is not None:
        return datasets.load_from_disk(_path(file, source.folder))
    if source.images is not None:
        return datasets.load_dataset("imagefolder", data_dir=_path(file, source.images), **common)
    if source.hub is not None:
        local = file.local(source.hub)
        name = str(local) if local.is_dir() else source.hub
        return datasets.load_dataset(name, source.config, revision=source.revision, **common)
    files = _files(file, getattr(source, source.kind))
    return datasets.load_dataset(_BUILDERS[source.kind], data_files=files, **common)


def _loader(file: JobFile, source: Source, rank: int, world: int) -> tuple[Callable[[], Any], bool]:
    """A function that makes the user's loader, and whether the loader gives only this process's shard."""
    assert source.loader is not None
    location = file.function(source.loader)
    names = set(inspect.signature(load_function(location)).parameters)
    sharded = {"rank", "world_size"} <= names
    arguments = {**source.arguments, **({"rank": rank, "world_size": world} if sharded else {})}
    if arguments:
        return lambda: call(location, arguments), sharded
    return lambda: load_data(location), sharded


@contextmanager
def _told(kind: str) -> Iterator[None]:
    """Turn what datasets raises into one message."""
    try:
        yield
    except CalibcastError:
        raise
    except Exception as error:  # datasets, pyarrow, fsspec and the hub each raise errors of their own
        why = ", from ".join(f"{type(cause).__name__}: {first_line(cause)}" for cause in _causes(error))
        raise CalibcastError(f"[data] {_spelt(kind)} cannot be opened: {why}") from error


def _causes(error: BaseException) -> list[BaseException]:
    """An error and its causes: the error of `datasets` itself says only that something went wrong."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None and len(found) < 4:
        found.append(cause)
    return found


def _files(file: JobFile, patterns: str | tuple[str, ...]) -> list[str]:
    """Files of paths, globs and URLs, sorted. Raises JobError for a pattern that no file matches."""
    found: list[str] = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if "://" in pattern:
            found.append(pattern)
            continue
        matches = sorted(glob.glob(str(file.local(pattern)), recursive=True))
        if not matches:
            raise JobError(f"{file.path}: no file matches {pattern!r} (looked in {file.base})")
        found.extend(matches)
    return found


def _path(file: JobFile, path: str) -> str:
    if "://" in path or file.local(path).is_dir():
        return path if "://" in path else str(file.local(path))
    raise JobError(f"{file.path}: there is no folder {file.local(path)}")


def _reading(file: JobFile, source: Source) -> str:
    """A digest of how the data are read: settings, and the code of the functions that they name."""
    settings = source.model_dump(mode="json", exclude={"workers", "held_out_share", "max_batches"})
    code = {name: code_digest(file, loc) for name in ("transform", "loader") if (loc := getattr(source, name))}
    return digest(settings, code, versions()["calibcast"])


def _fingerprint(file: JobFile, source: Source) -> str:
    """A digest of the files that the data come from: names, sizes and modification times, much as `make` does."""
    watched = [p for p in _files(file, source.watch)] if source.watch else []
    place = source.folder or source.images or source.recorded
    if place is not None:
        watched += _below(_path(file, place))
    elif source.hub is not None and file.local(source.hub).is_dir():
        watched += _below(str(file.local(source.hub)))
    elif source.kind in _BUILDERS:
        watched += _files(file, getattr(source, source.kind))
    with _told(source.kind):
        return digest([_stamp(path, file.base) for path in watched])


def _below(folder: str) -> list[str]:
    if "://" in folder:
        system, path = fsspec.core.url_to_fs(folder)
        return [system.unstrip_protocol(name) for name in sorted(system.find(path))]
    return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


def _stamp(path: str, base: Path) -> list[Any]:
    """Values that change when a file changes. The name is relative to the job, so that a job can move together with its
    data.
    """
    if "://" in path:
        system, name = fsspec.core.url_to_fs(path)
        return [path, str(system.ukey(name))]
    status = os.stat(path)
    return [os.path.relpath(path, base), status.st_size, status.st_mtime_ns]


def code_digest(file: JobFile, location: str) -> str:
    """A digest of the file in `file.py:function`. Files that it imports are not included."""
    path = Path(file.function(location).rpartition(":")[0])
    try:
        return digest(location, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(f"{file.path}: {location!r}: there is no file {path}") from error


def digest(*values: Any) -> str:
    """A short digest of values that have a JSON form."""
    return str(xxhash.xxh3_128(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest())


def _spelt(kind: str) -> str:
    return "json" if kind == "json_lines" else kind
