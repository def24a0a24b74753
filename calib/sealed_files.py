"""Files that a manifest lists with their SHA-256, checked before they are parsed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibcast.calib.errors import ArtifactError, ChangedFileError
from calibcast.calib.file_kinds import kind_of


def files_under(path: Path, base: Path) -> dict[str, str]:
    """SHA-256 of the file at `path`, or of every file below it, by path relative to `base`; empty where none is."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {file.relative_to(base).as_posix(): sha256(file) for file in files}


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_plain(name: Any, said_by: Path | str) -> str:
    """`name` itself, when it is a relative path that stays below its folder; else ArtifactError naming `said_by`."""
    parts = name.split("/") if isinstance(name, str) else [""]
    odd = any(part in ("", ".", "..") or "\\" in part or "\0" in part or ":" in part for part in parts)
    if odd or not name.isprintable():
        raise ArtifactError(f"{said_by} names the file {name!r}: only plain names inside its folder are allowed")
    return str(name)


def check_plain_part(name: Any, said_by: Path | str) -> str:
    """As `check_plain`, for the name of one file, without folders."""
    if "/" in check_plain(name, said_by):
        raise ArtifactError(f"{said_by} names the file {name!r}: only plain names inside its folder are allowed")
    return str(name)


def check_sealed(folder: Path, files: Any, manifest: Path, only: str | None = None) -> None:
    """Raise unless the files of `folder` are those that `manifest` was written with: `files`, name to SHA-256.

    only: check just this file. Files that the manifest does not list are not checked, so nobody may read them. Raises
    ArtifactError for a missing file or a strange name, ChangedFileError for one that has changed.
    """
    if not isinstance(files, Mapping):
        raise ArtifactError(f"{manifest} lists no hashes of its files: it is of an older calibcast, or was changed")
    if only is not None and only not in files:
        raise ArtifactError(f"{manifest} does not list {only}: it was changed, or {only} was put there by someone else")
    for name, expected in files.items():
        if only is None or name == only:
            _check_one(folder, check_plain(name, manifest), expected, manifest)


def _check_one(folder: Path, name: str, expected: Any, manifest: Path) -> None:
    file = folder / name
    if any(part.is_symlink() for part in (file, *_between(file, folder))):
        raise ArtifactError(f"{file} is a symbolic link: what it points to is no part of {folder}")
    if file.exists() and not file.is_file():  # to open a pipe would wait for ever
        raise ArtifactError(f"{file} cannot be read: it is {kind_of(file)}")
    try:
        found = sha256(file)
    except FileNotFoundError as error:
        raise ArtifactError(f"{file} is missing: no such file, and {manifest.name} lists it") from error
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error
    if found != expected:
        raise ChangedFileError(
            f"{file} is not the {file.stem} that {manifest.name} was written for (truncated, damaged or changed): "
            f"its SHA-256 is {found[:12]}.., and that of the file written was {str(expected)[:12]}... It was not read"
        )


def _between(file: Path, folder: Path) -> list[Path]:
    return [parent for parent in file.parents if parent != folder and parent.is_relative_to(folder)]


def is_special(path: Path) -> bool:
    """Whether a path names a device, a pipe or a socket, which no file may replace."""
    return path.exists() and not (path.is_file() or path.is_dir())


def followed(path: str | os.PathLike[str]) -> Path:
    """Where writing to `path` should go: the target of a symbolic link, which stays a link."""
    target = Path(path)
    return Path(os.path.realpath(target)) if target.is_symlink() else target
