"""Files: whole or absent, and refused with a clear message when they are not what they claim to be."""

from __future__ import annotations

import io
import json
import math
import os
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib import ArtifactError, RangeTable, calibrate
from calibcast.calib.artifacts import (
    SCHEMA_VERSION,
    load_json,
    load_program,
    parsed,
    save_json,
    save_program,
    versions,
    written_whole,
)
from calibcast.calib.seal import UNSEALED, sealed
from torch import nn
from torch.export import ExportedProgram


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), (torch.ones(2, 4),))


@pytest.fixture(scope="module")
def table(program: ExportedProgram) -> RangeTable:
    batches = [torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    with pytest.warns(UserWarning, match="NaN or Inf"):
        return calibrate(program, [*batches, torch.full((2, 4), math.nan)], progress=False)


@pytest.fixture
def saved(table: RangeTable, tmp_path: Path) -> Path:
    table.save(tmp_path / "ranges.parquet")
    return tmp_path / "ranges.parquet"


def rewritten(
    saved: Path,
    change: Callable[[dict[str, Any]], Any] | None = None,
    frame: pl.DataFrame | None = None,
    with_checksum: bool = False,
) -> Path:
    """The file with another header or another frame, as a foreign hand would write it, or `with_checksum` as we do."""
    header = json.loads(pl.read_parquet_metadata(saved)["calibcast"])
    if change is not None:
        header = change(header)
    frame = pl.read_parquet(saved) if frame is None else frame
    frame.write_parquet(saved, metadata={"calibcast": json.dumps(header), **(UNSEALED if with_checksum else {})})
    if with_checksum:
        saved.write_bytes(sealed(saved.read_bytes()))
    return saved


def test_ranges_come_back_as_they_were(table: RangeTable, saved: Path) -> None:
    """Frame, dtypes, calibration and fingerprint survive a file exactly, nulls too."""
    loaded = RangeTable.load(saved)
    assert loaded.frame.equals(table.frame)
    assert loaded.frame.schema == table.frame.schema
    assert loaded.calibration == table.calibration
    assert loaded.fingerprint == table.fingerprint
    assert loaded.frame.filter(node="linear")["nan"].to_list() == [6]


def test_ranges_without_histograms_come_back(program: ExportedProgram, tmp_path: Path) -> None:
    """A column of nulls keeps its dtype in a file."""
    table = calibrate(program, [torch.ones(2, 4)], histogram=False, progress=False)
    table.save(tmp_path / "lean.parquet")
    assert RangeTable.load(tmp_path / "lean.parquet").frame.equals(table.frame)


def test_loaded_tables_merge_and_check_like_fresh_ones(
    table: RangeTable, saved: Path, program: ExportedProgram
) -> None:
    """A table from a file is as good as the one that was saved."""
    loaded = RangeTable.load(saved)
    loaded.check(program, weights="refuse")
    assert RangeTable.merge([loaded, table]).frame.equals(RangeTable.merge([table, table]).frame)


def test_files_are_plain_parquet_of_everyones_reading(saved: Path, table: RangeTable) -> None:
    """Any reader of Parquet sees the columns, and the file has the mode that the umask gives."""
    assert pl.read_parquet(saved).select(table.frame.columns).equals(table.frame)
    umask = os.umask(0o022)
    os.umask(umask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.99, 1.0])
def test_truncated_ranges_are_refused(share: float, saved: Path) -> None:
    """A file cut off anywhere, also by its last byte, is no table."""
    whole = saved.read_bytes()
    saved.write_bytes(whole[: min(len(whole) - 1, int(share * len(whole)))])
    with pytest.raises(ArtifactError, match=r"ranges\.parquet is .*; a range table was expected"):
        RangeTable.load(saved)


def test_panic_of_the_reader_is_an_artifact_error(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic in polars is no Exception in Python, and is refused all the same."""

    def panics(source: Any) -> Any:
        raise pl.exceptions.PanicException("assertion failed")

    monkeypatch.setattr(pl, "read_parquet", panics)
    with pytest.raises(ArtifactError, match=r"not a readable Parquet file .*assertion failed"):
        RangeTable.load(saved)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    """No file, or a folder in its place, is told with what was expected."""
    with pytest.raises(ArtifactError, match=r"absent\.parquet: no such file; expected a ranges file"):
        RangeTable.load(tmp_path / "absent.parquet")
    with pytest.raises(ArtifactError, match=r"is a folder without manifest\.json; a range table was expected"):
        RangeTable.load(tmp_path)


def test_foreign_parquet_is_refused(saved: Path, tmp_path: Path) -> None:
    """Parquet without our header is foreign, even with the same columns."""
    pl.read_parquet(saved).write_parquet(tmp_path / "foreign.parquet")
    with pytest.raises(ArtifactError, match=r"foreign\.parquet is a Parquet file that calibcast did not write;"):
        RangeTable.load(tmp_path / "foreign.parquet")


def test_other_formats_are_refused(tmp_path: Path) -> None:
    """A plan, a program or a text given as ranges is told apart from a table."""
    save_json(tmp_path / "plan.json", "plan", {"nodes": []})
    (tmp_path / "notes.txt").write_text("PAR1 this is no Parquet PAR1")
    for name, kind in (("plan.json", "a plan"), ("notes.txt", "a truncated or damaged Parquet file")):
        with pytest.raises(ArtifactError, match=f"{name} is {kind}; a range table was expected"):
            RangeTable.load(tmp_path / name)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another kind": (
        lambda header: {**header, "calibcast": "plan"},
        "is a Parquet file .*; a range table was expected",
    ),
    "newer": (
        lambda header: {**header, "schema": SCHEMA_VERSION + 1},
        rf"written by a newer calibcast \(schema {SCHEMA_VERSION + 1}; this one reads {SCHEMA_VERSION}\).*Upgrade",
    ),
    "older": (lambda header: {**header, "schema": 0}, r"written by another calibcast \(schema 0;"),
    "no schema": (lambda header: {"calibcast": "ranges"}, r"written by another calibcast \(schema None"),
    "list": (lambda header: [1, 2], "is a Parquet file .*; a range table was expected"),
    "no calibration": (
        lambda header: {key: header[key] for key in ("calibcast", "schema")},
        "claims to be a ranges file, but cannot be read as one: KeyError",
    ),
    "calibration of another sort": (lambda header: {**header, "calibration": 3}, "claims to be a ranges file"),
    "unknown field": (
        lambda header: {**header, "calibration": {**header["calibration"], "colour": "red"}},
        "claims to be a ranges file.*colour",
    ),
    "missing field": (
        lambda header: {**header, "calibration": {k: v for k, v in header["calibration"].items() if k != "weights"}},
        "claims to be a ranges file.*weights",
    ),
}


@pytest.mark.parametrize("with_checksum", [True, False], ids=["sealed", "by hand"])
@pytest.mark.parametrize("name", HEADERS)
def test_wrong_header_is_refused(name: str, with_checksum: bool, saved: Path) -> None:
    """A header of another kind, version or content is refused, and says what it is, with a right checksum or none."""
    change, message = HEADERS[name]
    with pytest.raises(ArtifactError, match=message):
        RangeTable.load(rewritten(saved, change, with_checksum=with_checksum))


@pytest.mark.parametrize("with_checksum", [True, False], ids=["sealed", "by hand"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop("absmax"), "lacks the column absmax"),
        (lambda frame: frame.drop("absmax", "histogram"), "lacks the columns absmax, histogram"),
        (lambda frame: frame.with_columns(pl.col("max").cast(pl.Float32)), "column max is Float32, expected Float64"),
        (lambda frame: frame.with_columns(pl.col("node").cast(pl.Categorical)), "column node is .*, expected String"),
        (lambda frame: frame.with_columns(nan=pl.lit("none")), "column nan is String, expected Int64"),
        (lambda frame: pl.concat([frame, frame[:1]]), "has two rows for one tensor"),
    ],
    ids=["column", "columns", "narrow", "categorical", "text", "twice"],
)
def test_wrong_columns_are_refused(
    change: Callable[[pl.DataFrame], pl.DataFrame], message: str, with_checksum: bool, saved: Path
) -> None:
    """A missing column, one of another dtype, or a tensor twice is named."""
    with pytest.raises(ArtifactError, match=message):
        RangeTable.load(rewritten(saved, frame=change(pl.read_parquet(saved)), with_checksum=with_checksum))


def test_columns_in_another_order_are_put_right(saved: Path, table: RangeTable) -> None:
    """Order and extra columns of a file do not matter to the table."""
    frame = pl.read_parquet(saved).select(pl.lit(1).alias("extra"), *reversed(table.frame.columns))
    assert RangeTable.load(rewritten(saved, frame=frame, with_checksum=True)).frame.equals(table.frame)


def bad_folders(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "file").write_text("")
    return {"missing": tmp_path / "absent", "file": tmp_path / "file", "not writable": Path("/proc")}


@pytest.mark.parametrize("folder", ["missing", "file", "not writable"])
def test_folder_that_cannot_be_written(
    folder: str, table: RangeTable, program: ExportedProgram, tmp_path: Path
) -> None:
    """A missing folder, a file in its place, or one that takes no files is an ArtifactError; nothing is left."""
    place = bad_folders(tmp_path)[folder]
    before = sorted(tmp_path.rglob("*"))
    for save in (
        lambda: table.save(place / "a.parquet"),
        lambda: save_json(place / "a.json", "plan", {}),
        lambda: save_program(program, place / "a.pt2"),
    ):
        with pytest.raises(ArtifactError, match=r"cannot write .*Give a folder that exists and is writable"):
            save()
    assert sorted(tmp_path.rglob("*")) == before


def test_target_that_is_a_folder(table: RangeTable, tmp_path: Path) -> None:
    """Writing onto a folder is refused, and leaves no temporary file beside it."""
    (tmp_path / "ranges.parquet").mkdir()
    with pytest.raises(ArtifactError, match=r"cannot write .*ranges\.parquet"):
        table.save(tmp_path / "ranges.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["ranges.parquet"]


def failing_write(self: Path, content: memoryview) -> None:
    with self.open("wb") as stream:
        stream.write(content[: len(content) // 2])
    raise OSError(28, "No space left on device")


def test_full_disk_leaves_the_old_file(saved: Path, table: RangeTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails in the middle is an ArtifactError; the old file is intact and nothing else is there."""
    before = saved.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", failing_write)
    with pytest.raises(ArtifactError, match="No space left on device"):
        table.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def interrupted(target: Path, error: BaseException) -> None:
    with written_whole(target) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no"), MemoryError()], ids=repr)
def test_interrupted_write_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    """Whatever ends a write, also Ctrl-C, the target is as before and no temporary file stays."""
    target = tmp_path / "file.json"
    target.write_text("old")
    with pytest.raises(type(error)):
        interrupted(target, error)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_written_file_appears_only_when_done(tmp_path: Path) -> None:
    """While it is written, a file is under another name in the same folder; then it replaces the old one."""
    target = tmp_path / "file.json"
    target.write_text("old")
    with written_whole(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent == target.parent
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_names_may_be_relative(table: RangeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare file name is written to the working folder; a string is as good as a path."""
    monkeypatch.chdir(tmp_path)
    table.save("ranges.parquet")
    assert RangeTable.load("ranges.parquet").frame.equals(table.frame)


def test_json_comes_back_with_its_header(tmp_path: Path) -> None:
    """A JSON artifact keeps its content, infinities and all letters, and says what it is and who wrote it."""
    content = {"limit": math.inf, "name": "größe", "nodes": [{"a": None}], "share": 0.1}
    save_json(tmp_path / "plan.json", "plan", content)
    loaded = load_json(tmp_path / "plan.json", "plan")
    assert {key: loaded[key] for key in content} == content
    assert loaded["calibcast"] == "plan"
    assert loaded["versions"] == versions()
    assert loaded["versions"]["torch"] == torch.__version__


JSON_FILES: dict[str, tuple[bytes, str]] = {
    "truncated": (b'{"calibcast": "plan", "schema": 1, "no', "is not a readable plan file .truncated or foreign.: "),
    "empty": (b"", "is an empty file; a plan was expected"),
    "binary": (b"\x93\xff\x00\x01", "is of no kind that calibcast knows; a plan was expected"),
    "foreign": (b'{"nodes": []}', "was not written by calibcast .*expected a plan file"),
    "list": (b"[1, 2]", "was not written by calibcast"),
    "another kind": (b'{"calibcast": "engine", "schema": 1}', "is a calibcast engine file; expected a plan file"),
    "newer": (b'{"calibcast": "plan", "schema": 99}', "written by a newer calibcast .schema 99; .*Upgrade"),
    "endless number": (b'{"calibcast": "plan", "schema": %s}' % (b"1" * 5000), "is not a readable plan file"),
    "deep": (b"[" * 100_000, "is a text file; a plan was expected"),
    "schema of text": (b'{"calibcast": "plan", "schema": "1"}', "written by another calibcast"),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_that_is_not_what_it_claims_is_refused(name: str, tmp_path: Path) -> None:
    """Truncated, foreign, newer and mistaken JSON files are told apart."""
    text, message = JSON_FILES[name]
    (tmp_path / "plan.json").write_bytes(text)
    with pytest.raises(ArtifactError, match=message):
        load_json(tmp_path / "plan.json", "plan")


def test_json_that_is_not_there_or_no_json(saved: Path) -> None:
    """A missing file says so; ranges given as a plan are no plan."""
    with pytest.raises(ArtifactError, match=r"plan\.json: no such file"):
        load_json(saved.parent / "plan.json", "plan")
    with pytest.raises(ArtifactError, match=r"ranges\.parquet is a range table; a plan was expected"):
        load_json(saved, "plan")


@pytest.mark.parametrize("error", [KeyError("nodes"), TypeError("not a list"), ValueError("x"), AttributeError("y")])
def test_fields_that_do_not_parse_name_the_file(error: Exception) -> None:
    """What goes wrong while fields are read is told with the file, its kind and the cause."""
    message = r"plan\.json claims to be a plan file, but cannot be read as one"
    with pytest.raises(ArtifactError, match=message) as caught, parsed("plan.json", "plan"):
        raise error
    assert caught.value.__cause__ is error


def test_program_comes_back(program: ExportedProgram, tmp_path: Path) -> None:
    """A saved program computes the same, under any file name, without a warning."""
    for name in ("model.pt2", "model"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_program(program, tmp_path / name)
        loaded = load_program(tmp_path / name)
        x = torch.arange(8.0).view(2, 4)
        assert torch.equal(loaded.module()(x), program.module()(x))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.pt2"]


@pytest.mark.filterwarnings("ignore")
def test_broken_programs_are_refused(program: ExportedProgram, tmp_path: Path) -> None:
    """Missing, truncated, empty and foreign programs say what was expected and which torch reads."""
    save_program(program, tmp_path / "model.pt2")
    whole = (tmp_path / "model.pt2").read_bytes()
    pickled = io.BytesIO()
    torch.save({"a": torch.ones(2)}, pickled)
    with pytest.raises(ArtifactError, match=r"absent\.pt2: no such file; expected a \.pt2"):
        load_program(tmp_path / "absent.pt2")
    cut = "a truncated or damaged zip file"
    for content, kind in (
        (b"", "an empty file"), (whole[:100], cut), (whole[: len(whole) // 2], cut), (whole[:-1], cut),
        (b"no program", "a text file"), (pickled.getvalue(), r"a file of torch.save \(weights, not a program\)"),
    ):  # fmt: skip
        (tmp_path / "model.pt2").write_bytes(content)
        with pytest.raises(ArtifactError, match=rf"model\.pt2 is {kind}; an exported program was expected"):
            load_program(tmp_path / "model.pt2")


def test_ranges_given_as_a_program_are_refused(saved: Path) -> None:
    """A table is no program."""
    with pytest.raises(ArtifactError, match="is a range table; an exported program was expected"):
        load_program(saved)


@pytest.mark.parametrize("limit", [0, 1, 60, 700, 2500])
def test_a_full_disk_is_one_error_whatever_library_writes(limit: int) -> None:
    """Polars has errors of its own for it, and torch's writer ends the process when its stream raises."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("full_disk.py")), str(limit)],
        capture_output=True, text=True, timeout=900, env={**os.environ, "PYTHONPATH": str(root / ".package")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["a.pt2 refused", "a.parquet refused", "engine refused", "left"]


def test_writing_to_a_link_writes_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("shared/real.json")
    save_json(tmp_path / "link.json", "thing", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert load_json(tmp_path / "shared/real.json", "thing")["a"] == 1
