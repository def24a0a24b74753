"""A file in the place of another is named as what it is."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from calibcast.calib.file_kinds import told_kind


def archive(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as made:
        for name in names:
            made.writestr(name, b"")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PAR1....", "a Parquet file, as range tables and ledgers are"),
        (b'{"calibcast": "plan"}', "a plan"),
        (b'  \n {"calibcast": "plan"}', "a plan"),
        (b'{"other": 1}', "a JSON file"),
        (b'{"calibcast": 3}', "a JSON file"),
        (json.dumps({"calibcast": "x" * 39}).encode(), f"a {'x' * 39}"),
        (json.dumps({"calibcast": "x" * 40}).encode(), "a JSON file"),
        (json.dumps({"calibcast": "\x1b[2J"}).encode(), "a JSON file"),
    ],
)
def test_a_file_is_told_by_its_content(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "f").write_bytes(content)
    assert told_kind(tmp_path / "f", "a range table") == f". It is {kind}; a range table was expected"


@pytest.mark.parametrize("content", [b"", b"hello", b"{not json", b'["calibcast"]', b"\xff\xfe{"])
def test_what_cannot_be_told_adds_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    assert told_kind(tmp_path / "f", "a plan") == ""
    assert told_kind(tmp_path / "absent", "a plan") == ""


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["x/models/model.json"], "an exported program"),
        (["header.npy", "total.npy"], "a checkpoint of a calibration"),
        (["some.txt"], "a zip archive"),
    ],
)
def test_archives_are_told_by_what_is_in_them(tmp_path: Path, names: list[str], kind: str) -> None:
    archive(tmp_path / "f", *names)
    assert told_kind(tmp_path / "f", "a plan") == f". It is {kind}; a plan was expected"


@pytest.mark.parametrize(("size", "told"), [((64 << 20) - 1, True), (64 << 20, False)])
def test_a_large_file_is_not_read_to_tell_its_kind(tmp_path: Path, size: int, told: bool) -> None:
    text = b'{"calibcast": "plan"}'
    (tmp_path / "f").write_bytes(text + b" " * (size - len(text)))
    assert told_kind(tmp_path / "f", "a range table") == (". It is a plan; a range table was expected" if told else "")
