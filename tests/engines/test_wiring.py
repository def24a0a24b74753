"""The wiring that the real builder's graphs get, held against the program: sizes, outputs, and state.

Nothing is run on a GPU: each engine is replaced by the graph that it was made of (`wiring_oracle.py`).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rtx_builder import has_builder

ORACLE = Path(__file__).with_name("wiring_oracle.py")
SEEDS = [str(seed) for seed in range(8)]
CASES = ["named", "listed", "twice", "doubled", "old", "cache", "returned", "put", "crossing"]

pytestmark = pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")


def rows(how, names):
    done = subprocess.run([sys.executable, ORACLE, how, *names], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["name"] for row in found] == names
    return {row["name"]: row for row in found}


@pytest.fixture(scope="module")
def built():
    return rows("by_builder", CASES + SEEDS)


@pytest.mark.parametrize("name", CASES + SEEDS)
def test_the_wired_parts_give_what_the_program_gives_over_several_calls(built, name):
    assert "error" not in built[name], built[name]
    assert built[name]["worst"] == 0


def profile(built, name, engine):
    (given,) = built[name]["profiles"]
    return given[engine]


@pytest.mark.parametrize(
    ("name", "engine", "rows"),
    [("named", "_run_on_acc_0", (4, 7, 7)), ("twice", "_run_on_acc_0", (4, 7, 7)),
     ("twice", "_run_on_acc_2", (8, 14, 14)), ("listed", "_run_on_acc_0", (4, 7, 7))],
)  # fmt: skip
def test_every_engine_is_built_for_the_sizes_that_calibration_saw(built, name, engine, rows):
    """Exported with 9 rows of 2 to 512, calibrated on 4, 7 and 7."""
    profiles = list(profile(built, name, engine).values())
    assert profiles
    assert all(tuple(shape[0] for shape in shapes) == rows for shapes in profiles)


def test_state_is_what_the_program_writes_to_and_constants_are_held_too(built):
    assert built["cache"]["state"] == ["keys", "lifted_buf_inner_mean", "steps", "values"]
    assert built["old"]["state"] == ["fixed", "last"]


def test_a_torch_tensorrt_that_lifts_no_buffers_gets_them_lifted():
    """As 2.11: written buffers are made inputs and outputs before it compiles."""
    found = rows("by_hand", ["old", "cache", "returned"])
    assert [row.get("error", row["worst"]) for row in found.values()] == [0, 0, 0]
