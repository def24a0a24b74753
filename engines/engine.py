"""`Engine`: the built engine, what it was built from, and its folder on disk."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch
from calibcast.calib.artifacts import load_json, load_program, parsed, save_frame, save_json, save_program
from calibcast.calib.errors import ArtifactError, MismatchError, StorageError
from calibcast.calib.file_kinds import ENGINE, is_replaceable, require_file
from calibcast.calib.graph_digests import fingerprint
from calibcast.calib.json_types import require_keys, require_types
from calibcast.calib.parquet_size import declared_too_much
from calibcast.calib.program_digests import node_digests, weights_hash
from calibcast.calib.ranges import RangeTable
from calibcast.calib.seal import broken_seal
from calibcast.calib.sealed_files import check_sealed, files_under, followed
from calibcast.engines.backends import backend_named
from calibcast.engines.io_names import name_sizes, size_names
from calibcast.engines.ledger.ledger import empty_ledger, problem_of
from calibcast.engines.monitoring.monitor import Monitor
from calibcast.engines.runtimes import Runtime
from calibcast.passes.plan import PrecisionPlan
from torch.export import ExportedProgram

_KIND = "engine"
_MANIFEST, _PROGRAM, _PLAN, _RANGES = "manifest.json", "program.pt2", "plan.json", "ranges.parquet"
_LEDGER = "ledger.parquet"
_MANIFEST_TYPES: dict[str, Any] = {
    "backend": str,
    "why": str,
    "settings": dict[str, str],
    "built_with": dict[str, str],
    "fingerprint": str,
    "weights": str,
    "plan": str | None,
    "ranges": str | None,
    "files": dict[str, str],
    "build": dict[str, Any] | None,
    "size_names": dict[str, str] | None,
}
_BUILD_TYPES: dict[str, Any] = {
    "remedies": list[str],
    "fallback_to_pytorch": dict[str, str] | None,
    "cache": dict[str, Any] | None,
}
_REQUIRED = ("backend", "why", "settings", "built_with", "fingerprint", "weights", "plan", "ranges")


@dataclass
class _Service:
    """The monitor that watches an engine's calls, if there is one."""

    monitor: Monitor | None = None


@dataclass(frozen=True, eq=False)
class Engine:
    """A built engine. Call it like the model: `engine(*args, **kwargs)` returns the model's own output structure.

    Buffers that the model writes to are the engine's state: each call continues from the one before, `save` keeps the
    state, and `reset` restores its start.

    program: the cast graph that it was built from. plan, ranges: what decided the types, or None. backend, why: the
    backend's name, and why it was chosen. settings: those that `build` was given. versions: of the packages that built
    it. ledger: which engine layer each planned node went into, and its types (`engines.ledger`). record: facts of the
    build: seconds, cache, applied remedies, nodes that run in PyTorch.
    """

    program: ExportedProgram = field(repr=False)
    runtime: Runtime = field(repr=False)
    backend: str
    why: str
    plan: PrecisionPlan | None = field(default=None, repr=False)
    ranges: RangeTable | None = field(default=None, repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    ledger: pl.DataFrame = field(default_factory=empty_ledger, repr=False)
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _service: _Service = field(default_factory=_Service, init=False, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the engine. Raises BatchError for inputs that do not match the model's signature."""
        monitor = self._service.monitor
        return self.runtime(*args, **kwargs) if monitor is None else monitor.run(self.runtime, args, kwargs)

    def monitor(self, every: int = 1000, tolerance: float = 0.1) -> Monitor:
        """Watch the calls from now on, in service: compares inputs and outputs of one call in `every` with the
        calibration.

        It warns once for each cause and tensor: when values leave the calibrated range, become NaN or Inf, or come near
        the largest number of the low type. `report()` has the numbers, `save(path)` writes them as a range table that
        `calibcast diff` compares with the calibration's. An earlier monitor of this engine is stopped.

        Args:
            every: the first call is watched, then one in each `every` calls, at random.
            tolerance: how far beyond the calibrated least and largest value is still accepted, as a share of the
                calibrated peak. The engine's rounding alone can move an output a little beyond them.

        Raises:
            SettingError: `every` below 1, or a negative tolerance.
        """
        self._service.monitor = Monitor(self, every, tolerance)
        return self._service.monitor

    def unwatch(self, monitor: Monitor) -> None:
        """Stop watching, if `monitor` is the one that watches."""
        if self._service.monitor is monitor:
            self._service.monitor = None

    def reset(self) -> None:
        """Reset what the model keeps between calls, such as a KV cache or a counter, to its values when the program was
        exported. Does nothing for a model without state."""
        self.runtime.reset()

    @property
    def device(self) -> torch.device:
        """Where the engine runs, and where its outputs are."""
        return self.runtime.device

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the engine as a folder, completely or not at all: runtime, program, plan, ranges and, last, a manifest.

        Replaces an engine that was saved there before. Raises ArtifactError when the folder holds something else, or
        cannot be written.
        """
        target = followed(folder)
        if target.exists() and not is_replaceable(target):
            raise ArtifactError(f"{target} exists and is no engine folder: choose another, or remove it")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        except OSError as error:
            raise StorageError(f"cannot write {target}: {error}") from error
        try:
            self._write(temporary)
            temporary.chmod(0o755)
            _replace(target, temporary)
        except OSError as error:
            raise StorageError(f"cannot write {target}: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        self.runtime.save(folder)
        save_program(self.program, folder / _PROGRAM)
        if self.plan is not None:
            self.plan.save(folder / _PLAN)
        if self.ranges is not None:
            self.ranges.save(folder / _RANGES)
        save_frame(folder / _LEDGER, self.ledger)
        manifest = {
            "backend": self.backend,
            "why": self.why,
            "settings": {name: repr(value) for name, value in self.settings.items()},
            "built_with": dict(self.versions),
            "build": dict(self.record),
            "size_names": size_names(self.program),  # a .pt2 does not keep them
            "fingerprint": fingerprint(node_digests(self.program)),
            "weights": weights_hash(self.program),
            "plan": None if self.plan is None else self.plan.fingerprint,
            "ranges": None if self.ranges is None else self.ranges.fingerprint,
            "files": files_under(folder, folder),
        }
        save_json(folder / _MANIFEST, _KIND, manifest)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Engine:
        """Read an engine folder.

        Raises ArtifactError when it is incomplete, MismatchError when its parts disagree or it was built for another
        GPU or another version of TensorRT, and BuildError when it needs a GPU and there is none. The SHA-256 of every
        file is checked before the file is parsed.
        """
        source = Path(folder)
        require_file(source, ENGINE)
        manifest = read_manifest(source)
        _check_seal(source, manifest)
        with parsed(source / _MANIFEST, _KIND):
            backend = backend_named(manifest["backend"])
            program = _checked_program(source, manifest)
            return cls(
                program=program,
                runtime=backend.load(source, program, manifest),
                backend=backend.name,
                why=manifest["why"],
                plan=_plan_in(source, manifest),
                ranges=None if manifest["ranges"] is None else RangeTable.load(source / _RANGES),
                settings=manifest["settings"],
                versions=manifest["built_with"],
                ledger=read_ledger(source),
                record=manifest.get("build") or {},
            )


def _check_seal(source: Path, manifest: dict[str, Any]) -> None:
    """Raise unless every file is the one that the manifest was written for. Call it before any file is parsed."""
    check_sealed(source, manifest.get("files"), source / _MANIFEST)
    unlisted = [name for name in _read_by_name(manifest) if name not in manifest["files"]]
    if unlisted:
        check_sealed(source, manifest["files"], source / _MANIFEST, only=unlisted[0])


def _read_by_name(manifest: dict[str, Any]) -> list[str]:
    """Files that `load` reads by a fixed name, so the manifest's list must contain them."""
    wanted = {_PROGRAM: True, _LEDGER: True, _PLAN: manifest.get("plan"), _RANGES: manifest.get("ranges")}
    return [name for name, present in wanted.items() if present]


def read_ledger(folder: str | os.PathLike[str]) -> pl.DataFrame:
    """The ledger in an engine's folder. It does not load the engine, so it needs no GPU.

    Raises ArtifactError when there is none, or it cannot be read.
    """
    source = Path(folder) / _LEDGER
    if not source.is_file():
        raise ArtifactError(f"{source}: no such file; expected an engine written by calibcast build")
    try:
        content = source.read_bytes()
        broken = broken_seal(content)
        if broken is not None:  # damaged bytes can make polars end the process
            raise ValueError(broken)
        manifest = Path(folder) / _MANIFEST
        check_sealed(Path(folder), load_json(manifest, _KIND).get("files"), manifest, only=_LEDGER)
        if (wrong := declared_too_much(content)) is not None:
            raise ValueError(wrong)
        ledger = pl.read_parquet(io.BytesIO(content))
        wrong = problem_of(ledger)
        if wrong is not None:
            raise ValueError(wrong)
        return ledger
    except ArtifactError:
        raise
    except (Exception, pl.exceptions.PanicException) as error:  # a panic is not an Exception
        raise ArtifactError(f"{source} is not a readable ledger (truncated or foreign): {error}") from error


def read_program(folder: str | os.PathLike[str]) -> tuple[ExportedProgram, PrecisionPlan | None]:
    """The cast program in an engine's folder and its plan. It does not load the engine, so it needs no GPU.

    Raises ArtifactError when they cannot be read, MismatchError when they are not what the manifest was written for.
    """
    source = Path(folder)
    manifest = read_manifest(source)
    _check_seal(source, manifest)
    with parsed(source / _MANIFEST, _KIND):
        return _checked_program(source, manifest), _plan_in(source, manifest)


def read_plan(folder: str | os.PathLike[str]) -> PrecisionPlan | None:
    """The plan in an engine's folder; None for an engine without one. It does not load the engine.

    Raises ArtifactError when it cannot be read, or is not what the manifest was written for.
    """
    source = Path(folder)
    manifest = read_manifest(source)
    if manifest.get("plan") is not None:
        check_sealed(source, manifest.get("files"), source / _MANIFEST, only=_PLAN)
    with parsed(source / _MANIFEST, _KIND):
        return _plan_in(source, manifest)


def _checked_program(source: Path, manifest: Mapping[str, Any]) -> ExportedProgram:
    program = load_program(source / _PROGRAM)
    found = fingerprint(node_digests(program))
    if found != manifest["fingerprint"] or weights_hash(program) != manifest["weights"]:
        raise MismatchError(f"{source / _PROGRAM} is not the program that {_MANIFEST} was written for")
    name_sizes(program, manifest.get("size_names") or {})
    return program


def _plan_in(source: Path, manifest: Mapping[str, Any]) -> PrecisionPlan | None:
    return None if manifest["plan"] is None else PrecisionPlan.load(source / _PLAN)


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest in an engine's folder, without loading the engine. Raises ArtifactError."""
    manifest = load_json(Path(folder) / _MANIFEST, _KIND)
    with parsed(Path(folder) / _MANIFEST, _KIND):
        require_types(manifest, _MANIFEST_TYPES)
        require_types(manifest.get("build") or {}, _BUILD_TYPES, "build.")
        require_keys(manifest, _REQUIRED)
    return manifest


def _replace(target: Path, made: Path) -> None:
    """Replace `target` by the folder `made`. If the process is killed in between, the old engine is intact beside
    it."""
    if not target.exists():
        made.rename(target)
        return
    # A folder cannot be renamed onto a folder with files in it. To empty the old one first could lose both in a crash.
    before = made.with_name(f"{made.name}.before")
    target.rename(before)
    made.rename(target)
    shutil.rmtree(before, ignore_errors=True)
