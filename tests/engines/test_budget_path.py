"""A budget on its way through the command line, a job, and a plan that `torch.autocast` would have made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calibcast import PrecisionPlan, calibrate, compare, insert_casts, tune
from calibcast.engines.cli import _run
from calibcast.engines.html_report import html_report
from calibcast.engines.html_report.payload import payload
from torch import nn

# A user who wants everything low, and 90 dB of it.
IMPOSSIBLE = ("--min-sqnr-db", "90", "--nodes-to-include", ".*")
DATA = """
import torch

def model():
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)
    return torch.nn.Sequential(*layers).eval(), (torch.randn(3, 4),)

def data():
    return [torch.randn(3, 4, generator=torch.Generator().manual_seed(n)) for n in range(3)]
"""


def _told(text: str) -> None:
    """The error names the budget, the best in each type, and the edges to blame."""
    assert "no plan meets the budget of 90 dB" in text
    assert "float16 gives" in text
    assert "with bfloat16 gives" in text
    assert "What costs most under the best plan" in text
    assert "->" in text


def test_plan_with_data_ends_with_3_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "user.py").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    assert _run(["calibrate", "user.py:model", "--data", "user.py:data", "-o", "r.parquet"]) == 0
    proving = ["plan", "user.py:model", "r.parquet", "--data", "user.py:data", "-o", "p.json"]
    capsys.readouterr()
    assert _run([*proving, *IMPOSSIBLE]) == 3
    _told(capsys.readouterr().err)
    assert not (tmp_path / "p.json").exists()
    assert _run([*proving, "--min-sqnr-db", "50"]) == 0
    assert "proven on 3 batches" in capsys.readouterr().out


def test_a_job_ends_with_3_and_its_manifest_says_why(
    tmp_path: Path, make_job: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, count=8, plan='min_sqnr_db = 90.0\nnodes_to_include = [".*"]')
    assert _run(["run", str(job)]) == 3
    _told(capsys.readouterr().err)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["status"] != "passed"
    assert "no plan meets the budget of 90 dB" in json.dumps(manifest)
    job.write_text(job.read_text().replace("90.0", "50.0"))
    assert _run(["run", str(job)]) == 0, "the calibration is not lost"
    assert "calibrate" in (out := capsys.readouterr().out)
    assert "skipped" in next(line for line in out.splitlines() if line.startswith("calibrate"))


def test_the_plan_of_autocast_goes_wherever_a_plan_goes() -> None:
    """`compare`, `tune` with it to start from, and the page."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    data = [torch.randn(8, 16) for _ in range(3)]
    program = torch.export.export(model, (data[0],))
    ranges = calibrate(program, data, progress=False)
    replay = PrecisionPlan.from_autocast(program, torch.float16)
    found = compare(program, insert_casts(program, replay), data, progress=False)
    assert found.frame["sqnr_db"].min() > 40
    plan = tune(program, ranges, data, start=replay)
    assert set(replay.high_precision_nodes) <= set(plan.high_precision_nodes)
    assert plan.proof is not None
    assert plan.proof.sqnr_db >= 40
    assert html_report(ranges, replay)
    assert "torch.autocast" in json.dumps(payload(ranges, replay))
