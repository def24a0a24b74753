"""The folder of a job: only one run at a time may use it, and an fsspec store may get a copy of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import fsspec
from calibcast.calib.errors import CalibcastError, StorageError
from calibcast.calib.sealed_files import check_plain
from calibcast.engines.job.job_file import JobFile

MANIFEST = "manifest.json"
RANGES, EARLY, PLAN, FITTED, FITTED_RANGES, MIXED, ENGINE, VERIFICATION = ARTIFACTS = (
    "ranges.parquet", "ranges-early.parquet", "plan.json", "rescaled.pt2", "rescaled.parquet", "mixed.pt2", "engine",
    "verification.json",
)  # fmt: skip
_LOCK, _OWNER = ".lock", ".lock-owner"


@dataclass(frozen=True)
class JobFolder:
    """path: the folder where stages work. url: the fsspec store that gets a copy; None where `path` itself is the
    output."""

    path: Path
    url: str | None = None

    @classmethod
    def of(cls, file: JobFile) -> JobFolder:
        """The folder that a job file names."""
        output = file.job.output
        if "://" not in output.folder:
            return cls(file.local(output.folder))
        if output.folder.startswith("file://"):
            return cls(Path(output.folder.removeprefix("file://")))
        name = hashlib.sha256(output.folder.encode()).hexdigest()[:12]
        scratch = file.local(output.scratch) if output.scratch else file.base / ".calibcast" / name
        return cls(scratch, output.folder.rstrip("/"))

    def __str__(self) -> str:
        return self.url or str(self.path)

    def checkpoint(self, rank: int, world: int) -> Path:
        """The file in which a process saves its running statistics."""
        return self.path / "checkpoints" / f"rank-{rank}-of-{world}.npz"

    def prepare(self) -> None:
        """Make the folder, and check that it can be written to. Raises ArtifactError."""
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StorageError(f"cannot write into {self.path}: {error}. Give a folder that is writable.") from error

    def sweep(self) -> None:
        """Remove temporary files of runs that were killed. Call it only under the lock."""
        for name in (MANIFEST, *ARTIFACTS):
            for left in self.path.glob(f".{name}.*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        for left in (self.path / "checkpoints").glob(".rank-*"):
            left.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock. Raises CalibcastError at once when another run has it; a killed run does not hold
        it."""
        lock = filelock.FileLock(self.path / _LOCK, blocking=False)
        owner = self.path / _OWNER
        try:
            lock.acquire()
        except filelock.Timeout as error:
            who = (owner.read_text() if owner.exists() else "") or "another process"
            raise CalibcastError(
                f"{self} is in use by {who}. Wait for it, or give this job another output folder: two runs on one "
                "folder would mix their artifacts."
            ) from error
        except OSError as error:
            raise StorageError(f"cannot lock {self.path}: {error}") from error
        try:
            # This only tells who holds the lock; on a full disk the lock itself still works.
            with suppress(OSError):
                owner.write_text(
                    f"process {os.getpid()} on {platform.node()}, since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
                )
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()


class Store:
    """The copy of a job's folder on an fsspec store. Files are written one by one, the manifest last."""

    def __init__(self, url: str, folder: Path) -> None:
        self._folder = folder
        with _told(url):
            self._system, self._root = fsspec.core.url_to_fs(url)
        self._url = url
        self._seen = self._manifest()

    def pull(self) -> None:
        """Copy the artifacts of an earlier run from the store, where this machine has none."""
        if self._seen is None or (self._folder / MANIFEST).exists():
            return
        with _told(self._url):
            for name in _files_of(self._seen):
                target = self._folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if self._system.exists(f"{self._root}/{name}"):
                    self._system.get_file(f"{self._root}/{name}", str(target))
            self._system.get_file(f"{self._root}/{MANIFEST}", str(self._folder / MANIFEST))

    def push(self) -> int:
        """Write the changed files to the store, the manifest last. Returns how many. Raises CalibcastError when another
        run has written there meanwhile."""
        if self._manifest() != self._seen:
            raise CalibcastError(
                f"another run has written to {self._url} since this one began: its artifacts stay. This run's are in "
                f"{self._folder}; start it again."
            )
        ours = json.loads((self._folder / MANIFEST).read_text())
        theirs = _files_of(self._seen) if self._seen is not None else {}
        changed = [name for name, found in _files_of(ours).items() if theirs.get(name) != found]
        with _told(self._url):
            self._system.makedirs(self._root, exist_ok=True)
            for name in changed:
                self.put(name)
            self.put(MANIFEST)
        self._seen = ours
        return len(changed) + 1

    def put(self, name: str) -> None:
        """Write one file of the folder to the store."""
        with _told(self._url):
            self._system.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
            self._system.put_file(str(self._folder / name), f"{self._root}/{name}")

    def fetch(self, name: str) -> None:
        """Copy one file from the store, if the store has it and the folder does not."""
        with _told(self._url):
            if not (self._folder / name).exists() and self._system.exists(f"{self._root}/{name}"):
                self._system.get_file(f"{self._root}/{name}", str(self._folder / name))

    def drop(self, name: str) -> None:
        """Remove one file from the store, if it is there."""
        with _told(self._url):
            if self._system.exists(f"{self._root}/{name}"):
                self._system.rm_file(f"{self._root}/{name}")

    def _manifest(self) -> dict[str, Any] | None:
        with _told(self._url):
            try:
                found: dict[str, Any] = json.loads(self._system.cat_file(f"{self._root}/{MANIFEST}"))
            except FileNotFoundError:
                return None
            return found


def _files_of(manifest: dict[str, Any]) -> dict[str, str]:
    """The artifacts that a manifest lists, with their digests. The names are checked: someone who can write to the
    store must not choose where files go on this machine."""
    listed = {name: found for stage in manifest["stages"].values() for name, found in stage["files"].items()}
    return {check_plain(name, MANIFEST): found for name, found in listed.items()}


@contextmanager
def _told(url: str) -> Iterator[None]:
    try:
        yield
    except CalibcastError:
        raise
    except Exception as error:  # each store raises errors of its own
        raise StorageError(f"{url}: {type(error).__name__}: {error}") from error
