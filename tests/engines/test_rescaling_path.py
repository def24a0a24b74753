"""Rescaling through all that is built on it: compile, the command line, a job, diff."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibcast.calib.calibration import calibrate
from calibcast.calib.errors import SettingError
from calibcast.calib.range_diff import range_diff
from calibcast.calib.ranges import RangeTable
from calibcast.engines import cli
from calibcast.engines.compilation import compile as compile_engine
from calibcast.engines.judging.verification import verify
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.rescaling.rescaling import rescale
from torch import nn
from torch.export import ExportedProgram

MODEL = """
import torch
from torch import nn

class Large(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.first.weight.mul_(1e5)

    def forward(self, x):
        return self.last(nn.functional.layer_norm(torch.relu(self.first(x)), (16,)))

def model():
    return Large().eval(), (torch.zeros(4, 16),)

def data():
    return [torch.randn(4, 16, generator=torch.Generator().manual_seed(i)) for i in range(5)]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(MODEL)
    return tmp_path


def example(folder: Path) -> tuple[nn.Module, ExportedProgram, list[torch.Tensor]]:
    space: dict[str, Any] = {}
    exec(MODEL, space)
    module, args = space["model"]()
    return module, torch.export.export(module, args), space["data"]()


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_compile_rescales_and_verify_compares_with_the_original(folder: Path) -> None:
    """The engine's plan is all low where the original's is not, and its error is that of rounding."""
    module, program, data = example(folder)
    options: dict[str, Any] = {"calibration_dataloader": data, "backend": "eager", "rounding_batches": 0}
    plain = compile_engine(module, (data[0],), **options)
    fitted = compile_engine(module, (data[0],), rescale="auto", **options)
    assert plain.plan is not None
    assert fitted.plan is not None
    assert plain.plan.high_precision_nodes
    assert not fitted.plan.high_precision_nodes
    assert verify(fitted, program, data, progress=False).frame["sqnr_db"].min() > 45
    assert fitted.ranges is not None
    assert fitted.ranges.calibration.rescaled is not None
    with pytest.raises(SettingError, match="rescale='on'"):
        compile_engine(module, (data[0],), rescale="on", **options)


def test_command_writes_program_ranges_and_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, ranges, fitted = f"{folder}/net.py:model", folder / "r.parquet", folder / "fitted.pt2"
    data = f"{folder}/net.py:data"
    assert run("calibrate", model, "--data", data, "-o", ranges, "--rounding-batches", 0) == 0
    assert run("rescale", model, ranges, "-o", fitted) == 0
    assert "fp32 nodes" in capsys.readouterr().out
    assert run("plan", fitted, folder / "fitted.parquet", "-o", folder / "p.json") == 0
    assert not PrecisionPlan.load(folder / "p.json").high_precision_nodes
    assert run("plan", model, ranges, "--rescale", "-o", folder / "q.json") == 0
    assert not PrecisionPlan.load(folder / "q.json").high_precision_nodes
    assert (folder / "q.pt2").exists()
    assert "rescaled program: these are not the true values" in str(RangeTable.load(folder / "q.parquet"))
    assert run("plan", model, "--rescale", "-o", folder / "q.json") == 2


def test_diff_of_a_rescaled_table_speaks_of_true_values(folder: Path) -> None:
    _, program, data = example(folder)
    ranges = calibrate(program, data, rounding_batches=0, progress=False)
    fitted = rescale(program, ranges)
    assert fitted.changed
    found = range_diff(ranges, fitted.ranges)
    assert found.counts["same"] == len(ranges)
    assert found.same_graph


def test_job_rescales(folder: Path) -> None:
    """`rescale = "auto"` in [plan]: the rescaled program and its ranges are artifacts."""
    (folder / "job.toml").write_text(
        '[model]\nlocation = "net.py:model"\n[data]\nloader = "net.py:data"\nheld_out_share = 0.4\n'
        '[calibration]\nrounding_batches = 0\n[plan]\nrescale = "auto"\n[build]\nbackend = "eager"\n'
        '[verification]\nmin_sqnr_db = 45.0\n[output]\nfolder = "out"\n'
    )
    assert run("run", folder / "job.toml") == 0
    assert not PrecisionPlan.load(folder / "out" / "plan.json").high_precision_nodes
    table = RangeTable.load(folder / "out" / "rescaled.parquet")
    assert table.true_values() == RangeTable.load(folder / "out" / "ranges.parquet")
    assert run("run", folder / "job.toml") == 0
