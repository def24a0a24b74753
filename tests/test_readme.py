"""The README and those of the rooms tell the truth: every block runs, and prints what it says."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from calibcast.engines.cli import _run

ROOT = Path(__file__).resolve().parents[1]
README = "README.md"
REVIEW, JOB, RULES = "engines/review/README.md", "engines/job/README.md", "passes/README.md"


def text_of(file):
    return (ROOT / file).read_text(encoding="utf-8")


def blocks(language, file=README):
    return re.findall(rf"```{language}\n(.*?)```", text_of(file), flags=re.DOTALL)


def files_of(file):
    """The blocks that name a file in their first line: `# model.py: ...`."""
    found = {}
    for block in blocks("python", file):
        name = re.match(r"# (\w+\.py)\b", block)
        if name:
            found[name[1]] = block
    return found


def without_numbers(text):
    """Trained weights differ in the last digits between machines; words, nodes and rules do not."""
    return re.sub(r"\s+", " ", re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?x?", "#", text)).strip()


def told(text):
    """The lines, in no order: what a rule keeps, and which edge costs most, depend on the trained weights."""
    lines = (re.sub(r"most of it: .*", "most of it", line) for line in text.splitlines())
    return sorted(without_numbers(line) for line in lines)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with the user's files of the README; it is the working folder, and imports come from it."""
    folder = tmp_path_factory.mktemp("desk")
    for name, content in (files_of(README) | files_of(REVIEW)).items():
        (folder / name).write_text(content)
    before, path = os.getcwd(), list(sys.path)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    yield folder
    os.chdir(before)
    sys.path[:] = path
    for name in ("model", "loaders", "friday"):
        sys.modules.pop(name, None)


def command(line):
    """Run a line of a shell block in the working folder; what it writes to stdout."""
    words = shlex.split(line)
    if words[0] == "python":
        subprocess.run([sys.executable, *words[1:]], check=True, timeout=900)
        return ""
    assert words[0] == "calibcast", line
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert _run(words[1:]) == 0, line
    return printed.getvalue()


@pytest.fixture(scope="module")
def commands(desk):
    """What each command of the first page prints, run in order."""
    return {line: command(line) for line in blocks("sh")[1].strip().splitlines()}


def test_the_python_block_prints_what_it_shows(desk):
    block = next(block for block in blocks("python") if "calibcast.compile" in block)
    assert len(block.strip().splitlines()) <= 12
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, README, "exec"), {})
    assert told(printed.getvalue()) == told(blocks("text")[0])


def test_the_commands_of_the_first_page_run_in_order(commands, desk):
    assert {"net.pt2", "ranges.parquet", "plan.json", "engine", "verdict.json", "report.html"} <= {
        path.name for path in desk.iterdir()
    }
    assert all(text or "report" in line or line.startswith("python") for line, text in commands.items())


@pytest.mark.parametrize("number", [0, 1])
def test_the_commands_of_the_review_print_what_they_show(commands, number):
    printed = [command(line) for line in blocks("sh", REVIEW)[number].strip().splitlines()][-1]
    lines = [without_numbers(line) for line in printed.splitlines()]
    for line in blocks("text", REVIEW)[number].strip().splitlines():
        assert line.strip() == ".." or without_numbers(line) in lines, line


def test_the_install_lines_are_the_ones_that_ci_runs():
    first, *_, last = (block.strip() for block in blocks("sh"))
    assert first.splitlines()[-1] == "calibcast demo"
    assert "activate" in first
    assert last in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_first_page_is_short_and_its_links_lead_somewhere():
    assert len(text_of(README).splitlines()) <= 200
    for page in (README, REVIEW, JOB, RULES, "engines/tensorrt/README.md", "benchmarks/README.md", "calib/README.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", text_of(page)):
            assert link.startswith("http") or (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_every_rule_in_the_table_is_a_rule():
    from calibcast.passes import rules, tensor_rules

    found = [*vars(rules).values(), *vars(tensor_rules).values()]
    ids = {rules.rule_id(value) for value in found if isinstance(value, type) and callable(value)}
    ids |= {"literal", "alias", "rounding"}
    rows = re.findall(r"^\| (`.*?) \|", text_of(RULES), flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named <= ids
    assert {"rounding", "data_max", "init_max", "literal", "storage", "interior", "follows", "legality"} <= named


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """The nightly job, prepared as it says."""
    folder = tmp_path_factory.mktemp("night")
    (folder / "prepare.py").write_text(files_of(JOB)["prepare.py"])
    (folder / "night.toml").write_text(blocks("toml", JOB)[0])
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".package"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "prepare.py"], cwd=folder, env=environment, check=True, timeout=900)
    return folder


def test_the_nightly_job_sees_what_overflows_and_its_engine_answers_as_well_as_fp32(night, capsys):
    assert _run(["run", str(night / "night.toml"), "--dry-run"]) == 0
    assert "800 rows in 8 batches" in capsys.readouterr().out
    assert _run(["run", str(night / "night.toml"), "--log-format", "json"]) == 0
    assert all(json.loads(line)["message"] for line in capsys.readouterr().err.splitlines())
    manifest = json.loads((night / "artifacts/manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["stages"]["verify"]["result"]["metrics"]["accuracy"] > 0.9
    plan = json.loads((night / "artifacts/plan.json").read_text())
    assert "sum_1" in {row["node"] for row in plan["decisions"] if row["precision"] == "high"}


def test_the_table_of_keys_is_that_of_the_settings():
    from calibcast.engines.job.keys import keys_table

    shown = text_of(JOB).split("checked by a test -->\n")[1].split("\n<!-- end of keys -->")[0]
    assert shown == keys_table()


def test_the_blocks_of_the_rules_run_alone_and_print_what_they_show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, printed = {}, []
    for block in blocks("python", RULES):
        with contextlib.redirect_stdout(io.StringIO()) as heard:
            exec(compile(block, RULES, "exec"), names)
        printed.append(heard.getvalue())
    shown = blocks("text", RULES)
    assert len(shown) == len(printed)
    for said, block in zip(printed, shown, strict=True):
        assert without_numbers(said) == without_numbers(block)
    assert names["plan"].high_precision_nodes == ()
