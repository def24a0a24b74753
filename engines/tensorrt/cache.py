"""Engines kept between builds, under a key that holds everything that an engine depends on.

    CACHE/KEY/          what a build wrote, and entry.json with a hash of every file
    CACHE/KEY.lock      held while KEY is being built or removed

A damaged entry counts as none. Two processes that want the same engine build it once: the second waits for the first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from calibcast.calib.artifacts import load_json, parsed, save_json
from calibcast.calib.errors import ArtifactError
from filelock import FileLock, Timeout

_log = logging.getLogger("calibcast")
_ENTRY, _KIND, _VERSION = "entry.json", "cached engine", 3
_CHUNK = 1 << 22
GIB = 1 << 30
DEFAULT_SIZE = 10 * GIB


def default_folder() -> Path:
    """`$CALIBCAST_CACHE`, else `calibcast/engines` in the user's cache folder."""
    named = os.environ.get("CALIBCAST_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "calibcast" / "engines"


def cache_key(parts: Mapping[str, Any]) -> str:
    """One key from everything that an engine depends on, as plain data: any difference gives another key."""
    text = json.dumps({"version": _VERSION, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


class EngineCache:
    """Finished engines on disk, the least recently used removed when they take more than `size` bytes."""

    def __init__(self, folder: Path, size: int = DEFAULT_SIZE) -> None:
        self.folder, self.size = folder, size

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold `key`: nobody else builds, reads or removes it meanwhile. Waits for who does."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"cannot use the engine cache {self.folder}: {error}. Set CALIBCAST_CACHE, or pass cache=False."
            ) from error
        with FileLock(self._lock(key)):
            yield

    def find(self, key: str, target: Path) -> Mapping[str, Any] | None:
        """Copy the entry of `key` to `target` and give its record; None where there is none that is whole.

        A damaged entry is removed. Call it with the key locked.
        """
        entry = self.folder / key
        if not entry.is_dir():
            return None
        try:
            content = load_json(entry / _ENTRY, _KIND)
            with parsed(entry / _ENTRY, _KIND):
                shutil.copytree(entry, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_ENTRY))
                damaged = [name for name, hash_ in content["files"].items() if _hash(target / name) != hash_]
                record: Mapping[str, Any] = content["record"]
        except (ArtifactError, OSError) as error:
            damaged, record = [str(error)], {}
        if damaged:
            _log.warning("the cached engine %s is damaged (%s) and is built anew", key[:12], ", ".join(damaged))
            shutil.rmtree(entry, ignore_errors=True)
            emptied(target)
            return None
        os.utime(entry)  # its time says when it was last used
        return record

    def keep(self, key: str, source: Path, record: Mapping[str, Any]) -> None:
        """Put the files of `source` under `key`, whole or not at all, and remove what is too much.

        Call it with the key locked.
        """
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
        try:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
            files = {p.relative_to(temporary).as_posix(): _hash(p) for p in temporary.rglob("*") if p.is_file()}
            save_json(temporary / _ENTRY, _KIND, {"files": files, "record": dict(record), "made": time.time()})
            shutil.rmtree(self.folder / key, ignore_errors=True)
            temporary.rename(self.folder / key)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._trim(key)

    def _trim(self, kept: str) -> None:
        entries = sorted(
            (entry.stat().st_mtime, entry) for entry in self.folder.iterdir() if (entry / _ENTRY).is_file()
        )
        sizes = {entry: _size(entry) for _, entry in entries}
        total = sum(sizes.values())
        for _, entry in entries:
            if total <= self.size:
                return
            if entry.name != kept and self._removed(entry):
                total -= sizes[entry]
        if total > self.size:
            _log.warning("the engine cache holds %.1f GiB, more than its %.1f GiB", total / GIB, self.size / GIB)

    def _removed(self, entry: Path) -> bool:
        try:
            with FileLock(self._lock(entry.name), timeout=0):
                shutil.rmtree(entry, ignore_errors=True)
        except Timeout:  # someone is using it
            return False
        return True

    def _lock(self, key: str) -> Path:
        return self.folder / f"{key}.lock"


def emptied(folder: Path) -> None:
    """Remove what is in a folder, which is its owner's alone then: it holds weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _hash(path: Path) -> str:
    total = xxhash.xxh3_128()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                total.update(chunk)
    except FileNotFoundError:
        return ""
    return str(total.hexdigest())
