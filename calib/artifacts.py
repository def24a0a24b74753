"""Artifact files: written whole or not at all, with a header that says what kind of file it is."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibcast.calib.errors import ArtifactError, StorageError, cause_of, first_line
from calibcast.calib.file_kinds import PROGRAM_FILE, json_kind, require_file, wrong_kind
from calibcast.calib.pt2.serialiser import serialising
from calibcast.calib.seal import UNSEALED, sealed
from calibcast.calib.sealed_files import followed, is_special

# Functions that handle programs import torch themselves: it takes seconds, and reading a table does not need it.
if TYPE_CHECKING:
    import polars as pl
    import torch

_log = logging.getLogger("calibcast")
SCHEMA_VERSION = 1


def versions() -> dict[str, str]:
    """The versions that an artifact was made with."""
    import torch

    try:
        own = metadata.version("calibcast")
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        own = "unknown"
    return {"calibcast": own, "torch": torch.__version__}


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`, and rename it to `path` only when the block ends without an error.

    A symbolic link stays a link: the file that it points to is written. A device or a pipe stays one, too: it gets the
    content. Raises StorageError when the folder is missing or not writable.
    """
    target = followed(path)
    special = is_special(target)
    try:
        folder = None if special else target.parent or Path(".")
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=folder)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error}. Give a folder that exists and is writable.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if special:
            _pour(temporary, target)
            return
        # mkstemp makes files private; others must be able to read an artifact.
        os.chmod(temporary, _usual_mode(target.parent))
        os.replace(temporary, target)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _pour(source: Path, target: Path) -> None:
    """Write the content of a file into a device or a pipe. A pipe that nobody reads is an OSError: it is not waited
    for."""
    handle = os.open(target, os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(handle, True)
    with open(handle, "wb") as stream, source.open("rb") as content:
        shutil.copyfileobj(content, stream)


def _usual_mode(folder: Path) -> int:
    """The mode that a new file in `folder` gets. It is read from a new file, since reading the umask means changing it
    for all threads.
    """
    probe = folder / f".{uuid.uuid4().hex}"
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()


def save_json(path: str | os.PathLike[str], kind: str, content: dict[str, Any]) -> None:
    """Write `content` as a JSON artifact of `kind`."""
    document = {"calibcast": kind, "schema": SCHEMA_VERSION, "versions": versions(), **content}
    # `allow_nan` stays on: an infinite limit is a valid setting, and json reads back what it wrote.
    text = json.dumps(document, indent=1)
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_json(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read a JSON artifact of `kind`. Raises ArtifactError for anything else."""
    source = Path(path)
    if source.exists() and not source.is_file():  # to open a pipe would wait for ever
        raise ArtifactError(str(wrong_kind(source, json_kind(kind))))
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{source}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bytes, syntax, numbers of thousands of digits
        told = wrong_kind(source, json_kind(kind))
        raise ArtifactError(
            told or f"{source} is not a readable {kind} file (truncated or foreign): {error}"
        ) from error
    check_header(document if isinstance(document, dict) else {}, kind, source)
    return dict(document)


def check_header(header: dict[str, Any], kind: str, source: Path) -> None:
    """Raise ArtifactError unless `header` says that it is a `kind` of this schema version."""
    found, schema = header.get("calibcast"), header.get("schema")
    if found is None:
        raise ArtifactError(f"{source} was not written by calibcast (no calibcast header); expected a {kind} file")
    if found != kind:
        raise ArtifactError(f"{source} is a calibcast {found} file; expected a {kind} file")
    if not isinstance(schema, int) or schema != SCHEMA_VERSION:
        age = "a newer" if isinstance(schema, int) and schema > SCHEMA_VERSION else "another"
        raise ArtifactError(
            f"{source} was written by {age} calibcast (schema {schema}; this one reads {SCHEMA_VERSION}). "
            "Upgrade calibcast, or make the file again with this version."
        )


@contextmanager
def parsed(source: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Turn an error raised while the fields of an artifact are read into an ArtifactError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        article = "an" if kind[:1] in "aeiou" else "a"
        raise ArtifactError(
            f"{source} claims to be {article} {kind} file, but cannot be read as one: {error!r}"
        ) from error


def load_program(path: str | os.PathLike[str], trusted: bool = False) -> torch.export.ExportedProgram:
    """Load a `.pt2` file, after checking everything in it that could run code (`calib.pt2`).

    trusted: a process of this user has just written it where nobody else can write; it is not checked.
    Raises ArtifactError when it is missing, truncated, not a program, or needs more than tensors and plain containers.
    """
    source = Path(path)
    if not source.exists():
        raise ArtifactError(f"{path}: no such file; expected a .pt2 written by torch.export.save")
    require_file(source, PROGRAM_FILE)
    from calibcast.calib.pt2.loading import load_checked
    from calibcast.calib.pt2.refusal import RefusedError

    try:
        with serialising():
            return load_checked(source, trusted)
    except RefusedError as error:
        raise ArtifactError(
            f"{path} is not loaded, since loading it could run code or take any amount of memory: {error}"
        ) from error
    except Exception as error:  # torch.load passes on any error of its zip reader and deserialiser
        import torch
        from calibcast.calib.pt2.containers import unknown_classes

        if classes := unknown_classes(source):
            raise ArtifactError(
                f"{path} takes or gives {', '.join(classes)}, which this process does not know. Import the module that "
                "defines it first; on the command line give a file.py:function that imports it and returns the program."
            ) from error
        raise ArtifactError(
            f"{path} cannot be loaded as an exported program (truncated, foreign, or of another torch; this is "
            f"torch {torch.__version__}){_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """What torch says, but where it only points to its own log, which is kept out."""
    return "" if "warnings above" in str(error) else f": {type(error).__name__}: {first_line(error)}"


def save_program(program: torch.export.ExportedProgram, path: str | os.PathLike[str], checked: bool = True) -> None:
    """Save a program as `.pt2`, whole or not at all. Raises ArtifactError for one that torch cannot write, or not read.

    checked: also look at what was written as `load_program` does, and warn where it will be refused.
    """
    import torch
    from calibcast.calib.pt2.check import check_program_file
    from calibcast.calib.pt2.containers import why_not_saved, without_odd_examples
    from calibcast.calib.pt2.refusal import RefusedError

    if (why := why_not_saved(program)) is not None:
        raise ArtifactError(f"the program cannot be saved: {why}")
    program = without_odd_examples(program)
    # torch.export.save warns if a file name does not end in .pt2. The temporary name does not; a stream has none.
    with serialising(), written_whole(path) as temporary:
        with _Patient(io.FileIO(temporary, "wb")) as stream:
            try:
                torch.export.save(program, stream)
            except Exception as error:  # torch's serialiser raises whatever it meets: KeyError, NotImplementedError, ..
                stream.error = stream.error or _unwritten(error)
            if stream.error is not None:
                raise stream.error
        try:
            if checked:
                check_program_file(temporary)
        except RefusedError as error:
            _log.warning("the program is saved, but calibcast will refuse to load it: %s", error)


def _unwritten(error: Exception) -> ArtifactError:
    cause = cause_of(error)
    return ArtifactError(f"the program cannot be saved: torch raises {type(cause).__name__}: {first_line(cause)}")


class _Patient(io.BufferedWriter):
    """A file that holds back the error of a full disk until torch's writer has finished.

    If `write` raises, torch's writer ends the process: its destructor writes again, and that exception is not caught.
    """

    error: Exception | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def seek(self, offset: int, whence: int = 0) -> int:
        return super().seek(offset, whence) if self.error is None else offset


def save_frame(path: str | os.PathLike[str], frame: pl.DataFrame, metadata: dict[str, str] | None = None) -> None:
    """Write a frame as Parquet with a checksum (`calib.seal`), whole or not at all."""
    # Write to memory first: on a full disk, polars raises errors of its own, of several types.
    buffer = io.BytesIO()
    frame.write_parquet(buffer, metadata={**(metadata or {}), **UNSEALED})
    with written_whole(path) as temporary:
        temporary.write_bytes(sealed(buffer.getvalue()))
