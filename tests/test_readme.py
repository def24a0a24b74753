"""The README tells the truth: its Python runs and prints what it says, and CI calls its test command."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def without_numbers(text):
    """Trained weights differ in the last digits between machines; words, nodes and rules do not."""
    return re.sub(r"\s+", " ", re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", text)).strip()


@pytest.fixture(scope="module")
def first_screen():
    printed = io.StringIO()
    names = {}
    with contextlib.redirect_stdout(printed):
        exec(compile(blocks("python")[0], "README.md", "exec"), names)
    return names, printed.getvalue()


def test_the_first_python_block_prints_what_the_readme_shows(first_screen):
    _, printed = first_screen
    shown = blocks("text")[0]
    # Which edge costs most is a matter of a tenth of a decibel, and of how many threads have trained the network.
    printed, shown = (re.sub(r"; most of it: .*", "", text) for text in (printed, shown))
    assert without_numbers(printed) == without_numbers(shown)
    assert printed.splitlines()[:6] == shown.splitlines()[:6]  # the plan itself, number by number
    assert len(blocks("python")[0].strip().splitlines()) <= 12


def test_the_second_python_block_runs_after_the_first(first_screen, tmp_path, monkeypatch):
    names, _ = first_screen
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(blocks("python")[1], "README.md", "exec"), dict(names))
    assert {path.name for path in tmp_path.iterdir()} == {"ranges.parquet", "plan.json", "engine"}


def test_the_first_two_shell_lines_install_and_run():
    first, second = (block.strip() for block in blocks("sh")[:2])
    assert first.endswith("calibcast demo")
    assert "\n" not in first + second
    assert second in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_command_of_the_readme_exists_with_its_options():
    for line in blocks("sh")[2].strip().splitlines():
        _, command, *rest = line.split()
        done = subprocess.run(
            [sys.executable, "-m", "calibcast", command, "--help"], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, command
        for option in (word for word in rest if word.startswith("-")):
            assert option in done.stdout, f"{command} has no {option}"


def test_every_rule_in_the_table_is_a_rule():
    from calibcast.passes import rules, tensor_rules

    found = [*vars(rules).values(), *vars(tensor_rules).values()]
    ids = {rules.rule_id(value) for value in found if isinstance(value, type) and callable(value)}
    ids |= {"literal", "alias"}
    table = README.split("## The rules")[1].split("## Command line")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named <= ids
    assert {"data_max", "init_max", "literal", "storage", "interior", "follows", "legality"} <= named


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """The nightly job of the README, prepared as it says."""
    folder = tmp_path_factory.mktemp("night")
    (folder / "prepare.py").write_text(next(block for block in blocks("python") if "prepare.py" in block))
    (folder / "night.toml").write_text(blocks("toml")[0])
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".package"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "prepare.py"], cwd=folder, env=environment, check=True, timeout=300)
    return folder


def test_the_nightly_job_runs_and_its_engine_answers_as_well_as_fp32(night, capsys):
    from calibcast.engines.cli import _run

    assert _run(["run", str(night / "night.toml"), "--dry-run"]) == 0
    assert "1797 rows in 18 batches" in capsys.readouterr().out
    assert _run(["run", str(night / "night.toml"), "--log-format", "json"]) == 0
    assert all(json.loads(line)["message"] for line in capsys.readouterr().err.splitlines())
    manifest = json.loads((night / "artifacts/manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["stages"]["verify"]["result"]["metrics"]["accuracy"] > 0.9


def test_the_table_of_keys_is_that_of_the_settings():
    from calibcast.engines.job.keys import keys_table

    shown = README.split("checked by a test -->\n")[1].split("\n<!-- end of keys -->")[0]
    assert shown == keys_table()
