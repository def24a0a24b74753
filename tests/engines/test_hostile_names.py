"""Names of modules may hold anything: no output lets a terminal or a spreadsheet obey them."""

import io
import json
import logging
import subprocess
import sys

import polars as pl
import pytest
import torch
from calibcast.calib import ArtifactError, BatchError, CalibcastError, RangeTable, calibrate
from calibcast.calib.artifacts import load_program, save_program
from calibcast.calib.printable import printable_lines
from calibcast.engines import Engine, build, cli
from calibcast.engines.cli import _OneStyle, _run
from calibcast.engines.commands.options import in_flags
from calibcast.engines.job.openers import _told
from calibcast.engines.locations import load_function
from calibcast.engines.review.frame_output import encoded, spreadsheet_text
from calibcast.passes import PrecisionPlan, classify, insert_casts
from calibcast.passes.rules import matched
from torch import nn

EVIL = '=HYPERLINK("http:||x|?" & A1)\x1b[31m\x9b2J\u202e'


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Range table, plan and engine of a program whose module has an evil name."""
    folder = tmp_path_factory.mktemp("evil")
    net = nn.Sequential()
    net.add_module(EVIL.replace(".", "|"), nn.Linear(4, 4))
    program = torch.export.export(net.eval(), (torch.randn(2, 4),))
    ranges = calibrate(program, [torch.randn(2, 4) * 1e4], progress=False)
    plan = classify(program, ranges)
    ranges.save(folder / "r.parquet")
    plan.save(folder / "p.json")
    mixed = insert_casts(program, plan)
    build(mixed, plan, ranges, backend="eager").save(folder / "engine")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "r.parquet"], ["report", "r.parquet", "--format", "json"],
        ["report", "r.parquet", "--format", "csv"],
        ["report", "r.parquet", "--plan", "p.json"], ["diff", "r.parquet", "r.parquet"], ["diff", "p.json", "p.json"],
        ["inspect", "engine"], ["report", "p.json"],
    ],
)  # fmt: skip
def test_no_output_holds_what_a_terminal_obeys(files, monkeypatch, capsys, arguments):
    monkeypatch.chdir(files)
    _run(arguments)
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert said
    assert said.replace("\n", "").isprintable()


def test_json_still_has_the_name(files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    _run(["report", "r.parquet", "--format", "json"])
    modules = {row["module"] for row in json.loads(capsys.readouterr().out)}
    assert any(module and "\x9b2J\u202e" in module for module in modules)


def test_no_cell_is_a_formula():
    texts = ["=1+1", "@SUM(A1)", "+1", "-1", "\t=1", " =1", "\r1", "\uff1d1", "plain", "a=b", "\x1b[31m"]
    frame = pl.DataFrame({"text": texts, "number": [-1.0] * len(texts), "list": [["-1"]] * len(texts)})
    back = pl.read_csv(io.BytesIO(encoded(frame, str, "csv")))
    assert [text[0] == "'" for text in back["text"]] == [True] * 8 + [False] * 3
    assert back["number"].to_list() == [-1.0] * len(texts)
    assert set(back["list"]) == {"'-1"}
    assert spreadsheet_text("\x1b[31m") == "\ufffd[31m"


def test_logs_are_printable():
    record = logging.LogRecord("calibcast", 30, "", 0, "node %s", ("a\x1b[31m\nb",), None)
    assert _OneStyle("%(message)s").format(record) == "warning: node a\ufffd[31m\nb"
    assert printable_lines("a\tb\r\nc") == "a b\ufffd\nc"


def test_a_full_device_is_one_line(files):
    command = [sys.executable, "-m", "calibcast", "report", "r.parquet"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=files, timeout=900)
    assert done.returncode == 1
    assert done.stderr == "error: the output cannot be written: No space left on device\n"


def test_a_wrong_model_is_told_without_torch(files):
    script = "import sys; from calibcast.engines.cli import _run; print(_run(sys.argv[1:]), 'torch' in sys.modules)"
    for arguments in (["plan", "no.pt2"], ["calibrate", "no.py:x", "--data", "no.py:y", "-o", "r.parquet"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=files, timeout=900
        )
        assert done.stdout == "2 False\n", done.stderr


def test_a_users_file_is_imported_once_and_stems_do_not_clash(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "user.py").write_text(
            f"loaded = []\ndef first(): return '{name}', loaded\ndef second(): return '{name}', loaded\n"
        )
    first, second = (load_function(f"{tmp_path}/a/user.py:{name}") for name in ("first", "second"))
    other = load_function(f"{tmp_path}/b/user.py:first")
    assert first()[1] is second()[1]
    assert (first()[0], other()[0]) == ("a", "b")
    assert sys.modules[first.__module__] is not sys.modules[other.__module__]
    (tmp_path / "a/user.py").write_text("def first(): return 'changed', None\n")
    assert load_function(f"{tmp_path}/a/user.py:first")()[0] == "changed"


def test_a_wrong_file_is_named_as_what_it_is(files, tmp_path):
    with pytest.raises(ArtifactError, match="is a plan; a range table was expected"):
        RangeTable.load(files / "p.json")
    with pytest.raises(ArtifactError, match="is a range table; a plan was expected"):
        PrecisionPlan.load(files / "r.parquet")
    with pytest.raises(ArtifactError, match="is a plan; an exported program was expected"):
        load_program(files / "p.json")
    program = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),))
    save_program(program, tmp_path / "m.pt2")
    with pytest.raises(ArtifactError, match="is an exported program; a range table was expected"):
        RangeTable.load(tmp_path / "m.pt2")


def test_images_with_their_channels_last_are_permuted_not_exported_anew():
    program = torch.export.export(nn.Conv2d(3, 4, 3).eval(), (torch.randn(2, 3, 16, 20),))
    with pytest.raises(BatchError, match=r"channels come last.*\.permute\(0, 3, 1, 2\) in transform="):
        calibrate(program, [torch.randn(2, 16, 20, 3)], progress=False)
    engine = build(program, backend="eager")
    assert isinstance(engine, Engine)
    with pytest.raises(BatchError, match=r"\.permute\(0, 3, 1, 2\) before the call"):
        engine(torch.randn(2, 16, 20, 3))


def test_many_patterns_compile_once(monkeypatch):
    from calibcast.passes import rules

    rules._compiled.cache_clear()
    patterns = tuple(f"^name_{number}$" for number in range(700))
    assert [matched(patterns, f"name_{number}", "") for number in range(700)] == list(patterns)
    assert rules._compiled.cache_info().misses == 700


@pytest.mark.parametrize(
    ("python", "flags"),
    [
        ("Give transform=, a function; or cache=False.", "Give --transform, a function; or --no-cache."),
        ("data_max=-1.0: give a positive number", "--data-max -1.0: give a positive number"),
        ("Calibrate with rounding_batches=4.", "Calibrate with --rounding-batches 4."),
        ("backend='eager' has nothing; use ahead_of_time=True", "--backend eager has nothing; use --ahead-of-time"),
        ("or leave min_sqnr_db out", "or leave --min-sqnr-db out"),
        ("transform=lambda b: b[0]", "--transform FILE.py:FUNCTION, a function such as lambda b: b[0]"),
        ("known are torch.float16 and torch.bfloat16", "known are fp16 and bf16"),
        ("there is no node 'data_max'; the output model.data_max, rows", None),
        ("the export needs dynamic_shapes=", None),
    ],
)
def test_messages_of_the_command_line_speak_of_flags(python, flags):
    assert in_flags(python, cli._flags()) == (flags or python)


def test_every_option_is_known_to_messages_by_its_python_name():
    flags = cli._flags()
    assert flags["low_precision_type"] == "--low-precision-type"
    assert flags["no_cache"] == "--no-cache"
    assert {"transform", "max_batches", "device", "range_quantile", "on_failure", "wide_accumulation"} <= set(flags)


@pytest.mark.parametrize("arguments", [["--version"], ["-h"], ["plan", "-h"]])
def test_every_command_line_has_version_and_help(capsys, arguments):
    assert _run(arguments) == 0
    assert "calibcast" in capsys.readouterr().out


@pytest.mark.parametrize(
    "dtype", ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float16", "int64", "bool", "uint8"]
)
def test_inputs_of_any_type_are_looked_at(dtype):
    from calibcast.engines.job.trust import _extremes

    value = torch.tensor([0, 1, 1]).to(getattr(torch, dtype))
    assert _extremes(value) == (0.0, 1.0)


def _fails_as_datasets_does():
    with _told("images"):
        try:
            raise OSError("cannot identify image file a.png")
        except OSError as error:
            raise RuntimeError("it failed") from error


def test_the_cause_of_a_failed_image_folder_is_told():
    with pytest.raises(CalibcastError, match=r"it failed, from OSError: cannot identify image file a\.png"):
        _fails_as_datasets_does()


def test_what_torch_logs_of_a_failed_export_is_kept_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(
        "import torch\nclass N(torch.nn.Module):\n    def forward(self, x):\n        return x if x.sum() > 0 else 1\n"
        "def net(): return N(), (torch.randn(2, 4),)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "calibcast", "plan", "bad.py:net"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "bad.py:4)" in done.stderr
