"""A range table with damaged bytes is refused before a reader of Parquet, which they could end, sees one of them."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib import ArtifactError, RangeTable, calibrate
from calibcast.calib.damage_report import damage_report
from calibcast.calib.seal import UNSEALED, broken_seal, sealed
from pyarrow import parquet
from torch import nn


@pytest.fixture(scope="module")
def table() -> RangeTable:
    torch.manual_seed(0)
    program = torch.export.export(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), (torch.ones(2, 4),))
    return calibrate(program, [torch.randn(2, 4)], progress=False)


@pytest.fixture
def saved(table: RangeTable, tmp_path: Path) -> Path:
    table.save(tmp_path / "ranges.parquet")
    return tmp_path / "ranges.parquet"


def damaged(whole: bytes, generator: random.Random) -> bytes:
    """Some bytes flipped, overwritten, removed, inserted or repeated, anywhere."""
    content = bytearray(whole)
    for _ in range(generator.choice([1, 1, 1, 4, 20])):
        at, length = generator.randrange(len(content)), generator.choice([1, 1, 8, 100])
        kind = generator.choice(["flip", "overwrite", "remove", "insert", "repeat"])
        if kind == "flip":
            content[at] ^= 1 << generator.randrange(8)
        elif kind == "overwrite":
            content[at : at + length] = generator.randbytes(len(content[at : at + length]))
        elif kind == "remove":
            del content[at : at + length]
        else:
            content[at:at] = generator.randbytes(length) if kind == "insert" else content[at : at + length]
    return bytes(content)


def refuse_to_read(*_: Any, **__: Any) -> Any:
    raise AssertionError("polars was given bytes that are not as they were written")


def test_damaged_ranges_never_raise_anything_else(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever bytes are wrong, loading is an ArtifactError, and polars is not asked in this process."""
    whole, generator = saved.read_bytes(), random.Random(1)
    monkeypatch.setattr(pl, "read_parquet", refuse_to_read)
    monkeypatch.setattr(pl, "read_parquet_metadata", refuse_to_read)
    monkeypatch.setattr("calibcast.calib.ranges.damage_report", lambda source: None)  # a process each: below, for some
    changed = [content for _ in range(600) if (content := damaged(whole, generator)) != whole]
    assert len(changed) > 550
    for content in changed:
        saved.write_bytes(content)
        with pytest.raises(
            ArtifactError,
            match=r"parquet is (not as calibcast wrote|not a readable Parquet|a truncated or damaged Parq|a Parquet)",
        ):
            RangeTable.load(saved)


def test_no_single_byte_can_change_unnoticed(saved: Path) -> None:
    """One bit of each byte in turn, those of the checksum and of its name too; each byte left out in turn."""
    whole = saved.read_bytes()
    assert broken_seal(whole) is None
    content = bytearray(whole)
    for at in range(len(content)):
        content[at] ^= 1 << (at % 8)
        assert broken_seal(bytes(content)) is not None, at
        content[at] = whole[at]
        assert broken_seal(whole[:at] + whole[at + 1 :]) is not None, at


def test_damaged_ranges_are_looked_at_elsewhere(saved: Path, table: RangeTable) -> None:
    """With the second look, which may itself end: always an ArtifactError with the file's name, and this goes on."""
    whole, generator = saved.read_bytes(), random.Random(2)
    for _ in range(12):
        # In the footer, where bytes are most likely to lead a reader astray.
        at = len(whole) - 1 - generator.randrange(int.from_bytes(whole[-8:-4], "little"))
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with pytest.raises(ArtifactError, match=r"ranges\.parquet "):
            RangeTable.load(saved)
    saved.write_bytes(whole)
    assert RangeTable.load(saved).frame.equals(table.frame)


def test_reader_that_ends_is_told(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A reader that ends without a word is why the file cannot be read; without one, the checksum says enough."""
    saved.write_bytes(saved.read_bytes().replace(b"linear", b"liNear"))
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\nkill -ABRT $$\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    with pytest.raises(
        ArtifactError, match=r"not a readable Parquet file .* a process that reads it ends with status -6"
    ):
        RangeTable.load(saved)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    with pytest.raises(ArtifactError, match=r"its checksum is not that of its bytes.*calibrate again"):
        RangeTable.load(saved)


def test_tables_written_anew_by_others_are_refused(saved: Path) -> None:
    """A file that polars wrote again with our metadata says that its checksum is wrong."""
    metadata = {key: text for key, text in pl.read_parquet_metadata(saved).items() if key != "ARROW:schema"}
    frame = pl.read_parquet(saved).with_columns(mean=pl.col("mean") * 2)
    frame.write_parquet(saved, metadata=metadata)
    with pytest.raises(ArtifactError, match=r"not as calibcast wrote it: its checksum .*Another program rewrote it"):
        RangeTable.load(saved)
    frame.write_parquet(saved, metadata={"calibcast": metadata["calibcast"]})
    with pytest.raises(ArtifactError, match=r"not as calibcast wrote it: it has no checksum of calibcast's"):
        RangeTable.load(saved)


def test_damage_report_sees_nothing_wrong_with_a_whole_file(saved: Path) -> None:
    """What is as it should be is no reason; a missing column is one."""
    assert damage_report(saved) is None
    pl.read_parquet(saved).drop("rms").write_parquet(saved, metadata={"calibcast": '{"calibcast": "ranges"}'})
    assert "written by another calibcast (schema None" in str(damage_report(saved))


def test_other_readers_see_a_plain_file(saved: Path, table: RangeTable) -> None:
    """pyarrow reads the columns and the entry in the metadata, which is not the placeholder."""
    read = parquet.read_table(saved)
    assert read.column("node").to_pylist() == table.frame["node"].to_list()
    assert read.column("absmax").to_pylist() == table.frame["absmax"].to_list()
    metadata = parquet.read_metadata(saved).metadata
    (key, placeholder), *_ = UNSEALED.items()
    assert metadata[key.encode()].startswith(b"xxh3-128:")
    assert metadata[key.encode()] != placeholder.encode()


def test_names_that_look_like_checksums_are_no_harm(table: RangeTable, tmp_path: Path) -> None:
    """Only the last such text counts, which is the metadata's."""
    fake = f"{next(iter(UNSEALED.values()))}.py:3"
    frame = table.frame.with_columns(source=pl.lit(fake))
    RangeTable(frame, table.calibration, table.hidden).save(tmp_path / "odd.parquet")
    assert RangeTable.load(tmp_path / "odd.parquet").frame["source"].unique().to_list() == [fake]


def test_file_without_a_place_is_not_sealed(table: RangeTable, tmp_path: Path) -> None:
    """What was written without the placeholder has nowhere to put a checksum."""
    table.frame.write_parquet(tmp_path / "plain.parquet")
    with pytest.raises(ValueError, match="has no place for a checksum"):
        sealed((tmp_path / "plain.parquet").read_bytes())
