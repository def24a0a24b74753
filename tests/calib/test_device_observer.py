"""The fused GPU kernel gives what the host kernel gives. Without a GPU, Triton's interpreter runs it, slowly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = Path(__file__).parent / "fused_against_host.py"


def test_the_fused_kernel_measures_what_the_host_measures():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr[-3000:]
