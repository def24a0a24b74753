"""Say what kind of file was given instead of the expected one: "it is a plan; a range table was expected"."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

_MOST = 64 << 20  # calibcast writes no JSON file larger than this


def told_kind(path: Path, expected: str) -> str:
    """The tail of a message, `. It is a plan; a range table was expected`; empty where the kind is unknown."""
    try:
        found = _kind(path)
    except (OSError, ValueError, zipfile.BadZipFile, RecursionError):
        return ""
    return "" if found is None else f". It is {found}; {expected} was expected"


def _kind(path: Path) -> str | None:
    with path.open("rb") as stream:
        start = stream.read(8)
    if start.startswith(b"PAR1"):
        return "a Parquet file, as range tables and ledgers are"
    if start.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("models/model.json") for name in names):
            return "an exported program"
        return "a checkpoint of a calibration" if "header.npy" in names else "a zip archive"
    if start.lstrip().startswith(b"{") and path.stat().st_size < _MOST:
        kind = json.loads(path.read_text(encoding="utf-8")).get("calibcast")
        return f"a {kind}" if isinstance(kind, str) and kind.isprintable() and len(kind) < 40 else "a JSON file"
    return None
