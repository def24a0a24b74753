"""A test that fails is named when it fails: whoever waits for twenty minutes of tests need not wait for the rest."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
TESTS = """
import pathlib, time, pytest

@pytest.fixture
def broken():
    raise OSError("no such thing")

def test_first():
    assert 1 + 1 == 3, "sums are off"

def test_second(broken):
    pass

def test_last():
    until = time.monotonic() + 800
    while not pathlib.Path("seen").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert time.monotonic() < until
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_failure_is_printed_before_the_run_ends(tmp_path: Path, workers: str) -> None:
    """The last test goes on until both lines were read."""
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    lines: list[str] = []
    assert process.stdout is not None
    until = time.monotonic() + 600
    for line in process.stdout:
        lines.append(line)
        if sum(line.startswith("FAILED test_some.py") for line in lines) == 2:
            break
        assert time.monotonic() < until
    (tmp_path / "seen").touch()
    rest, _ = process.communicate(timeout=900)
    said = "".join(lines)
    assert "FAILED test_some.py::test_first (call): AssertionError: sums are off" in said
    assert "FAILED test_some.py::test_second (setup): OSError: no such thing" in said
    assert "=== FAILURES" not in said
    assert "1 failed, 1 passed, 1 error" in rest
