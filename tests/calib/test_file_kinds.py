"""A file in the place of another is named as what it is."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
from calibcast.calib.file_kinds import PLAN, RANGES, kind_of, wrong_kind

PARQUET = b"PAR1" + b"x" * 20 + struct.pack("<I", 20) + b"PAR1"
TABLE = b"PAR1" + b'{"calibcast": "ranges"}' + struct.pack("<I", 23) + b"PAR1"
LEDGER = PARQUET.replace(b"x" * 20, b"xcalibcast.checksumx")
UNKNOWN = "of no kind that calibcast knows"


def archive(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as made:
        for name in names:
            made.writestr(name, b"")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (PARQUET, "a Parquet file that calibcast did not write"),
        (LEDGER, "a Parquet file of calibcast, such as a ledger"),
        (TABLE, "a range table"),
        (TABLE[:-1], "a truncated or damaged Parquet file"),
        (b"PAR1", "a truncated or damaged Parquet file"),
        (b"PAR1" + b"\xff" * 4 + b"PAR1", "a truncated or damaged Parquet file"),
        (b'{"calibcast": "plan"}', "a plan"),
        (b'  \n {"calibcast": "plan"}', "a plan"),
        (b'{"calibcast": "plan", "sch', "a truncated or damaged plan"),
        (b'{"calibcast": "engine"}', "an engine's manifest"),
        (b'{"a": 1, "calibcast": "plan"}', "a plan"),
        (b'{"other": 1}', "a JSON file"),
        (b'{"calibcast": 3}', "a JSON file"),
        (b"{not json", "a truncated or damaged JSON file"),
        (b'{"a":' * 5000, "a truncated or damaged JSON file"),
        (json.dumps({"calibcast": "x" * 39}).encode(), f"a {'x' * 39}"),
        (json.dumps({"calibcast": "x" * 40}).encode(), "a JSON file"),
        (json.dumps({"calibcast": "\x1b[2J"}).encode(), "a JSON file"),
        (b"PK\x03\x04rest", "a truncated or damaged zip file"),
        (b"\x89PNG\r\n", "a PNG image"),
        (b"\xff\xd8\xff\xe0", "a JPEG image"),
        (b"\x80\x04\x95", "a pickle"),
        (b"\x08\x0a\x12\x05onnx", "an ONNX model"),
        (struct.pack("<Q", 20) + b'{"a": {}}', "a safetensors file"),
        (b"", "an empty file"),
        (b"hello", "a text file"),
        (b'["calibcast"]', "a text file"),
        (b"\xff\xfe{\0\0\0", UNKNOWN),
        (b"text with\0zeros", UNKNOWN),
        (b"a" * 4095 + b"\0", UNKNOWN),
        (b"a" * 4096 + b"\0", "a text file"),  # further on nobody looks
        (b"a" * 4093 + b"\xff\xff\xff", "a text file"),  # a letter may be cut off there
        (b"a" * 4092 + b"\xff\xff\xff\xff", UNKNOWN),
        (b'{"calibcast": "plan"}' + b" " * 63, "a plan"),
        (b'{"calibcast": "plan"}' + b" " * 64, "a truncated or damaged plan"),
        (b'{"a": "' + b"x" * ((1 << 20) - 30) + b'", "calibcast": "plan"}', "a plan"),
        (b'{"a": "' + b"x" * ((1 << 20) - 29) + b'", "calibcast": "plan"}', "a JSON file"),
    ],
)
def test_a_file_is_told_by_its_content(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "f").write_bytes(content)
    assert kind_of(tmp_path / "f") == kind
    wrong = wrong_kind(tmp_path / "f", RANGES)
    assert wrong == (None if kind == "a range table" else f"{tmp_path / 'f'} is {kind}; a range table was expected")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["x/models/model.json"], "an exported program"),
        (["header.npy", "total.npy"], "a checkpoint of a calibration"),
        (["archive/data.pkl"], "a file of torch.save (weights, not a program)"),
        (["some.txt"], "a zip file"),
    ],
)
def test_archives_are_told_by_what_is_in_them(tmp_path: Path, names: list[str], kind: str) -> None:
    archive(tmp_path / "f", *names)
    assert kind_of(tmp_path / "f") == kind


def test_folders_pipes_and_devices_are_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert kind_of(tmp_path / "pipe") == kind_of(Path("/dev/null")) == "a pipe, a device or a socket"
    assert kind_of(tmp_path) == "a folder without manifest.json"
    for kind, told in (("job", "a folder whose manifest.json is a job's manifest"), ("engine", "an engine folder")):
        (tmp_path / "manifest.json").write_text(json.dumps({"calibcast": kind}))
        assert kind_of(tmp_path) == told


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    assert wrong_kind(tmp_path / "absent", PLAN) == (
        f"{tmp_path / 'absent'}: no such file or folder; a plan was expected"
    )


def test_a_large_file_is_told_without_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "f").open("wb") as stream:
        stream.write(b'{"calibcast": "plan"')
        stream.truncate(1 << 32)
    (tmp_path / "other").write_bytes(b'{"other": 1,' + b" " * (1 << 20) + b"}")
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read"))
    assert kind_of(tmp_path / "f") == "a truncated or damaged plan"
    assert kind_of(tmp_path / "other") == "a JSON file"
