"""The command line: stages through files, exit codes, and errors that are one message."""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from calibcast.engines.cli import _run
from torch import nn

USER_FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
    def forward(self, x):
        return self.linear(x) * 2

def model():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(5, 4),)

def exported():
    return torch.export.export(*model())

def data():
    torch.manual_seed(1)
    return [(torch.randn(5, 4), "label") for _ in range(3)]

def other():
    torch.manual_seed(2)
    return [(torch.randn(5, 4), "label") for _ in range(2)]

def failing():
    yield torch.randn(5, 4)
    yield torch.randn(5, 4)
    raise OSError("the disk is gone")

def raises():
    raise KeyError("no such split")

def number():
    return 3

def pick(batch):
    return batch[0]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "user.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments):
    code = _run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_stages_through_files(here, capsys):
    data = ("--data", "user.py:data", "--transform", "user.py:pick")
    assert run(capsys, "calibrate", "user.py:model", *data, "-o", "r.parquet")[0] == 0
    code, out, _ = run(capsys, "plan", "user.py:exported", "r.parquet", "-o", "p.json", "--data-max", "100")
    assert code == 0
    assert "2 float16, 0 high" in out
    code, out, _ = run(
        capsys, "build", "user.py:model", "p.json", "-o", "engine", "--ranges", "r.parquet", "--backend", "eager"
    )
    assert code == 0
    assert "wrote engine" in out
    held = ("--data", "user.py:other", "--transform", "user.py:pick")
    code, out, _ = run(capsys, "verify", "engine", "user.py:model", *held, "--min-sqnr-db", "40", "-o", "v.json")
    assert code == 0
    saved = json.loads(Path("v.json").read_text())
    assert saved["passed"] is True
    assert saved["outputs"][0]["sqnr_db"] > 40
    code, out, _ = run(capsys, "report", "r.parquet", "--plan", "p.json")
    assert code == 0
    assert "linear" in out
    assert max(map(len, out.splitlines())) <= 110


def test_a_pt2_file_is_a_model(here, capsys):
    torch.export.save(torch.export.export(nn.Linear(4, 2), (torch.randn(5, 4),)), "net.pt2")
    code, _, _ = run(
        capsys, "calibrate", "net.pt2", "--data", "user.py:data", "--transform", "user.py:pick", "-o", "r.parquet"
    )
    assert code == 0
    assert pl.read_parquet("r.parquet")["node"].to_list() == ["p_weight", "p_bias", "input", "linear"]


def test_the_gate_is_exit_code_3_and_tells_the_number(here, capsys):
    run(
        capsys, "calibrate", "user.py:model", "--data", "user.py:data", "--transform", "user.py:pick", "-o", "r.parquet"
    )
    run(capsys, "plan", "user.py:model", "r.parquet", "-o", "p.json")
    run(capsys, "build", "user.py:model", "p.json", "-o", "engine", "--backend", "eager")
    held = ("--data", "user.py:other", "--transform", "user.py:pick")
    code, out, err = run(capsys, "verify", "engine", "user.py:model", *held, "--min-sqnr-db", "200")
    assert code == 3
    assert "required at least 200" in err
    assert "Traceback" not in err
    assert "sqnr_db" in out


def test_a_failing_loader_keeps_what_was_measured(here, capsys):
    code, _, err = run(capsys, "calibrate", "user.py:model", "--data", "user.py:failing", "-o", "r.parquet")
    assert code == 1
    assert "raised OSError at batch 2, after 2 good batches: the disk is gone" in err
    assert not Path("r.parquet").exists()
    partial = pl.read_parquet("r.partial.parquet")
    assert set(partial.filter(pl.col("kind") == "activation")["batches"]) == {2}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan"], 2, "Missing argument"),
        (["nonsense"], 2, "No such command"),
        (["plan", "net.onnx"], 2, "give a .pt2 file or file.py:function"),
        (["plan", "user.py:modle"], 2, "no function 'modle'; near names: model"),
        (["plan", "nobody.py:model"], 2, "there is no file nobody.py"),
        (["plan", "missing.pt2"], 2, "no such file"),
        (["verify", "nowhere", "user.py:model", "--data", "user.py:data"], 2, "no such folder"),
        (["inspect", "."], 2, "is not an engine folder"),
        (["build", "user.py:model", "p.json", "-o", "e", "--backend", "trt"], 2, "known are auto, tensorrt"),
        (["build", "user.py:model", "p.json", "-o", "e", "--on-failure", "x"], 2, "known are error, fallback"),
        (
            ["calibrate", "user.py:model", "--data", "user.py:data", "-o", "r", "--on-nonfinite", "x"],
            2,
            "known are warn",
        ),
        (["plan", "user.py:number"], 1, "returned a int"),
        (["plan", "user.py:raises"], 1, "user.py:raises raised KeyError"),
        (["plan", "user.py:model", "-o", "no/such/p.json"], 2, "there is no folder"),
        (["plan", "user.py:model", "--low-precision-type", "int8"], 2, "--low-precision-type int8: known are fp16"),
        (["plan", "user.py:model", "--range-quantile", "2"], 2, "--range-quantile 2.0: give a share"),
        (["plan", "user.py:model", "--max-depth-of-reduction", "0"], 2, "--max-depth-of-reduction 0: give"),
        (["plan", "user.py:model", "missing.parquet"], 2, "missing.parquet: no such file; expected a ranges file"),
        (["plan", "user.py:model", "."], 2, ". is a folder without manifest.json; a range table was expected"),
        (["plan", "user.py:model", "-o", "."], 2, ". is a folder; give the name of a file"),
        (["build", "user.py:model", "missing.json", "-o", "e"], 2, "missing.json: no such file; expected a plan"),
        (["diff", "missing.parquet", "missing.json"], 2, "missing.parquet: no such file"),
        (["merge", "missing.parquet", "-o", "m.parquet"], 2, "or a job's checkpoint"),
        (["what-if", "missing.parquet", "--program", "user.py:model"], 2, "no such file"),
        (["rescale", "user.py:model", "missing.parquet", "-o", "m.pt2"], 2, "no such file"),
        (["export", "user.py:model", "--onnx", "m.onnx", "--plan", "missing.json"], 2, "no such file"),
        (
            ["calibrate", "user.py:model", "--data", "user.py:data", "-o", "r", "--device", "gpu"],
            2,
            "--device gpu: give cpu",
        ),
        (["plan", "user.py:model", "--nodes-to-exclude", "^linaer"], 2, "near names: linear"),
        (
            ["plan", "user.py:model", "--wide-accumulation", "layernorm"],
            2,
            "--wide-accumulation: 'layernorm' is no operator that sums; near names: layer_norm",
        ),
        (["plan", "user.py:model", "--data-max", "-1"], 2, "--data-max -1.0: give a positive number"),
        (["plan", "user.py:model", "user.py"], 2, "user.py is a text file; a range table was expected"),
        (["calibrate", "user.py:model", "--data", "user.py:number", "-o", "r.parquet"], 1, "cannot be iterated"),
        (["calibrate", "user.py:model", "--data", "user.py:data", "-o", "r.parquet"], 1, "got 2 inputs"),
        (["build", "user.py:model", "user.py", "-o", "engine"], 2, "user.py is a text file; a plan was expected"),
        (["init", "user.py"], 2, "user.py is a file; give the name of a folder"),
        (["demo", "-o", "user.py"], 2, "user.py is a file; give the name of a folder"),
        (["report", "missing.parquet"], 2, "no such file"),
        (["report", "missing.parquet", "--plan", "p.json"], 2, "no such file"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing_behind(here, capsys, arguments, code, message):
    before = {path.name for path in here.iterdir()}
    found, _, err = run(capsys, *arguments)
    assert found == code
    assert message in err
    assert "Traceback" not in err
    assert {path.name for path in here.iterdir()} - {"__pycache__"} == before - {"__pycache__"}


def test_a_setting_that_the_backend_does_not_have_is_a_bad_command_line(here, capsys):
    """Told before anything is read."""
    (here / "p.json").write_text('{"calibcast": "plan"}')
    code, _, err = run(capsys, "build", "user.py:model", "p.json", "-o", "e", "--backend", "eager", "--setting", "z=1")
    assert (code, "--setting: --backend eager takes no setting but device; got z" in err) == (2, True)


@pytest.mark.parametrize("command", ["calibrate", "plan", "build", "verify", "diagnose", "report", "demo"])
def test_help_teaches(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "Example: calibcast" in out or command == "demo"


def test_a_plan_of_another_model_is_refused(here, capsys):
    torch.export.save(torch.export.export(nn.Linear(4, 2), (torch.randn(5, 4),)), "net.pt2")
    run(capsys, "plan", "net.pt2", "-o", "p.json")
    code, _, err = run(capsys, "build", "user.py:model", "p.json", "-o", "engine")
    assert code == 1
    assert "this plan is for another program" in err
    assert not Path("engine").exists()


def test_plan_and_diagnosis_show_hostile_module_names_as_text(here, capsys):
    (here / "hostile.py").write_text(
        "import torch\n"
        "def model():\n"
        "    net = torch.nn.Sequential()\n"
        "    net.add_module('a\\nb\\x1b[31m', torch.nn.Linear(4, 2))\n"
        "    return net.eval(), (torch.randn(5, 4),)\n"
        "def large():\n"
        "    return [torch.full((5, 4), 1e6)]\n"
    )
    code, out, _ = run(capsys, "plan", "hostile.py:model", "--nodes-to-exclude", ".*")
    assert code == 0
    (line,) = [line for line in out.splitlines() if "linear" in line]
    assert "a\ufffdb\ufffd[31m" in line
    assert run(capsys, "plan", "hostile.py:model", "-o", "p.json")[0] == 0
    code, out, _ = run(capsys, "diagnose", "hostile.py:model", "p.json", "--data", "hostile.py:large")
    assert code == 0
    assert "linear" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_have_their_exit_codes(here, name, code):
    (here / "slow.py").write_text(
        "import os, signal, time\n"
        "def data():\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    time.sleep(5)\n"
        "    return []\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "calibcast",
            "calibrate",
            "user.py:model",
            "--data",
            "slow.py:data",
            "-o",
            "r.parquet",
        ],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / ".package")},
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_no_command_at_all_shows_the_help_and_no_error(capsys):
    code, out, err = run(capsys)
    assert code == 2
    assert err.startswith("Usage: ")
    assert "error:" not in out + err
    assert "See: " not in err
