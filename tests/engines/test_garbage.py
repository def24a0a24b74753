"""Python looks for garbage rarely while a command starts, as usual in the user's own code, and not at the end."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
from calibcast.engines.cli import main
from calibcast.engines.locations import load_model

MODEL = """
import gc, torch
print("in the model", gc.get_threshold(), gc.get_freeze_count() > 100_000)
def model():
    return torch.nn.Linear(4, 3).eval(), (torch.ones(2, 4),)
def loader():
    return [torch.ones(2, 4)]
"""
COMMAND = """
import atexit, gc, sys
usual = gc.get_threshold()
atexit.register(lambda: print("at the end", gc.get_count()[0], file=sys.stderr))  # runs last
import pytest
from calibcast.engines.cli import main
sys.argv = ["calibcast", "calibrate", sys.argv[1] + ":model", "--data", sys.argv[1] + ":loader", "-o", sys.argv[2]]
try:
    main()
finally:
    assert gc.get_threshold() == usual
"""


def test_a_command_collects_rarely_until_the_model_is_loaded(tmp_path: Path) -> None:
    net = tmp_path / "net.py"
    net.write_text(MODEL)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(net), str(tmp_path / "r.parquet")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"in the model {gc.get_threshold()} True" in done.stdout + done.stderr
    assert "at the end 0" in done.stderr, "all is frozen, so nothing is young"


def test_a_process_that_calls_the_command_line_keeps_its_own_ways(tmp_path: Path) -> None:
    """And a user's own process that loads a model does, too."""
    before = gc.get_threshold(), gc.get_freeze_count()
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(tmp_path / "none.parquet")])
    net = tmp_path / "net.py"
    net.write_text(MODEL)
    load_model(f"{net}:model")
    assert (gc.get_threshold(), gc.get_freeze_count()) == before
