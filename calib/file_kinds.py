"""Tell what kind of file a path names, from its first bytes, and refuse one of another kind than the one expected.

It imports neither torch nor polars, and reads little of a file: a wrong file is named at once, whatever its size.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from calibcast.calib.errors import ArtifactError

_HEAD = 4096
_MOST_JSON = 1 << 20  # a JSON document whose header does not come first is parsed up to this size, in bytes
_MOST_TEXT = 16 << 20  # bytes of a file that someone has written by hand
_MOST_NAMES = 64 << 20  # bytes of a zip file's directory, or of a Parquet file's footer
_ZIP_END = 22 + (1 << 16)  # bytes of the last record of a zip file, with the longest comment
_ZIP64 = 56 + 20
_MANIFEST = "manifest.json"
TRUNCATED = "a truncated or damaged"
TABLE, CHECKPOINT, PROGRAM, ZIP = "a range table", "a checkpoint of a calibration", "an exported program", "a zip file"
_PARQUET, _FOLDER, _ENGINE, _PLAN = "a Parquet file", "a folder", "an engine folder", "a plan"
_VERDICT = "a verification report"
_TEXT, _UNKNOWN = "a text file", "of no kind that calibcast knows"
JSON_KINDS = {
    "ranges": TABLE, "plan": _PLAN, "verification": _VERDICT, "engine": "an engine's manifest",
    "job": "a job's manifest", "recorded calls": "a list of recorded calls",
}  # fmt: skip
# The first bytes of files that people confuse with ours.
_MAGIC = {
    b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image", b"GIF8": "a GIF image", b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image", b"BM": "a BMP image", b"RIFF": "an image or a sound (RIFF)",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file", b"ARROW1": "an Arrow file", b"%PDF": "a PDF", b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file", b"\x7fELF": "a binary program or library", b"ftrt": "a TensorRT engine",
    b"ptrt": "a TensorRT engine", b"SQLite": "a SQLite database",
}  # fmt: skip
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_ONNX = re.compile(rb"\x08[\x01-\x20](\x12|\x3a|\x42)")  # ir_version, then producer_name, graph or opset_import
_SAFETENSORS = re.compile(rb".{6}\0\0\{", re.DOTALL)
_JSON_HEADER = re.compile(r'\s*\{\s*"calibcast":\s*"([^"\\]{1,39})"')
_PARQUET_HEADER = re.compile(rb'\{\\?"calibcast\\?": ?\\?"ranges\\?"')


@dataclass(frozen=True)
class Expected:
    """A kind of file that is asked for: its name, and what `kind_of` may call a file that may be one."""

    name: str
    kinds: tuple[str, ...]


RANGES = Expected(TABLE, (TABLE,))
PLAN = Expected(_PLAN, (_PLAN,))
VERIFICATION = Expected(_VERDICT, (_VERDICT,))
PROGRAM_FILE = Expected(PROGRAM, (PROGRAM, ZIP))
CHECKPOINT_FILE = Expected(CHECKPOINT, (CHECKPOINT, ZIP))
RANGES_OR_PLAN = Expected("a range table or a plan", (TABLE, _PLAN))
RANGES_OR_CHECKPOINT = Expected("a range table or a checkpoint", (TABLE, CHECKPOINT))
ENGINE = Expected(_ENGINE, (_ENGINE,))
# Text in another encoding has no known kind.
_TEXTS = (_TEXT, _UNKNOWN, "an empty file", "a JSON file", f"{TRUNCATED} JSON file")
PYTHON = Expected("a Python file", _TEXTS)
JOB = Expected("a job file (TOML)", _TEXTS)


def json_kind(kind: str) -> Expected:
    """The JSON file whose header says `kind`, whole or truncated: its reader says what is wrong with it."""
    name = JSON_KINDS.get(kind, f"a {kind} file")
    return Expected(name, (name, f"{TRUNCATED} {_bare(name)}", f"{TRUNCATED} JSON file"))


def wrong_kind(path: Path, expected: Expected) -> str | None:
    """`p.json is a plan; a range table was expected`, or None for a file that may be of the kind expected."""
    try:
        found = kind_of(path)
    except FileNotFoundError:
        return f"{path}: no such file or folder; {expected.name} was expected"
    except OSError as error:
        found = f"not readable ({error.strerror})"
    if found in expected.kinds:
        return None
    return f"{path} is {found}; {expected.name} was expected{_inside(path) if _ENGINE in expected.kinds else ''}"


def _inside(path: Path) -> str:
    """Where the engine is in the folder of a job, which is easily given in its place."""
    inner = path / "engine"
    return f": give {inner}" if inner.is_dir() and kind_of(inner) == _ENGINE else ""


def require_file(path: Path, expected: Expected) -> None:
    """Raise ArtifactError for what `wrong_kind` refuses."""
    if (wrong := wrong_kind(path, expected)) is not None:
        raise ArtifactError(wrong)


def is_replaceable(folder: Path) -> bool:
    """Whether a new engine may take the place of what is at `folder`: an engine, or an empty folder."""
    return folder.is_dir() and (not any(folder.iterdir()) or kind_of(folder) == _ENGINE)


def kind_of(path: Path) -> str:
    """What a path names, with its article: "a plan", "an empty file", "a truncated or damaged zip file".

    Raises OSError for a path that cannot be read.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        return _kind_of_folder(path) if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
    with path.open("rb") as stream:
        start = stream.read(_HEAD)
    if start.startswith((b"PAR1", b"PK")):
        return _kind_of_zip(path) if start.startswith(b"PK") else _kind_of_parquet(path)
    if start.lstrip().startswith(b"{"):
        return _kind_of_json(path, start)
    kind = _kind_of_other(start) if start else "an empty file"
    if kind in {_TEXT, _UNKNOWN} and path.stat().st_size > _MOST_TEXT:
        return f"{kind}, of {path.stat().st_size >> 20} MiB"
    return kind


def _kind_of_folder(path: Path) -> str:
    manifest = path / _MANIFEST
    if not manifest.is_file():
        return f"{_FOLDER} without {_MANIFEST}"
    found = kind_of(manifest)
    return _ENGINE if found in json_kind("engine").kinds else f"{_FOLDER} whose {_MANIFEST} is {found}"


def _kind_of_parquet(path: Path) -> str:
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - 8, 4))
        end = stream.read(8)
        length = int.from_bytes(end[:4], "little")
        if size < 12 or not end.endswith(b"PAR1") or length > size - 12:
            return f"{TRUNCATED} Parquet file"
        if length > _MOST_NAMES:
            return _PARQUET
        stream.seek(size - 8 - length)
        footer = stream.read(length)
    if _PARQUET_HEADER.search(footer):
        return TABLE
    own = b"calibcast.checksum" in footer
    return f"{_PARQUET} of calibcast, such as a ledger" if own else f"{_PARQUET} that calibcast did not write"


def _kind_of_zip(path: Path) -> str:
    """By the names in its directory, which is searched as bytes: a small zip file may list millions of members."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _ZIP_END))
        tail = stream.read()
        end = tail.rfind(b"PK\5\6")
        if end < 0 or len(tail) < end + 22:
            return f"{TRUNCATED} zip file"
        length = int.from_bytes(tail[end + 12 : end + 16], "little")
        # The two records of a large zip file (zip64) may stand between the directory and this record.
        stream.seek(max(0, size - len(tail) + end - min(length, _MOST_NAMES) - _ZIP64))
        names = stream.read()
    if b"models/model.json" in names:
        return PROGRAM
    if b"header.npy" in names:
        return CHECKPOINT
    return "a file of torch.save (weights, not a program)" if b"/data.pkl" in names else ZIP


def _kind_of_json(path: Path, start: bytes) -> str:
    head = _JSON_HEADER.match(start.decode("utf-8", "replace"))
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 64))
        whole = stream.read().rstrip().endswith(b"}")
    if head is not None and head[1].isprintable():
        named = JSON_KINDS.get(head[1], f"a {head[1]}")
        return named if whole else f"{TRUNCATED} {_bare(named)}"
    if path.stat().st_size > _MOST_JSON:
        return "a JSON file"
    try:
        kind = json.loads(path.read_bytes()).get("calibcast")
    except (ValueError, RecursionError):
        return f"{TRUNCATED} JSON file"
    known = isinstance(kind, str) and kind.isprintable() and len(kind) < 40
    return JSON_KINDS.get(kind, f"a {kind}") if known else "a JSON file"


def _bare(noun: str) -> str:
    return noun.partition(" ")[2]


def _kind_of_other(start: bytes) -> str:
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return kind
    for pattern, kind in ((_PICKLE, "a pickle"), (_ONNX, "an ONNX model"), (_SAFETENSORS, "a safetensors file")):
        if pattern.match(start):
            return kind
    try:
        start[:-3].decode("utf-8")  # a letter may be cut off at the end
    except UnicodeDecodeError:
        return _UNKNOWN
    return _UNKNOWN if b"\0" in start else _TEXT
