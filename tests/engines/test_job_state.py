"""A model with state, calibrated and verified over the sequences that its batches are: in a job, and by commands."""

import json

import pytest
from calibcast.calib.ranges import RangeTable
from calibcast.engines.cli import _run
from calibcast.engines.job.checks import check_job
from calibcast.engines.job.errors import JobError
from calibcast.engines.job.job_file import load_job
from calibcast.engines.locations import load_model
from calibcast.passes.plan import PrecisionPlan

USER_FILE = """
import os
import torch
from calibcast.calib.sequences import NewSequence

class Sum(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        self.total.add_(x)
        return self.total * 2

def model():
    return Sum().eval(), (torch.ones(4),)

def steps():
    for step in range(6):
        if step == 4 and "BREAK" in os.environ:
            raise OSError("the network is gone")
        yield torch.ones(4)

def two_sequences():
    return [NewSequence(torch.ones(4)) if step % 3 == 0 else torch.ones(4) for step in range(6)]

def begin_at_three(x):
    begin_at_three.calls += 1
    return NewSequence((x,)) if begin_at_three.calls % 3 == 1 else (x,)

begin_at_three.calls = 0
"""

JOB = """
[model]
location = "functions.py:model"

[data]
loader = "functions.py:{loader}"
held_out_share = 0.0
{data}

[held_out]
loader = "functions.py:two_sequences"

[calibration]
carry_state = {carry}
rounding_batches = 0

[build]
backend = "eager"

[output]
folder = "out"
"""


@pytest.fixture
def job(tmp_path):
    (tmp_path / "functions.py").write_text(USER_FILE)

    def written(loader="steps", carry="true", data="", text=JOB):
        path = tmp_path / "job.toml"
        path.write_text(text.format(loader=loader, carry=carry, data=data))
        return path

    return written


def peak(folder):
    table = RangeTable.load(folder / "ranges.parquet")
    return table.frame.filter(table.frame["node"] == "mul")["absmax"][0]


@pytest.mark.parametrize(
    ("loader", "carry", "data", "reached"),
    [
        ("steps", "false", "", 2.0),
        ("steps", "true", "", 12.0),
        ("two_sequences", "true", "", 6.0),
        ("steps", "true", 'transform = "functions.py:begin_at_three"', 6.0),
    ],
)
def test_a_job_measures_a_model_over_its_sequences(job, tmp_path, loader, carry, data, reached):
    assert _run(["run", str(job(loader, carry, data))]) == 0
    assert peak(tmp_path / "out") == reached
    told = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert told["batches"] == 6


def test_another_carry_state_makes_calibration_and_verification_anew(job, tmp_path, capsys):
    assert _run(["run", str(job(carry="false"))]) == 0
    assert _run(["run", str(job(carry="true"))]) == 0
    assert peak(tmp_path / "out") == 12.0


def test_a_job_with_state_that_ended_early_begins_anew(job, tmp_path, capsys, monkeypatch):
    """What the batches before have left is in no checkpoint: going on from one would measure another sequence."""
    monkeypatch.setenv("BREAK", "1")
    assert _run(["run", str(job())]) != 0
    assert list((tmp_path / "out" / "checkpoints").glob("*.npz"))
    monkeypatch.delenv("BREAK")
    assert _run(["run", str(job())]) == 0
    assert "starting again: with carry_state" in capsys.readouterr().err
    assert peak(tmp_path / "out") == 12.0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("held_out_share = 0.0", "held_out_share = 0.2", "out of the middle of sequences"),
        ('loader = "functions.py:{loader}"', 'folder = "rows"\nshuffle = true\nseed = 0', "tears sequences apart"),
    ],
)
def test_data_that_would_tear_sequences_apart_are_refused(job, old, new, said):
    text = JOB.replace(old, new)
    if "shuffle" in new:
        text = text.replace('loader = "functions.py:two_sequences"', 'folder = "rows"')
    else:
        text = text.replace('[held_out]\nloader = "functions.py:two_sequences"\n', "")
    with pytest.raises(JobError, match=said):
        load_job(job(text=text))


def test_two_processes_cannot_share_a_sequence(job):
    file = load_job(job())
    program = load_model(file.function("functions.py:model"))
    check_job(file, program)
    with pytest.raises(JobError, match="2 processes would share them out: start one"):
        check_job(file, program, processes=2)


def test_the_commands_carry_state_when_asked_to(job, tmp_path, capsys):
    job()
    model, data = f"{tmp_path}/functions.py:model", f"{tmp_path}/functions.py:steps"
    ranges, plan, engine = (str(tmp_path / name) for name in ("ranges.parquet", "plan.json", "engine"))
    for options, reached in (([], 2.0), (["--carry-state"], 12.0)):
        assert _run(["calibrate", model, "--data", data, "-o", ranges, "--rounding-batches", "0", *options]) == 0
        assert peak(tmp_path) == reached
    assert _run(["plan", model, ranges, "-o", plan]) == 0
    assert _run(["build", model, plan, "--ranges", ranges, "-o", engine, "--backend", "eager"]) == 0
    assert _run(["verify", engine, model, "--data", data, "--carry-state"]) == 0
    assert "6 batches" in capsys.readouterr().out


def test_a_job_proves_its_plan_over_the_sequence(job, tmp_path):
    """Errors in what the model keeps are in the proof; so are checks of rescaling, which run the same batches."""
    text = JOB.replace("rounding_batches = 0", "rounding_batches = 2") + '[plan]\nrescale = "auto"\n'
    for carry in ("true", "false"):
        assert _run(["run", str(job(carry=carry, text=text))]) == 0
        proof = PrecisionPlan.load(tmp_path / "out" / "plan.json").proof
        assert (proof.batches, proof.carry_state) == (6, carry == "true")


def test_the_command_proves_a_plan_over_the_sequence(job, tmp_path, capsys):
    job()
    model, data = f"{tmp_path}/functions.py:model", f"{tmp_path}/functions.py:steps"
    ranges, plan = str(tmp_path / "ranges.parquet"), str(tmp_path / "plan.json")
    assert _run(["calibrate", model, "--data", data, "-o", ranges, "--carry-state"]) == 0
    assert _run(["plan", model, ranges, "--data", data, "--carry-state", "--rescale", "-o", plan]) == 0
    assert "in sequence" in capsys.readouterr().out
    assert PrecisionPlan.load(plan).proof.carry_state
    assert _run(["rescale", model, ranges, "--data", data, "--carry-state", "-o", str(tmp_path / "fit.pt2")]) == 0
