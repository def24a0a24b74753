"""A job of several models, each with its data: one manifest and one verdict. And recorded calls as a job's data."""

import json
import os

import pytest
import torch
from calibcast.calib import recorded
from calibcast.engines import Engine
from calibcast.engines.cli import _run
from calibcast.engines.engine import read_manifest
from calibcast.engines.io_names import size_names
from calibcast.engines.job.errors import JobError
from calibcast.engines.job.job_file import load_job, load_jobs

from tests.unwrapped import unwrapped

MODELS = """
[data]
folder = "rows"
batch_size = 2
transform = "functions.py:note"

[build]
backend = "eager"

[verification]
min_sqnr_db = 30.0

[output]
folder = "out"

[[models]]
name = "first"
location = "functions.py:model"

[[models]]
name = "second"
location = "functions.py:model"
arguments = {seed = 1}
data = {batch_size = 4}
verification = {min_sqnr_db = %s}
"""


@pytest.fixture
def several(tmp_path, make_job):
    job = make_job(tmp_path, count=20)

    def written(bound="30.0", **changes):
        text = MODELS % bound
        for old, new in changes.items():
            text = text.replace(old, new)
        job.write_text(text)
        return job

    return written


def manifest(job):
    return json.loads((job.parent / "out" / "manifest.json").read_text())


def test_each_model_gets_its_stages_and_all_get_one_verdict(several, capsys):
    job = several()
    assert _run(["run", str(job)]) == 0
    found = manifest(job)
    assert found["status"] == "done"
    assert list(found["models"]) == ["first", "second"]
    assert found["models"]["second"]["folder"] == "second"
    for name in ("first", "second"):
        assert json.loads((job.parent / "out" / name / "manifest.json").read_text())["status"] == "done"
        assert "verify" in found["models"][name]["stages"]
    out = capsys.readouterr().out
    assert "model       first: functions.py:model" in out
    assert "out/manifest.json" in out
    assert _run(["run", str(job)]) == 0
    assert capsys.readouterr().out.count("skipped, as nothing changed") == 10
    assert _run(["run", str(job), "--dry-run"]) == 0
    assert "model       second" in capsys.readouterr().out


def test_a_gate_of_one_model_is_the_verdict_of_all_and_the_others_are_made(several, capsys):
    job = several("300.0")
    assert _run(["run", str(job)]) == 3
    found = manifest(job)
    assert found["status"] == "rejected"
    assert [found["models"][name]["status"] for name in ("first", "second")] == ["done", "rejected"]
    assert "required at least 300" in found["models"]["second"]["reason"]
    assert "second: " in capsys.readouterr().err


def test_a_model_that_fails_stops_no_other(several, capsys):
    job = several(**{"arguments = {seed = 1}": "arguments = {nonsense = 1}"})
    assert _run(["run", str(job)]) == 1
    assert manifest(job)["status"] == "failed"
    assert manifest(job)["models"]["first"]["status"] == "done"
    assert "nonsense" in capsys.readouterr().err


def test_a_dry_run_looks_at_all_models_and_says_which_one_is_wrong(several, capsys):
    job = several(**{'name = "first"\nlocation': 'name = "first"\narguments = {nonsense = 1}\nlocation'})
    assert _run(["run", str(job), "--dry-run"]) == 1
    said = capsys.readouterr()
    assert "model       first: " in said.out
    assert "second" in said.out.split("nonsense", 1)[1]
    assert "verify      verification.json: would be made" in said.out
    assert "first: " in said.err


def test_the_folder_of_a_job_given_for_its_engine_is_told_where_that_is(several, capsys):
    job = several()
    assert _run(["run", str(job)]) == 0
    folder = job.parent / "out" / "first"
    assert _run(["inspect", str(folder)]) == 2
    assert f"an engine folder was expected: give {folder / 'engine'}" in unwrapped(capsys.readouterr().err)
    assert _run(["inspect", str(job.parent / "out")]) == 2
    assert ": give " not in capsys.readouterr().err


DYNAMIC = """
import torch
from torch.export import Dim
def model():
    return torch.nn.Linear(4, 3).eval(), (torch.ones(2, 4),), None, ({0: Dim("rows", min=1, max=8)},)
def loader():
    return [torch.ones(2, 4), torch.ones(3, 4)]
"""


def test_sizes_keep_the_callers_names_through_a_job(tmp_path):
    """A .pt2, which a job's stages hand on, has no place for them."""
    (tmp_path / "net.py").write_text(DYNAMIC)
    job = tmp_path / "job.toml"
    job.write_text(
        '[model]\nlocation = "net.py:model"\n[data]\nloader = "net.py:loader"\nheld_out_share = 0.0\n'
        '[build]\nbackend = "eager"\n[output]\nfolder = "out"\n'
    )
    assert _run(["run", str(job)]) == 0
    assert list(read_manifest(tmp_path / "out" / "engine")["size_names"].values()) == ["rows"]
    engine = Engine.load(tmp_path / "out" / "engine")
    assert list(size_names(engine.program).values()) == ["rows"]
    engine.save(tmp_path / "again")
    assert list(read_manifest(tmp_path / "again")["size_names"].values()) == ["rows"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({'name = "second"': 'name = "first"'}, "two of .* are called first"),
        ({'name = "second"': 'name = "../x"'}, "has a name of letters"),
        ({'name = "second"': ""}, "has a name of letters"),
        ({"data = {batch_size = 4}": "dato = {}"}, r"second: unknown key 'dato'; there are name, location"),
        ({"data = {batch_size = 4}": "data = {batch_sise = 4}"}, r"the model second:\n.*unknown key 'batch_sise'"),
        ({"[data]": '[model]\nlocation = "x.py:y"\n[data]'}, r"both \[model\] and \[\[models\]\]"),
    ],
)
def test_mistakes_are_told_with_the_model(several, change, message):
    with pytest.raises(JobError, match=message):
        load_jobs(several(**change))


def test_tables_of_a_model_go_over_those_of_the_file(several):
    first, second = load_jobs(several())
    assert (first.job.data.batch_size, second.job.data.batch_size) == (2, 4)
    assert second.job.data.transform == "functions.py:note"
    assert first.job.output.folder == "out/first"
    assert second.job.model.arguments == {"seed": 1}
    with pytest.raises(JobError, match="a job of several models"):
        load_job(several())


def test_a_job_reads_recorded_calls(tmp_path, make_job):
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 2)
    with recorded(module, tmp_path / "calls"):
        for _ in range(10):
            module(torch.randn(3, 4))
    job = make_job(tmp_path, data='recorded = "calls"')
    assert _run(["run", str(job)]) == 0
    found = manifest(job)
    assert found["stages"]["calibrate"]["result"]["summary"].startswith("RangeTable")
    assert _run(["run", str(job)]) == 0
    (tmp_path / "functions.py").touch()
    calls = sorted((tmp_path / "calls").glob("*.safetensors"))
    os.utime(calls[0], (1, 1))
    assert _run(["run", str(job), "--dry-run"]) == 0
