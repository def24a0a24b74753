"""Where a job's batches come from, and what it says of data that it should not trust."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import polars as pl
import pytest
import torch
from calibcast.calib import RangeTable
from calibcast.calib.loader_order import batch_hash
from calibcast.engines.cli import _run
from calibcast.engines.job.settling import Early, before_tail
from calibcast.engines.job.trust import MOST_NUMBERS, DataReport, Seen

BAD = """
import torch

def absent(batch):
    return None

def misshapen(batch):
    return {"input": batch["x"][:, :3] if int(batch["row"][0]) == 6 else batch["x"]}

def nonfinite(batch):
    x = batch["x"].clone()
    if int(batch["row"][0]) // 2 in (3, 8):
        x[0, 0] = float("nan") if int(batch["row"][0]) == 6 else float("inf")
    return {"input": x}

def constant(batch):
    x = torch.full_like(batch["x"], 2.0)
    return {"input": x}

def sometimes_constant(batch):
    x = batch["x"].clone()
    if int(batch["row"][0]) // 2 in (4, 5):
        x[:] = float(batch["row"][0])
    return {"input": x}

def raising(batch):
    if int(batch["row"][0]) // 2 in (3, 8):
        raise ValueError("this row is damaged")
    return {"input": batch["x"]}

def growing(batch):
    return {"input": batch["x"] * (1e5 if int(batch["row"][0]) // 2 == 13 else 1.0)}

def broken():
    yield {"input": torch.ones(2, 4)}
    raise OSError("the disk is gone")

def empty():
    return []

def unseeded():
    return torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=2, shuffle=True)
"""


@pytest.fixture
def folder(tmp_path, make_job):
    make_job(tmp_path)
    (tmp_path / "bad.py").write_text(BAD)
    return tmp_path


def run(folder, make_job, capsys, transform="", source='folder = "rows"', share=0.0, **tables):
    data = f"{source}\nheld_out_share = {share}\n" + ("" if "loader" in source else "batch_size = 2\n")
    data += f'transform = "bad.py:{transform}"\n' if transform else ""
    code = _run(["run", str(make_job(folder, data=data, **tables))])
    return code, capsys.readouterr().err


def report(folder):
    return json.loads((folder / "out/manifest.json").read_text())["stages"]["calibrate"]["result"]["report"]


def table(folder):
    return RangeTable.load(folder / "out/ranges.parquet")


@pytest.mark.parametrize(("action", "code", "batches"), [("warn", 0, 14), ("skip", 0, 12), ("stop", 3, None)])
def test_nonfinite_inputs_are_counted_and_named(folder, make_job, capsys, action, code, batches):
    found, err = run(folder, make_job, capsys, "nonfinite", limits=f'on_nonfinite_inputs = "{action}"')
    assert found == code
    if action == "stop":
        assert "batch 3 has NaN or Inf in input, and limits.on_nonfinite_inputs is" in err
        return
    assert "2 of 14 batches have NaN or Inf inputs: 3, 8" in err
    assert report(folder)["nonfinite"] == {"count": 2, "batches": [3, 8]}
    assert table(folder).calibration.batches == batches
    assert table(folder).calibration.skipped == ((3, 8) if action == "skip" else ())
    assert table(folder).frame["nan"].sum() == 0 or action == "warn"


def test_constant_inputs_are_named(folder, make_job, capsys):
    assert "input input is 2 everywhere: is it fed what it should be?" in run(folder, make_job, capsys, "constant")[1]
    _, err = run(folder, make_job, capsys, "sometimes_constant")
    assert "input input is constant within 2 of 14 batches: 4, 5" in err


def test_a_share_of_raising_batches_within_the_limit_is_left_out_and_told(folder, make_job, capsys):
    code, err = run(folder, make_job, capsys, "raising", limits="max_bad_share = 0.15")
    assert code == 0
    assert "2 of 14 batches raised and were left out (3, 8): batch 3: transform raised ValueError: this row is" in err
    assert table(folder).calibration.batches == 12
    assert report(folder)["raised"] == {"count": 2, "batches": [3, 8]}


def test_beyond_the_limit_is_exit_code_3_and_a_higher_limit_goes_on(folder, make_job, capsys):
    code, err = run(folder, make_job, capsys, "raising", limits="max_bad_share = 0.1")
    assert code == 3
    assert "2 of 14 batches raised (14.3%), more than limits.max_bad_share = 10%. batch 3: transform raised" in err
    assert not (folder / "out/ranges.parquet").exists()
    code, err = run(folder, make_job, capsys, "raising", limits="max_bad_share = 0.15")
    assert code == 0
    assert "going on after 9 batches" in err


def test_by_default_one_raising_batch_is_too_many(folder, make_job, capsys):
    code, err = run(folder, make_job, capsys, "raising")
    assert code == 3
    assert "1 of 14 batches raised" in err


def test_a_batch_that_does_not_fit_is_named_once(folder, make_job, capsys):
    _, err = run(folder, make_job, capsys, "misshapen")
    assert "batch 3: argument input: expected float32" in err
    assert "batch 0: it is a NoneType; the program takes" in run(folder, make_job, capsys, "absent")[1]


def test_ranges_that_have_not_settled_are_told_with_the_decisions_that_moved(folder, make_job, capsys):
    code, err = run(folder, make_job, capsys, "growing")
    assert code == 0
    settling = json.loads((folder / "out/manifest.json").read_text())["stages"]["plan"]["result"]["settling"]
    assert (settling["batches"], settling["last"]) == (14, 2)
    assert settling["growing"] == 4  # all but the layer norm, which takes the scale away
    assert settling["tensors"] == 5
    assert "linear" in settling["moved"]
    assert "4 of 5 tensors grew" in err
    assert run(folder, make_job, capsys, "growing", limits="max_growing_share = 0.5")[0] == 3
    code, err = run(folder, make_job, capsys, "growing", limits="max_moved_decisions = 0")
    assert code == 3
    assert "Calibrate on more data" in err


def test_a_loader_that_ends_with_an_error_is_not_taken_for_finished(folder, make_job, capsys):
    code, err = run(folder, make_job, capsys, source='loader = "bad.py:broken"', limits="max_bad_share = 0.9")
    assert code == 1
    assert "the loader raised OSError at batch 1 and gave nothing after it, so what follows is lost" in err


def test_an_empty_loader_and_an_unseeded_shuffle_are_refused(folder, make_job, capsys):
    code, err = run(folder, make_job, capsys, source='loader = "bad.py:empty"')
    assert (code, "none of them is left to calibrate on" in err) == (2, True)
    code, err = run(folder, make_job, capsys, source='loader = "bad.py:unseeded"')
    assert (code, "shuffles (RandomSampler) without a seed" in err) == (1, True)


@pytest.fixture
def files(folder):
    frame = pl.DataFrame(
        {"a": range(20), "b": [0.5 * i for i in range(20)], "c": [1] * 20, "d": [i % 3 for i in range(20)]}
    )
    frame.write_parquet(folder / "rows.parquet")
    frame.write_csv(folder / "rows.csv")
    frame.write_ndjson(folder / "rows.jsonl")
    (folder / "hub").mkdir()
    frame.write_parquet(folder / "hub/train.parquet")
    return folder


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize(
    "source", ['parquet = "*.parquet"', 'csv = "rows.csv"', 'json = ["rows.jsonl"]', 'hub = "hub"']
)
def test_every_kind_of_file_feeds_the_model_the_same(files, make_job, capsys, source, streaming):
    """Columns of numbers, whole ones too, stacked into one input; as files or as a stream."""
    columns = 'columns = { input = ["a", "b", "c", "d"] }'
    code, err = run(files, make_job, capsys, source=f"{source}\nstreaming = {streaming}\n{columns}")
    assert code == 0, err
    row = table(files).frame.filter(pl.col("kind") == "input").row(0, named=True)
    assert (row["batches"], row["elements"], row["min"], row["max"]) == (10, 80, 0.0, 19.0)


def test_a_seeded_shuffle_is_another_order_and_the_same_again(files, make_job, capsys):
    columns = 'columns = { input = ["a", "b", "c", "d"] }\n'

    def hashes(extra):
        (files / "out/ranges.parquet").unlink(missing_ok=True)
        code, err = run(files, make_job, capsys, source='parquet = "rows.parquet"\n' + columns + extra)
        assert code == 0, err
        return table(files).calibration.input_hashes

    for streaming in ("", "\nstreaming = true"):
        plain, first, again, other = (
            hashes(f"{shuffle}{streaming}")
            for shuffle in ("", *(f"shuffle = true\nseed = {seed}" for seed in (1, 1, 2)))
        )
        assert first == again
        assert len({plain, first, other}) == 3


def test_images_are_read(folder, make_job, capsys):
    from PIL import Image

    (folder / "pictures/train").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (2, 2), (number * 40, 0, 255)).save(folder / f"pictures/train/{number}.png")
    (folder / "bad.py").write_text("def look(batch):\n    return {'input': batch['image'].flatten(1)[:, :4].float()}\n")
    code, err = run(folder, make_job, capsys, "look", source='images = "pictures"')
    assert code == 0, err
    assert table(folder).frame.filter(pl.col("kind") == "input")["max"].item() == 200.0


def test_workers_load_the_same_batches(folder, make_job, capsys):
    assert run(folder, make_job, capsys, source='folder = "rows"\ncolumns = {input = "x"}')[0] == 0
    alone = table(folder)
    assert run(folder, make_job, capsys, source='folder = "rows"\ncolumns = {input = "x"}\nworkers = 2')[0] == 0
    assert table(folder).frame.equals(alone.frame, null_equal=True)


def test_what_feeds_an_input_must_be_said_when_no_name_fits(folder, make_job, capsys):
    code, err = run(folder, make_job, capsys)
    assert code == 2
    assert "no column is named like the input 'input'" in err
    assert "there are row, x" in err


def test_held_out_batches_are_not_calibrated_on(folder, make_job, capsys):
    source = 'folder = "rows"\ncolumns = {input = "x"}'
    code, err = run(folder, make_job, capsys, source=source, share=0.3)
    assert code == 0
    assert "were also calibrated on" not in err
    code, err = run(folder, make_job, capsys, source=source, share=0.3, held_out='folder = "rows"')
    assert "14 of 14 batches were also calibrated on" in err


def test_reports_of_processes_merge_to_that_of_one():
    parts = [DataReport(), DataReport()]
    for number in range(300):
        parts[number % 2].note_raised(number, f"error {number}", looked_at=False)
    merged = DataReport.merged(DataReport.from_json(json.loads(json.dumps(part.to_json()))) for part in parts)
    assert merged.raised == Seen(300, list(range(MOST_NUMBERS)))
    assert list(merged.messages) == [str(number) for number in range(10)]
    assert merged.bad_share() == 1.0


def test_few_early_copies_are_kept_however_long_the_run():
    from calibcast.calib.statistics import Statistics

    total, early = Statistics.empty(2, False), Early()
    for position in range(1, 3000):
        total.batches.fill_(position)
        early.note(position, total)
        assert len(early.copies) <= 5
        before = before_tail(position, early.copies)
        if position > 1:
            assert 0.84 * position - 1 <= before <= 0.9 * position or before == 0
            assert before == 0 or early.copies[before].batches[0] == before


def test_a_hash_of_a_batch_sees_order_names_and_values():
    assert batch_hash({"a": torch.ones(2)}) == batch_hash({"a": torch.ones(2)})
    assert batch_hash([torch.ones(2), "x"]) != batch_hash([torch.ones(2), "y"])
    assert batch_hash([torch.tensor([1, 2])]) != batch_hash([torch.tensor([2, 1])])
    assert batch_hash(object()) == ""


def test_logs_are_lines_of_json_and_results_are_on_stdout(folder, make_job, capsys):
    job = make_job(folder, data='folder = "rows"\ncolumns = {input = "x"}\nbatch_size = 2')
    assert _run(["run", str(job), "--log-format", "json"]) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.err.splitlines()]
    assert all({"time", "level", "rank", "message"} <= set(line) for line in lines)
    progress = next(line for line in lines if line.get("event") == "progress")
    assert {"stage", "batches", "total", "per_second", "seconds_left", "memory_mb"} <= set(progress)
    assert (progress["stage"], progress["batches"], progress["total"]) == ("calibrate", 10, 10)
    assert captured.out.startswith("calibrate ")
    job.write_text(job.read_text() + "nonsense = 1\n")
    assert _run(["run", str(job), "--log-format", "json"]) == 2
    (error,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (error["event"], error["kind"], error["exit_code"]) == ("error", "JobError", 2)
    assert _run(["run", str(job), "--log-format", "yaml"]) == 2


LOUD = """
import logging, sys, warnings
import torch

logging.getLogger("theirs").addHandler(logging.StreamHandler())

def loud(batch):
    print("printed")
    print("half a line,", end=" ", file=sys.stderr)
    print("to stderr", file=sys.stderr)
    logging.getLogger("library").warning("of a library")
    logging.getLogger("early").warning("by a handler of before")
    logging.getLogger("theirs").warning("by a handler of its own")
    warnings.warn("warned", stacklevel=1)
    return {"input": batch["x"]}

def leaving(batch):
    sys.exit(0)
"""


def test_what_others_say_is_json_too_and_never_among_the_results(folder, make_job, capsys, monkeypatch):
    """Prints, warnings and logs of a user's function and of libraries."""
    (folder / "loud.py").write_text(LOUD)
    early = logging.getLogger("early")
    monkeypatch.setattr(early, "handlers", [logging.StreamHandler()])
    monkeypatch.setattr(early, "propagate", False)
    job = make_job(folder, data='folder = "rows"\ntransform = "loud.py:loud"\nbatch_size = 2')
    assert _run(["run", str(job), "--log-format", "json"]) == 0
    captured = capsys.readouterr()
    said = [json.loads(line)["message"] for line in captured.err.splitlines()]
    for text in (
        "printed",
        "half a line, to stderr",
        "of a library",
        "by a handler of its own",
        "by a handler of before",
        "warned",
    ):
        assert text in said
    assert [line.split()[0] for line in captured.out.splitlines()] == [
        "calibrate", "plan", "cast", "build", "verify", "manifest"
    ]  # fmt: skip
    assert _run(["run", str(job), "--redo"]) == 0
    captured = capsys.readouterr()
    assert "printed" not in captured.out
    assert "warning: of a library" in captured.err


def test_a_bug_is_a_line_of_json(folder, make_job, capsys, monkeypatch):
    job = make_job(folder)
    monkeypatch.setattr("calibcast.engines.job.running.load_jobs", lambda path: 1 // 0)
    assert _run(["run", str(job), "--log-format", "json"]) == 1
    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert line["message"].startswith("ZeroDivisionError")
    assert "test_job_data.py" in line["traceback"]


def test_a_function_that_leaves_does_not_end_the_job_as_if_all_were_well(folder, make_job, capsys):
    (folder / "loud.py").write_text(LOUD)
    code, err = run(folder, make_job, capsys, source='folder = "rows"\ntransform = "loud.py:leaving"')
    assert code == 1
    assert "called sys.exit(0)" in err
    assert "loud.py:" in err
    assert json.loads((folder / "out/manifest.json").read_text())["status"] == "failed"


def test_a_terminal_sees_a_bar_with_rate_and_memory(folder, make_job, monkeypatch):
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    job = make_job(folder, data='folder = "rows"\ncolumns = {input = "x"}\nbatch_size = 2')
    assert _run(["run", str(job)]) == 0
    text = stream.getvalue()
    assert "calibrate: 100%" in text
    assert "10/10" in text
    assert " MB]" in text
    assert "verify: 100%" in text


def test_the_template_runs(tmp_path, capsys):
    assert _run(["init", str(tmp_path / "new")]) == 0
    assert _run(["run", str(tmp_path / "new/job.toml"), "--dry-run"]) == 0
    assert not (tmp_path / "new/output").exists()
    assert _run(["run", str(tmp_path / "new/job.toml")]) == 0
    assert Path(tmp_path / "new/output/engine/manifest.json").exists()
    assert "agreement" in capsys.readouterr().err
