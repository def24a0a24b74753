"""The job file: every mistake is named with its place and the keys that there are."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

import pytest
from calibcast.engines.cli import _run
from calibcast.engines.job.errors import JobError
from calibcast.engines.job.job_file import load_job
from calibcast.engines.job.keys import keys_table, type_words
from calibcast.engines.job.settings import Job, Names
from calibcast.engines.job.template import write_template

GOOD = '[model]\nlocation = "net.pt2"\n[data]\nparquet = "rows.parquet"\n'


def load(tmp_path: Path, text: str):
    path = tmp_path / "job.toml"
    path.write_text(text)
    return load_job(path)


@pytest.mark.parametrize(
    ("text", "said", "keys"),
    [
        (
            GOOD + "[plan]\ndata_mx = 1.0",
            "line 6: unknown key 'data_mx' in [plan]; near names: data_max",
            "[plan]: low",
        ),
        (GOOD + "[plam]\ndata_max = 1.0", "line 5: unknown table 'plam' in the job; near names: plan", "tables: model"),
        (GOOD + 'batch_size = "32"', "line 5: [data] batch_size should be integer", "[data]: folder, parquet, json"),
        (GOOD + "batch_size = 1.5", "[data] batch_size is 1.5 (a float)", "[data]: folder"),
        (
            GOOD + "batch_size = 0",
            "[data] batch_size: should be greater than or equal to 1, but is 0",
            "[data]: folder",
        ),
        (GOOD + "streaming = 1", "[data] streaming should be boolean; [data] streaming is 1 (an integer)", "[data]"),
        (GOOD + "columns = 3", "line 5: [data] columns should be table of string or list of strings", "[data]: "),
        (GOOD + "columns = {a = 3}", "[data] columns['a'] is 3 (an integer)", "[data]: "),
        (GOOD + "[plan]\nnodes_to_exclude = 'x'", "[plan] nodes_to_exclude should be list of strings", "[plan]: "),
        (GOOD + "[plan]\nlow_precision_type = 'int8'", "should be 'fp16' or 'bf16', but is 'int8'", "[plan]: "),
        (GOOD + "[held_out]\nsplit = 3", "line 6: [held_out] split should be string", "[held_out]: folder"),
        (
            GOOD + "[limits]\nmax_bad_share = 2.0",
            "max_bad_share: should be less than or equal to 1",
            "[limits]: on_non",
        ),
        (GOOD.replace("location", "path"), "line 1: [model] location is missing", "[model]: location, arguments"),
        ("data = 3\n[model]\nlocation = 'a.pt2'", "[data] is a table, but is 3 (an integer) here", "[data]: folder"),
        ("", "[model] is missing", "[model]: location"),
        (
            GOOD + "csv = 'x'",
            "set exactly one of folder, parquet, json, csv, images, hub, loader, recorded; parquet and csv",
            "[d",
        ),
        ("[model]\nlocation = 'a.pt2'\n[data]", "line 3: [data]: set exactly one of folder", "[data]: folder"),
        (GOOD + "shuffle = true", "an unseeded order does not repeat", "[data]: folder"),
        (GOOD + "arguments = {a = 1}", "arguments are those of loader", "[data]: folder"),
        (GOOD + "config = 'a'", "config is that of hub, which is not set", "[data]: folder"),
        (GOOD + "columns = {a = []}", "columns: nothing feeds the input a", "[data]: folder"),
        (GOOD + "'batch size' = 3", "line 5: unknown key 'batch size' in [data]; near names: batch_size", "[data]: "),
        (GOOD + "['da ta']\nx = 3", "unknown table 'da ta' in the job; near names: data", "tables: model"),
        (GOOD + "columns = {'a b' = 3}", "[data] columns['a b'] is 3 (an integer)", "[data]: "),
        (GOOD + "[verification]\nmin_sqnr_db = nan", "line 6: [verification] min_sqnr_db: nan is no limit", "[verif"),
        (GOOD + "[verification.min_metrics]\nacc = 0.5", "the bound of a metric that is not in metrics", "[verif"),
        (GOOD + "held_out_share = 0.0\n[verification]\nmin_top1 = 0.9", "nothing is held out", "tables: model"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_the_known_keys(tmp_path, text, said, keys):
    with pytest.raises(JobError) as caught:
        load(tmp_path, text)
    assert said in str(caught.value)
    assert f"Known keys of {keys}" in str(caught.value) or f"Known {keys}" in str(caught.value)


def test_every_mistake_is_told_at_once(tmp_path):
    with pytest.raises(JobError) as caught:
        load(tmp_path, GOOD + "batch_size = '3'\nsplt = 'x'\n[plan]\ndata_max = '1'\n[nonsense]\n")
    assert len([line for line in str(caught.value).splitlines() if "line " in line]) == 4


@pytest.mark.parametrize("text", ["x =", "[model\n", "\x00"])
def test_what_is_not_toml_is_told(tmp_path, text):
    with pytest.raises(JobError, match=r"job\.toml is not TOML"):
        load(tmp_path, text)


def test_a_mistake_is_exit_code_2_without_a_traceback(tmp_path, capsys):
    (tmp_path / "job.toml").write_text(GOOD + "nonsense = 1")
    assert _run(["run", str(tmp_path / "job.toml")]) == 2
    assert _run(["run", str(tmp_path / "nothing.toml")]) == 2
    err = capsys.readouterr().err
    assert "unknown key 'nonsense' in [data]" in err
    assert "no such file; `calibcast init` writes one" in err
    assert "Traceback" not in err


def test_what_held_out_leaves_out_is_that_of_data(tmp_path):
    text = GOOD + "batch_size = 7\ncolumns = {x = 'a'}\nmax_batches = 3\n"
    held = load(tmp_path, text + "[held_out]\nsplit = 'test'").job.held_out
    assert (held.parquet, held.split, held.batch_size, held.columns) == ("rows.parquet", "test", 7, {"x": "a"})
    other = load(tmp_path, text + "split = 'night'\n[held_out]\ncsv = 'b.csv'").job.held_out
    assert (other.parquet, other.csv, other.split, other.batch_size) == (None, "b.csv", "train", 7)


def test_inf_is_no_limit_and_whole_numbers_are_numbers(tmp_path):
    assert math.isinf(load(tmp_path, GOOD + "[plan]\ndata_max = inf").job.plan.data_max)
    assert load(tmp_path, GOOD + "[plan]\ndata_max = 3").job.plan.data_max == 3.0


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    found = load(tmp_path, GOOD)
    assert found.function("net.pt2") == str(tmp_path / "net.pt2")
    assert found.function("net.py:make") == f"{tmp_path}/net.py:make"
    assert found.function("/a/net.py:make") == "/a/net.py:make"


def test_the_table_of_keys_has_every_key_once():
    table = keys_table()
    for name in Job.model_fields:
        assert f"`[{name}" in table
    assert table.count("`[data] parquet`") == 1
    assert "| `[data] json` | string or list of strings |" in table  # spelt as in the file
    assert "`[plan] prove_batches` | integer | `8` |" in table
    assert "json_lines" not in table
    assert type_words(str | Names | None) == "string or list of strings"


def test_the_template_says_every_table_and_loads(tmp_path):
    job, *_ = write_template(tmp_path / "new")
    assert set(tomllib.loads(job.read_text())) == set(Job.model_fields) - {"held_out"}
    assert "# [held_out]" in job.read_text()
    load_job(job)
    uncommented = "\n".join(
        line[2:] if line.startswith("# ") and ("=" in line or "[" in line[2:3]) and "file.py" not in line else line
        for line in job.read_text().splitlines()
    )
    load_job(tmp_path / "new" / "job.toml")
    (tmp_path / "new" / "all.toml").write_text(uncommented)
    load_job(tmp_path / "new" / "all.toml")  # what is commented out is right, too


def test_init_overwrites_nothing(tmp_path, capsys):
    assert _run(["init", str(tmp_path)]) == 0
    (tmp_path / "functions.py").write_text("mine")
    assert _run(["init", str(tmp_path)]) == 2
    assert "overwrites nothing" in capsys.readouterr().err
    assert (tmp_path / "functions.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("tables", "code", "said"),
    [
        ({"verification": 'metrics = {a = "functions.py:agrement"}'}, 2, "near names: agreement"),
        (
            {"model": 'location = "functions.py:model"\narguments = {seeed = 1}'},
            2,
            "model(seed=0, scale=1.0) cannot be",
        ),
        ({"plan": 'rules = ["functions.py:mine"]'}, 2, "has no function 'mine'"),
        ({"plan": 'wide_accumulation = ["layernorm"]'}, 2, "[plan] wide_accumulation: 'layernorm' is no operator"),
        ({"plan": 'nodes_to_exclude = ["^attention"]'}, 2, "[plan] nodes_to_exclude: '^attention' matches no node"),
        ({"plan": 'nodes_to_include = ["(("]'}, 2, "is not a regular expression"),
        ({"plan": 'targets_to_exclude = ["aten.addd"]'}, 2, "no node has the target 'aten.addd'"),
        ({"plan": "range_quantile = 0.9", "calibration": "histogram = false"}, 2, "needs histograms"),
        ({"build": 'backend = "eager"\nsettings = {workspace = 1}'}, 2, "takes no setting but device; got workspace"),
        ({"build": 'backend = "eager"\nsettings = {strict_precision = true}'}, 2, "is a key of [build] itself"),
        ({"build": 'backend = "eager"\nsettings = {progress = true}'}, 2, "the job gives it"),
        ({"build": 'backend = "eagre"'}, 2, "should be 'auto', 'tensorrt', 'inductor' or 'eager'"),
        ({"build": 'backend = "eager"\nahead_of_time = true'}, 1, "nothing to build ahead of time"),
        ({"calibration": 'device = "cudda"'}, 2, "device 'cudda': give cpu, cuda"),
        ({"data": 'folder = "rows"\ncolumns = {input = "xx"}'}, 2, "no column 'xx' for the input input; near names: x"),
        ({"data": 'folder = "rows"\ncolumns = {input = ["x", "y"]}'}, 2, "no column 'y' for the input input"),
        ({"data": 'folder = "rows"\ncolumns = {input = "x"}\nbatch_size = 100'}, 2, "none of them is left"),
        ({"held_out": 'json = "rowz.json"'}, 2, "no file matches 'rowz.json'"),
        ({"held_out": 'columns = {input = "z"}'}, 2, "[held_out] columns: no column 'z' for the input input"),
    ],
)
def test_what_a_later_stage_would_refuse_is_told_before_the_first(tmp_path, make_job, capsys, tables, code, said):
    """By a dry run, too; and nothing was measured."""
    data = 'folder = "rows"\ncolumns = {input = "x"}\nbatch_size = 4'
    job = make_job(tmp_path, **{"data": data, **tables})
    for options in (["--dry-run"], []):
        assert _run(["run", str(job), *options]) == code
        captured = capsys.readouterr()
        assert said in captured.err
        assert "Traceback" not in captured.err
        assert "would be made" not in captured.out
    assert not list((tmp_path / "out").rglob("*.parquet"))
    assert not list((tmp_path / "out").rglob("*.npz"))
