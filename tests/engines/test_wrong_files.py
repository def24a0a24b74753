"""A file of the wrong kind, for every argument that names one: exit code 2, before torch is imported."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import typing
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from calibcast.calib import CalibcastError, RangeTable, calibrate
from calibcast.calib.artifacts import load_program, save_program
from calibcast.calib.checkpoint import Checkpoint
from calibcast.engines import Engine, build
from calibcast.engines.cli import _run, app
from calibcast.engines.job.job_file import load_job
from calibcast.engines.judging.report_file import load_report
from calibcast.passes import PrecisionPlan, classify, insert_casts
from torch import nn
from typer.main import get_command

ROOT = Path(__file__).resolve().parents[2]
USER = """
import torch
def model(): return torch.nn.Linear(4, 4), (torch.randn(2, 4),)
def data(): return [torch.randn(2, 4)]
"""
DATA = ("--data", "user.py:data")
# A command line with `{}` where the wrong file goes: what was expected there, and which files belong there.
PLACES: dict[str, tuple[tuple[str, ...], str, set[str]]] = {
    "calibrate model": (("calibrate", "{}", *DATA, "-o", "new"), "an exported program", {"good.pt2"}),
    "calibrate data": (("calibrate", "user.py:model", "--data", "{}.py:f", "-o", "new"), "a Python file", set()),
    "calibrate transform": (
        ("calibrate", "user.py:model", *DATA, "--transform", "{}.py:f", "-o", "new"), "a Python file", set(),
    ),
    "plan model": (("plan", "{}"), "an exported program", {"good.pt2"}),
    "plan ranges": (("plan", "user.py:model", "{}"), "a range table", {"good.parquet"}),
    "rescale model": (("rescale", "{}", "good.parquet", "-o", "new"), "an exported program", {"good.pt2"}),
    "rescale ranges": (("rescale", "user.py:model", "{}", "-o", "new"), "a range table", {"good.parquet"}),
    "diagnose model": (("diagnose", "{}", "good.json", *DATA), "an exported program", {"good.pt2"}),
    "diagnose plan_file": (("diagnose", "user.py:model", "{}", *DATA), "a plan", {"good.json"}),
    "build model": (("build", "{}", "good.json", "-o", "new"), "an exported program", {"good.pt2"}),
    "build plan_file": (("build", "user.py:model", "{}", "-o", "new", "--backend", "eager"), "a plan", {"good.json"}),
    "build ranges": (
        ("build", "user.py:model", "good.json", "-o", "new", "--ranges", "{}"), "a range table", {"good.parquet"},
    ),
    "inspect folder": (("inspect", "{}"), "an engine folder", {"good"}),
    "verify folder": (("verify", "{}", "user.py:model", *DATA), "an engine folder", {"good"}),
    "verify model": (("verify", "good", "{}", *DATA), "an exported program", {"good.pt2"}),
    "export source": (("export", "{}", "--onnx", "new.onnx"), "an exported program", {"good.pt2", "good"}),
    "export plan": (("export", "user.py:model", "--onnx", "n.onnx", "--plan", "{}"), "a plan", {"good.json"}),
    "export ranges": (
        ("export", "user.py:model", "--engine", "new", "--ranges", "{}"), "a range table", {"good.parquet"},
    ),
    "report ranges": (("report", "{}"), "a range table", {"good.parquet"}),
    "report plan_file": (("report", "good.parquet", "--plan", "{}"), "a plan", {"good.json"}),
    "report verification": (
        ("report", "good.parquet", "--html", "new.html", "--verification", "{}"), "a verification report", {"v.json"},
    ),
    "what-if ranges": (("what-if", "{}", "--program", "user.py:model"), "a range table", {"good.parquet"}),
    "what-if program": (("what-if", "good.parquet", "--program", "{}"), "an exported program", {"good.pt2"}),
    "what-if base": (
        ("what-if", "good.parquet", "--program", "user.py:model", "--plan", "{}"), "a plan", {"good.json"},
    ),
    "diff old": (("diff", "{}", "good.parquet"), "a range table or a plan", {"good.parquet", "good.json"}),
    "diff new": (("diff", "good.parquet", "{}"), "a range table or a plan", {"good.parquet", "good.json"}),
    "diff program": (
        ("diff", "good.parquet", "good.parquet", "--program", "{}"), "an exported program", {"good.pt2"},
    ),
    "merge parts": (
        ("merge", "{}", "good.parquet", "-o", "n"), "a range table or a checkpoint", {"good.parquet", "c.npz"},
    ),
    "plan data": (("plan", "user.py:model", "good.parquet", "--data", "{}.py:f"), "a Python file", set()),
    "plan transform": (
        ("plan", "user.py:model", "good.parquet", *DATA, "--transform", "{}.py:f"), "a Python file", set(),
    ),
    "rescale data": (
        ("rescale", "user.py:model", "good.parquet", "-o", "new", "--data", "{}.py:f"), "a Python file", set(),
    ),
    "rescale transform": (
        ("rescale", "user.py:model", "good.parquet", "-o", "n", "--transform", "{}.py:f"), "a Python file", set(),
    ),
    "diagnose data": (("diagnose", "user.py:model", "good.json", "--data", "{}.py:f"), "a Python file", set()),
    "diagnose transform": (
        ("diagnose", "user.py:model", "good.json", *DATA, "--transform", "{}.py:f"), "a Python file", set(),
    ),
    "verify data": (("verify", "good", "user.py:model", "--data", "{}.py:f"), "a Python file", set()),
    "verify transform": (
        ("verify", "good", "user.py:model", *DATA, "--transform", "{}.py:f"), "a Python file", set(),
    ),
    "run job": (("run", "{}"), "a job file (TOML)", set()),
}  # fmt: skip
WRONG = {
    "good.parquet": "a range table",
    "good.json": "a plan",
    "v.json": "a verification report",
    "good": "an engine folder",
    "good.pt2": "an exported program",
    "c.npz": "a checkpoint of a calibration",
    "m.onnx": "an ONNX model",
    "weights.pt": "a file of torch.save",
    "cat.png": "a PNG image",
    "cat.jpg": "a JPEG image",
    "x.zip": "a zip file",
    "model.pkl": "a pickle",
    "w.safetensors": "a safetensors file",
    "empty": "an empty file",
    "notes.txt": "a text file",
    "other.json": "a JSON file",
    "ledger.parquet": "a Parquet file",
    "cut.parquet": "a truncated or damaged Parquet file",
    "cut.pt2": "a truncated or damaged zip file",
    "folder": "folder",
    "pipe": "a pipe",
    "noise": "of no kind",
}
TEXTS = {"empty", "notes.txt", "other.json", "noise"}
TOLD_BY_THE_READER = {"x.zip": {"an exported program"}, "folder": {"a Python file"}, "good": {"a Python file"}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("files")
    (here / "user.py").write_text(USER)
    program = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),))
    ranges = calibrate(program, [torch.randn(2, 4)], progress=False)
    plan = classify(program, ranges)
    ranges.save(here / "good.parquet")
    plan.save(here / "good.json")
    save_program(program, here / "good.pt2")
    build(insert_casts(program, plan), plan, ranges, backend="eager").save(here / "good")
    (here / "v.json").write_text(json.dumps({"calibcast": "verification", "schema": 1}))
    torch.save({"a": torch.ones(2)}, here / "weights.pt")
    for name, member in (("c.npz", "header.npy"), ("x.zip", "a.txt")):
        with zipfile.ZipFile(here / name, "w") as archive:
            archive.writestr(member, b"")
    contents = {
        "m.onnx": b"\x08\x0a\x12\x07pytorch", "cat.png": b"\x89PNG\r\n\x1a\n", "cat.jpg": b"\xff\xd8\xff\xe0",
        "model.pkl": b"\x80\x04\x95\x02N.", "w.safetensors": struct.pack("<Q", 10) + b'{"a": {}} ', "empty": b"",
        "notes.txt": b"to do", "other.json": b'{"a": 1}', "noise": bytes(range(255, 100, -1)),
        "ledger.parquet": (here / "good/ledger.parquet").read_bytes(),
        "cut.parquet": (here / "good.parquet").read_bytes()[:-9], "cut.pt2": (here / "good.pt2").read_bytes()[:-9],
    }  # fmt: skip
    for name, content in contents.items():
        (here / name).write_bytes(content)
    (here / "folder").mkdir()
    os.mkfifo(here / "pipe")
    for name in WRONG:
        (here / f"{name}.py").symlink_to(name)
    return here


def cases() -> list[tuple[str, str]]:
    return [
        (place, name)
        for place, (_, expected, right) in PLACES.items()
        for name in WRONG
        if name not in right and not (name in TEXTS and expected in ("a Python file", "a job file (TOML)"))
    ]


@pytest.fixture(scope="module")
def told(files: Path) -> dict[tuple[str, str], tuple[int, str, bool]]:
    """What every command says of every wrong file, all in one process: nothing may be imported for it."""
    script = (
        "import contextlib, io, json, sys; from calibcast.engines.cli import _run\n"
        "for line in sys.stdin:\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):\n"
        "        code = _run(json.loads(line))\n"
        "    print(json.dumps([code, said.getvalue(), 'torch' in sys.modules]))\n"
    )
    lines = [json.dumps([part.format(name) for part in PLACES[place][0]]) for place, name in cases()]
    done = subprocess.run(
        [sys.executable, "-c", script], input="\n".join(lines), capture_output=True, text=True, cwd=files, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT / ".package")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(cases(), map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_a_wrong_file_is_a_bad_command_line_named_as_what_it_is(
    told: dict[tuple[str, str], tuple[int, str, bool]], files: Path, place: str
) -> None:
    expected = PLACES[place][1]
    for (where, name), (code, said, torch_imported) in told.items():
        if where != place:
            continue
        assert (code, torch_imported) == (2, False), f"{name}: {said}"
        assert "error: " in said, said
        assert said.count("\n") == 1, said
        assert len(said) < 200, said
        assert str(files) not in said, said  # only the name as it was given
        if expected not in TOLD_BY_THE_READER.get(name, set()):
            assert WRONG[name] in said, said
            assert f"{expected} was expected" in said or "is not an engine folder" in said, said
    assert not (files / "new").exists()


def test_every_argument_that_names_a_file_to_read_has_its_place() -> None:
    locations, outputs = {"model", "data", "transform", "program", "source"}, {"output", "html", "onnx"}
    read = set()
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        for argument, hint in typing.get_type_hints(command.callback.__wrapped__, include_extras=True).items():
            if argument in locations or ("Path" in str(hint) and argument not in outputs):
                read.add(f"{name} {argument}")
    assert read - {"init folder", "export engine"} == set(PLACES)  # these two are written


READERS: dict[str, tuple[Any, str, set[str]]] = {
    "RangeTable.load": (RangeTable.load, "a range table", {"good.parquet"}),
    "PrecisionPlan.load": (PrecisionPlan.load, "a plan", {"good.json"}),
    "load_program": (load_program, "an exported program", {"good.pt2"}),
    "Engine.load": (Engine.load, "an engine folder", {"good"}),
    "Checkpoint.load": (Checkpoint.load, "a checkpoint of a calibration", set()),
    "load_report": (load_report, "a verification report", {"v.json"}),
    "load_job": (load_job, "a job file (TOML)", TEXTS),
}


@pytest.mark.parametrize("reader", READERS)
def test_the_python_call_says_the_same(files: Path, reader: str) -> None:
    read, expected, right = READERS[reader]
    for name in WRONG.keys() - right - {"pipe"}:
        with pytest.raises(CalibcastError) as caught:
            read(files / name)
        if name not in ("folder", "x.zip", "c.npz") and not name.endswith(".json"):
            assert f"is {WRONG[name]}" in str(caught.value)
            assert f"; {expected} was expected" in str(caught.value)


def test_two_kinds_are_not_compared(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    assert _run(["diff", "good.parquet", "good.json"]) == 2
    assert "good.parquet is a range table, and good.json is a plan: give two of one kind" in capsys.readouterr().err


def test_a_plan_is_a_plan_whatever_its_name(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    for name in ("a.plan", "b.plan"):
        (files / name).write_bytes((files / "good.json").read_bytes())
    assert _run(["diff", "a.plan", "b.plan"]) == 0


def test_an_engine_takes_the_place_of_no_other_folder(files: Path, tmp_path: Path) -> None:
    """Also not of one whose manifest is of something else: it would delete what is in there."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job/manifest.json").write_text('{"calibcast": "job"}')
    (tmp_path / "job/kept").write_text("a night's work")
    with pytest.raises(CalibcastError, match="exists and is no engine folder"):
        Engine.load(files / "good").save(tmp_path / "job")
    assert (tmp_path / "job/kept").read_text() == "a night's work"
