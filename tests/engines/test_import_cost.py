"""Who looks at a saved table does not wait for torch: neither report nor diff imports it, or what it brings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from calibcast.calib import RangeTable, calibrate
from torch import nn

from tests.unwrapped import unwrapped

ROOT = Path(__file__).parents[2]
SLOW = {"torch", "datasets", "jinja2", "numpy", "pandas", "plotly", "pyarrow", "sympy", "triton"}
# The command line as its entry point runs it, then what it has imported of the slow ones.
COMMAND = f"""
import sys
from calibcast.engines.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, end.code
print(sorted({SLOW!r} & set(sys.modules)), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two saved tables, the second with larger magnitudes, so that a decision flips."""
    folder = tmp_path_factory.mktemp("tables")
    torch.manual_seed(0)
    program = torch.export.export(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), (torch.ones(2, 4),))
    for name, scale in (("old", 1.0), ("new", 3000.0)):
        calibrate(program, [scale * torch.ones(2, 4)], progress=False).save(folder / f"{name}.parquet")
    return str(folder / "old.parquet"), str(folder / "new.parquet")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_report_imports_no_torch(tables: tuple[str, str]) -> None:
    """Filtered, sorted and as text."""
    done = run(COMMAND, "report", tables[1], "--above", "512", "--sort", "rms")
    assert "5 tensors over 1 batch" in done.stdout
    assert done.stderr.strip() == "[]"


def test_a_diff_imports_no_torch(tables: tuple[str, str]) -> None:
    """With the decisions that would flip, by the rules that look at tensors alone."""
    done = run(COMMAND, "diff", *tables, "--low-precision-type", "bf16")
    assert "decisions would flip (data_max 512" in done.stdout
    assert "reached 3000 in batch 0, above data_max 512" in unwrapped(done.stdout)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("arguments", [("--help",), ("report", "--help"), ("calibrate", "--help"), ("build", "--help")])
def test_help_imports_nothing_that_is_slow(arguments: tuple[str, ...]) -> None:
    """Help comes at once, polars not imported either."""
    done = run(COMMAND.replace("'torch'", "'torch', 'polars'"), *arguments)
    assert "Usage" in done.stdout
    assert done.stderr.strip() == "[]"


def test_a_refused_table_imports_no_torch(tables: tuple[str, str], tmp_path: Path) -> None:
    """The process that looks for what is wrong does not either: it answers with its own modules."""
    pl.read_parquet(tables[0]).write_parquet(tmp_path / "foreign.parquet")
    looking = (
        "import sys; from calibcast.calib.damage_report import main; main(sys.argv[1]); "
        "print(sorted(%r & set(sys.modules)))"
    )
    done = run(looking % SLOW, str(tmp_path / "foreign.parquet"))
    assert "was not written by calibcast" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_a_table_in_python_needs_no_torch(tables: tuple[str, str]) -> None:
    """The public names are there without being imported, and a table reads without torch."""
    script = f"""
import sys
from calibcast import calib, engines, passes
for package in (calib, passes, engines):
    assert set(package.__all__) <= set(dir(package)), package
from calibcast.calib import RangeTable
from calibcast.engines import report_frame
assert len(report_frame(RangeTable.load(sys.argv[1]))) == 5
print(sorted({SLOW!r} & set(sys.modules)))
"""
    assert run(script, tables[0]).stdout.strip() == "[]"
    assert len(RangeTable.load(tables[0])) == 5
