"""Engines kept between builds, under a key that holds everything that an engine depends on.

    CACHE/KEY/          what a build wrote, and entry.json with the SHA-256 of every file
    CACHE/KEY.lock      held while KEY is being built or removed
    CACHE/.new-KEY-*    an entry that is being written, under KEY's lock

Only its owner may read or write the folder. A damaged or changed entry is treated as missing. Two processes that want
the same engine build it once: the second waits for the first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from calibcast.calib.artifacts import load_json, parsed, save_json
from calibcast.calib.errors import ArtifactError, CalibcastError
from calibcast.calib.sealed_files import check_plain, check_sealed, files_under
from filelock import FileLock, Timeout

_log = logging.getLogger("calibcast")
_ENTRY, _KIND, _VERSION = "entry.json", "cached engine", 5
_UNFINISHED = ".new-"
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
    """Finished engines on disk. When they take more than `size` bytes, the least recently used are removed."""

    def __init__(self, folder: Path, size: int = DEFAULT_SIZE) -> None:
        self.folder, self.size = folder, size

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold `key`: nobody else builds, reads or removes its entry meanwhile. Waits while another process holds
        it."""
        try:
            _private(self.folder)
        except OSError as error:
            raise ArtifactError(
                f"cannot use the engine cache {self.folder}: {error}. Set CALIBCAST_CACHE, or pass cache=False."
            ) from error
        with FileLock(self._lock(key), mode=0o600):
            yield

    def find(self, key: str, target: Path) -> Mapping[str, Any] | None:
        """Copy the entry of `key` to `target` and return its record; None where there is no intact entry.

        A damaged entry is removed. Call it with the key locked.
        """
        entry = self.folder / key
        if not entry.is_dir():
            return None
        try:
            content = load_json(entry / _ENTRY, _KIND)
            with parsed(entry / _ENTRY, _KIND):
                record: Mapping[str, Any] = content["record"]
                _copy(entry, content["files"], target)
            # Check the copy, not the entry: the copy is what will be read, and nobody else can change it.
            check_sealed(target, content["files"], entry / _ENTRY)
        except (CalibcastError, OSError) as error:
            _log.warning("the cached engine %s is damaged (%s) and is built again", key[:12], error)
            shutil.rmtree(entry, ignore_errors=True)
            emptied(target)
            return None
        with suppress(OSError):
            os.utime(entry)  # the entry's time says when it was last used
        return record

    def keep(self, key: str, source: Path, record: Mapping[str, Any]) -> None:
        """Put the files of `source` under `key`, all or none, and remove old entries when the cache is over its size.

        A failure here is only logged: the engine has been built, and the next build of it will just take as long again.
        Call it with the key locked.
        """
        try:
            self._put(key, source, record)
            self._trim(key)
        except (OSError, shutil.Error, ArtifactError) as error:  # such as a full disk: the engine is built, and stays
            _log.warning("the engine %s was built, but is not kept in the cache %s: %s", key[:12], self.folder, error)

    def renew(self, key: str, record: Mapping[str, Any]) -> None:
        """Replace the record of an entry. A failure is only logged, as in `keep`. Call it with the key locked."""
        path = self.folder / key / _ENTRY
        try:
            save_json(path, _KIND, {**load_json(path, _KIND), "record": dict(record)})
        except (OSError, ArtifactError) as error:
            _log.warning("the record of the cached engine %s is not renewed: %s", key[:12], error)

    def _put(self, key: str, source: Path, record: Mapping[str, Any]) -> None:
        temporary = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}{key}-", dir=self.folder))
        try:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
            temporary.chmod(0o700)  # copytree gives it the mode of `source`
            files = files_under(temporary, temporary)
            save_json(temporary / _ENTRY, _KIND, {"files": files, "record": dict(record), "made": time.time()})
            shutil.rmtree(self.folder / key, ignore_errors=True)
            temporary.rename(self.folder / key)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _trim(self, kept: str) -> None:
        self._sweep(kept)
        found = [(_last_used(entry), _size(entry), entry) for entry in self.folder.iterdir() if _is_entry(entry)]
        total = sum(size for _, size, _ in found)
        for _, size, entry in sorted(found, key=lambda item: item[0]):
            if total <= self.size:
                return
            if entry.name != kept and self._removed(entry, entry.name):
                total -= size
        if total > self.size:
            _log.warning("the engine cache holds %.1f GiB, more than its %.1f GiB", total / GIB, self.size / GIB)

    def _sweep(self, kept: str) -> None:
        """Remove half-written entries of killed processes. A process that is still writing an entry holds its key."""
        for left in self.folder.glob(f"{_UNFINISHED}*"):
            key = left.name.removeprefix(_UNFINISHED).partition("-")[0]
            if key == kept:
                shutil.rmtree(left, ignore_errors=True)
            else:
                self._removed(left, key)

    def _removed(self, folder: Path, key: str) -> bool:
        try:
            with FileLock(self._lock(key), timeout=0, mode=0o600):
                shutil.rmtree(folder, ignore_errors=True)
        except Timeout:  # someone is using it
            return False
        return True

    def _lock(self, key: str) -> Path:
        return self.folder / f"{key}.lock"


def emptied(folder: Path) -> None:
    """Empty a folder. Only its owner can read it afterwards, since it will hold weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _private(folder: Path) -> None:
    """Close the folder to everyone but its owner: anyone who can write here chooses what is run. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not hasattr(os, "getuid"):
        return
    found = folder.stat()
    if found.st_uid != os.getuid():
        raise PermissionError(f"it belongs to user {found.st_uid}, and this is user {os.getuid()}")
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)


def _copy(entry: Path, files: Mapping[str, str], target: Path) -> None:
    """Copy the listed files of an entry, and nothing else. Raises ArtifactError for a name that leads out of the
    folder."""
    for name in files:
        source, place = entry / check_plain(name, entry / _ENTRY), target / name
        if source.is_symlink():
            raise ArtifactError(f"{source} is a symbolic link")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
        place.chmod(stat.S_IMODE(source.stat().st_mode))


def _is_entry(folder: Path) -> bool:
    return not folder.name.startswith(".") and (folder / _ENTRY).is_file()


def _last_used(entry: Path) -> float:
    """When the entry was last used; 0 where another process has just removed it."""
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):  # skips what another process has just removed
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_size
    return total
