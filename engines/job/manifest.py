"""The manifest: what each stage was made from, what it made, and whether the result can be trusted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calibcast.calib.artifacts import load_json, parsed, save_json
from calibcast.calib.errors import ArtifactError, StorageError
from calibcast.calib.sealed_files import files_under
from calibcast.engines.job.folder import MANIFEST

_KIND = "job"
# running: not to be trusted yet. rejected: a gate said no. done: everything in it belongs together.
STATUSES = ("running", "done", "rejected", "failed", "stopped")


@dataclass(frozen=True)
class Record:
    """One stage: fingerprints of its inputs, its settings, digests of the files that it wrote, and its result."""

    inputs: dict[str, str]
    settings: dict[str, Any]
    files: dict[str, str]
    result: dict[str, Any]
    seconds: float
    finished: str


@dataclass
class Manifest:
    """The manifest of a folder: as it is on disk, or as it will be written."""

    folder: Path
    status: str = "running"
    reason: str = ""
    job: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """The manifest of `folder`; None when there is none. Raises ArtifactError for a damaged file, or one of another
        kind."""
        path = folder / MANIFEST
        if not path.exists():
            return None
        try:
            return cls._read(folder, path)
        except ArtifactError as error:
            raise StorageError(f"{error}. `calibcast run --redo` makes everything again.") from error

    @classmethod
    def _read(cls, folder: Path, path: Path) -> Manifest:
        found = load_json(path, _KIND)
        with parsed(path, _KIND):
            if found["status"] not in STATUSES:
                raise ArtifactError(f"{path}: unknown status {found['status']!r}; known: {', '.join(STATUSES)}")
            stages = {name: Record(**record) for name, record in found["stages"].items()}
            return cls(folder, found["status"], found["reason"], found["job"], found["run"], stages)

    def save(self) -> None:
        """Write the manifest, whole or not at all."""
        content = {name: value for name, value in asdict(self).items() if name != "folder"}
        save_json(self.folder / MANIFEST, _KIND, content)

    def why(self, stage: str, inputs: Mapping[str, str], settings: Mapping[str, Any], artifacts: Iterable[str]) -> str:
        """Why `stage` must run; empty when its earlier results are still valid."""
        record = self.stages.get(stage)
        if record is None:
            return "not made yet"
        changed = [name for name in [*inputs, *record.inputs] if inputs.get(name) != record.inputs.get(name)]
        if changed:
            return f"{' and '.join(dict.fromkeys(changed))} changed"
        for name in [*settings, *record.settings]:
            if settings.get(name) != record.settings.get(name):
                return f"{name} changed from {record.settings.get(name)!r} to {settings.get(name)!r}"
        return self._damage(record, artifacts)

    def _damage(self, record: Record, artifacts: Iterable[str]) -> str:
        found: dict[str, str] = {}
        for artifact in artifacts:
            found |= files_under(self.folder / artifact, self.folder)
        for name, digest in record.files.items():
            if name not in found:
                return f"{name} is missing"
            if found[name] != digest:
                return f"{name} was changed after it was made"
        more = sorted(set(found) - set(record.files))
        return f"{more[0]} is not one of its files" if more else ""
