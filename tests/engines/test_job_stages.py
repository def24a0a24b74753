"""The stages of a job: what changed is made again, and nothing else; what was good stays when something goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from calibcast.calib import RangeTable, calibrate
from calibcast.engines.cli import _run
from calibcast.engines.locations import load_model

from tests.unwrapped import unwrapped

STAGES = ["calibrate", "plan", "cast", "build", "verify"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_job):
    """A job that has run."""
    folder = tmp_path_factory.mktemp("finished")
    make_job(folder, verification='min_sqnr_db = 30.0\nmetrics = {agreement = "functions.py:agreement"}')
    assert _run(["run", str(folder / "job.toml")]) == 0
    return folder


@pytest.fixture
def job(finished, tmp_path):
    """A copy of it, to change."""
    shutil.copytree(finished, tmp_path / "job", copy_function=shutil.copy2)
    return tmp_path / "job" / "job.toml"


def run(job, capsys, *options):
    code = _run(["run", str(job), *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def made(out):
    """The stages that a run made, and those that it skipped."""
    lines = {line.split()[0]: line for line in out.splitlines()}
    return [name for name in STAGES if ": made" in lines.get(name, "")], [
        name for name in STAGES if "skipped, as nothing changed" in lines.get(name, "")
    ]


def manifest(job):
    return json.loads((job.parent / "out/manifest.json").read_text())


def edit(job, old, new):
    text = job.read_text()
    assert old in text or not old
    job.write_text(text.replace(old, new) if old else text + new)


def snapshot(folder):
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_second_run_does_nothing_and_says_why(job, capsys):
    before = snapshot(job.parent / "out")
    code, out, _ = run(job, capsys)
    assert code == 0
    assert made(out) == ([], STAGES)
    assert "nothing changed in program, weights, calibcast, data, how the data are read and its settings" in unwrapped(
        out
    )
    assert snapshot(job.parent / "out") == before


@pytest.mark.parametrize(
    ("old", "new", "redone", "said"),
    [
        ("", "\n[plan]\ndata_max = 5.0", STAGES[1:], "plan: data_max changed from None to 5.0"),
        ('backend = "eager"', 'backend = "eager"\nkeep_io_types = false', STAGES[2:], "cast: keep_io_types changed"),
        ("batch_size = 2", "batch_size = 4", STAGES, "calibrate: how the data are read changed"),
        ('functions.py:model"', 'functions.py:model"\narguments = {seed = 3}', STAGES, "calibrate: weights changed"),
        ("metrics = {agreement", "max_batches = 1\nmetrics = {agreement", ["verify"], "verify: max_batches changed"),
        ("min_sqnr_db = 30.0", "min_sqnr_db = 31.0", [], "finished"),
        ("", "\n[calibration]\ncheckpoint_batches = 1", [], ""),
        ("", "\n[limits]\nmax_bad_share = 0.5", [], ""),
        ("", '\n[held_out]\nfolder = "rows"', ["calibrate", *STAGES[1:]], "held_out_share changed from 0.2 to 0.0"),
    ],
)
def test_only_what_changed_is_made_anew(job, capsys, old, new, redone, said):
    edit(job, old, new)
    if "[held_out]" in new:
        shutil.copy(job.parent / "functions.py", job.parent / "out" / "unrelated.py")
    code, out, err = run(job, capsys)
    assert code == 0, err
    assert made(out) == (redone, [name for name in STAGES if name not in redone])
    assert said in out + err or said == "finished"
    assert run(job, capsys)[1].count(": made") == 0


def test_new_data_are_measured_and_the_same_result_goes_no_further(job, capsys):
    """Touched data are calibrated on again; the plan that follows is the same, so nothing else is made."""
    (arrow,) = (job.parent / "rows").glob("*.arrow")
    os.utime(arrow, ns=(time.time_ns(), time.time_ns()))
    code, out, err = run(job, capsys)
    assert code == 0
    assert made(out)[0] == ["calibrate", "verify"]
    assert "calibrate: data changed" in err


@pytest.mark.parametrize("artifact", ["ranges.parquet", "plan.json", "mixed.pt2", "engine/manifest.json"])
@pytest.mark.parametrize("harm", ["removed", "changed"])
def test_an_artifact_that_was_touched_is_made_anew(job, capsys, artifact, harm):
    path = job.parent / "out" / artifact
    path.unlink() if harm == "removed" else path.write_bytes(path.read_bytes() + b" ")
    code, _, err = run(job, capsys)
    assert code == 0, err
    assert f"{artifact} {'is missing' if harm == 'removed' else 'was changed after it was made'}" in err
    assert path.exists()


def test_the_manifest_ties_everything_together(job):
    import hashlib

    found = manifest(job)
    assert (found["calibcast"], found["status"], list(found["stages"])) == ("job", "done", STAGES)
    out = job.parent / "out"
    for stage in found["stages"].values():
        for name, digest in stage["files"].items():
            assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
        assert stage["inputs"]["program"] if "program" in stage["inputs"] else stage["inputs"]["backend"]
    assert found["stages"]["verify"]["result"]["metrics"] == {"agreement": 1.0}
    assert found["job"]["settings"]["verification"]["min_sqnr_db"] == 30.0
    table = RangeTable.load(out / "ranges.parquet")
    assert found["stages"]["plan"]["inputs"]["program"] == table.fingerprint


def test_the_table_is_that_of_calibrate_on_the_same_batches(job, make_job, capsys):
    edit(job, 'transform = "functions.py:note"', 'transform = "functions.py:note"\nheld_out_share = 0.0')
    edit(job, "min_sqnr_db = 30.0", "")
    assert run(job, capsys)[0] == 0
    import datasets

    rows = datasets.load_from_disk(job.parent / "rows").with_format("torch")
    batches = [rows[start : start + 2]["x"] for start in range(0, len(rows), 2)]
    program = load_model(f"{job.parent}/functions.py:model")
    table = calibrate(program, batches, progress=False)
    assert RangeTable.load(job.parent / "out/ranges.parquet").frame.equals(table.frame, null_equal=True)


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(job, capsys):
    edit(job, "", "\n[plan]\ndata_max = 5.0")
    before = snapshot(job.parent)
    code, out, _ = run(job, capsys, "--dry-run")
    assert code == 0
    assert "data        folder rows, 28 rows in 14 batches; 10 batches to calibrate on" in out
    assert "4 batches to verify with" in out
    assert "calibrate   ranges.parquet, ranges-early.parquet: skipped, as nothing changed" in out
    assert "plan        plan.json: would be made: data_max changed from None to 5.0" in out
    assert "verify      verification.json: would be made: build is made again" in out
    assert {k: v for k, v in snapshot(job.parent).items() if "__pycache__" not in k} == {
        k: v for k, v in before.items() if "__pycache__" not in k
    }


def test_redo_makes_everything_anew(job, capsys):
    assert made(run(job, capsys, "--redo")[1]) == (STAGES, [])


def test_a_gate_that_says_no_is_exit_code_3_and_stays_no(job, capsys):
    edit(job, "min_sqnr_db = 30.0", "min_sqnr_db = 300.0")
    for _ in range(2):
        code, out, err = run(job, capsys)
        assert code == 3
        assert "required at least 300" in err
        assert "Traceback" not in err
        assert manifest(job)["status"] == "rejected"
        assert made(out)[0] == []
        assert_verdict(job, "failed: output: ", "< 300 dB", passed=False)
    edit(job, "min_sqnr_db = 300.0", "min_sqnr_db = 30.0")
    assert run(job, capsys)[0] == 0
    assert manifest(job)["status"] == "done"
    assert_verdict(job, "passed 30 dB with ", "", passed=True)
    assert made(run(job, capsys)[1])[0] == []  # the report that was rewritten is the one that the manifest knows


def assert_verdict(job, begins, ends, passed):
    """What the manifest says of the engine is what its report says."""
    told = manifest(job)["stages"]["verify"]["result"]
    report = json.loads((job.parent / "out" / "verification.json").read_text())
    assert told["verdict"].startswith(begins)
    assert told["verdict"].endswith(ends)
    assert told["verdict"] in told["summary"]
    assert (told["verdict"], told["passed"]) == (report["verdict"], report["passed"]) == (report["verdict"], passed)


def test_a_verification_that_is_switched_off_does_not_stay_in_the_manifest(job, capsys):
    """It would be that of an engine of before."""
    edit(job, "min_sqnr_db = 30.0", "")
    edit(job, "batch_size = 2", "batch_size = 2\nheld_out_share = 0.0")
    assert "verify      would be removed" in run(job, capsys, "--dry-run")[1]
    code, _, err = run(job, capsys)
    assert code == 0
    assert "verify: no stage of this job any more" in err
    assert sorted(manifest(job)["stages"]) == ["build", "calibrate", "cast", "plan"]
    assert manifest(job)["status"] == "done"
    assert not (job.parent / "out/verification.json").exists()


def test_a_manifest_that_cannot_be_read_is_told_with_the_way_out(job, capsys):
    (job.parent / "out/manifest.json").write_text("{")
    code, _, err = run(job, capsys)
    assert code == 1
    assert "manifest.json is not a readable job file" in err
    assert "`calibcast run --redo` makes everything again" in err
    assert run(job, capsys, "--redo")[0] == 0


def test_a_metric_of_the_users_is_a_gate(job, capsys):
    functions = job.parent / "functions.py"
    functions.write_text(functions.read_text() + "\ndef accuracy(output, reference, batch):\n    return 0.25\n")
    edit(job, "metrics = {", 'min_metrics = {accuracy = 0.5}\nmetrics = {accuracy = "functions.py:accuracy", ')
    code, _, err = run(job, capsys)
    assert code == 3
    assert "metric accuracy 0.25, required at least 0.5" in err


def test_a_rule_of_the_users_decides(job, capsys):
    functions = job.parent / "functions.py"
    functions.write_text(
        functions.read_text()
        + "\nfrom passes import Verdict\ndef mine(facts):\n"
        + "    return Verdict('mine', 'because', 1.0, 0.0) if facts.name == 'gelu' else None\n"
    )
    edit(job, "", '\n[plan]\nrules = ["functions.py:mine"]')
    code, _, err = run(job, capsys)
    assert code == 0, err
    rules = {d["node"]: d["rule"] for d in json.loads((job.parent / "out/plan.json").read_text())["decisions"]}
    assert rules["gelu"] == "mine"


def test_two_runs_on_one_folder_do_not_mix(job, capsys):
    """The second is told at once who has the folder, and touches nothing."""
    edit(job, "", "\n[plan]\ndata_max = 5.0")
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import filelock, time; l = filelock.FileLock({str(job.parent / 'out/.lock')!r}); "
         "l.acquire(); print('held', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        before = snapshot(job.parent / "out")
        code, out, err = run(job, capsys)
        assert code == 1
        assert "is in use by" in err
        assert out == ""
        assert snapshot(job.parent / "out") == before
    finally:
        holder.kill()
        holder.wait()
    assert run(job, capsys)[0] == 0  # what a killed process held is free


@pytest.mark.parametrize("artifact", ["ranges.parquet", "plan.json", "mixed.pt2", "engine", "verification.json"])
def test_a_full_disk_leaves_the_last_good_artifact(job, capsys, monkeypatch, artifact):
    """Each write of one artifact meets ENOSPC; the file of the last good run stays, whole."""
    before = {k: v[1] for k, v in snapshot(job.parent / "out").items() if Path(k).name != "manifest.json"}
    replace, rename = os.replace, Path.rename

    def full(source, target):
        if Path(target).name == artifact:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    def full_rename(self, target):
        if Path(target).name == artifact:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(os, "replace", full)
    if artifact == "engine":
        monkeypatch.setattr("tempfile.mkdtemp", lambda **_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
    code, _, err = run(job, capsys, "--redo")
    assert code == 1
    assert "No space" in err
    assert "Traceback" not in err
    after = {k: v[1] for k, v in snapshot(job.parent / "out").items()}
    for name, content in before.items():
        if f"out/{artifact}" in name:
            assert after[name] == content
    assert manifest(job)["status"] == "failed"
    monkeypatch.undo()
    assert run(job, capsys)[0] == 0


def test_a_disk_that_is_really_full(job):
    """A file size limit of the kernel's: whatever library writes, there is one message, and the old table stays."""
    before = (job.parent / "out/ranges.parquet").read_bytes()
    edit(job, "batch_size = 2", "batch_size = 4")
    script = (
        "import resource, signal, sys; from calibcast.engines.cli import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); main(['run', {str(job)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / ".package")},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert (job.parent / "out/ranges.parquet").read_bytes() == before


def test_a_disk_without_a_byte_left_is_told(job, capsys, monkeypatch):
    """Also the note of who holds the folder cannot be written then: no traceback, and all that was good stays."""
    before = snapshot(job.parent / "out")
    edit(job, "batch_size = 2", "batch_size = 4")

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = run(job, capsys)
    assert code == 1
    assert "cannot write" in err
    assert "No space left on device" in err
    assert snapshot(job.parent / "out") == before


def test_an_output_that_cannot_be_written_is_told_before_hours_of_work(job, capsys):
    (job.parent / "file").write_text("")
    edit(job, 'folder = "out"', 'folder = "file/out"')
    code, _, err = run(job, capsys)
    assert code == 1
    assert "cannot write into" in err


def test_artifacts_go_to_an_fsspec_store_with_the_manifest_last(job, capsys, monkeypatch):
    import fsspec

    store = fsspec.filesystem("memory")
    puts = []
    put = type(store).put_file
    monkeypatch.setattr(
        type(store),
        "put_file",
        lambda self, local, remote, **k: (puts.append(remote), put(self, local, remote, **k))[1],
    )
    edit(job, 'folder = "out"', 'folder = "memory://bucket/night"')
    assert run(job, capsys)[0] == 0
    artifacts = [name for name in puts if "checkpoints" not in name]
    assert artifacts[-1] == "/bucket/night/manifest.json"
    assert len(artifacts) == len(set(artifacts))
    assert {"/bucket/night/ranges.parquet", "/bucket/night/engine/program.pt2"} <= set(artifacts)
    assert not store.exists("/bucket/night/checkpoints/rank-0-of-1.npz")
    assert run(job, capsys)[1].count(": made") == 0
    # On another machine, without the scratch folder, nothing is done twice either.
    shutil.rmtree(job.parent / ".calibcast")
    code, out, _ = run(job, capsys, "--dry-run")
    assert (code, made(out)) == (0, ([], STAGES))
    assert not (job.parent / ".calibcast").exists()
    code, out, err = run(job, capsys)
    assert code == 0, err
    assert made(out) == ([], STAGES)
    # And where somebody else has written meanwhile, theirs stays.
    edit(job, "", "\n[plan]\ndata_max = 5.0")
    original = type(store).cat_file
    seen = []

    def changed(self, path, *args, **kwargs):
        content = original(self, path, *args, **kwargs)
        seen.append(path)
        return content if len(seen) == 1 else content.replace(b'"done"', b'"rejected"')

    monkeypatch.setattr(type(store), "cat_file", changed)
    code, _, err = run(job, capsys)
    assert code == 1
    assert "another run has written to memory://bucket/night" in err


def test_arguments_of_a_pt2_and_missing_things_are_told(job, capsys):
    torch.export.save(load_model(f"{job.parent}/functions.py:model"), job.parent / "net.pt2")
    edit(job, 'functions.py:model"', 'net.pt2"\narguments = {a = 1}')
    assert run(job, capsys)[0] == 2
    for old, new, code, said in (
        ("arguments = {a = 1}\n", "", 0, ""),
        ('folder = "rows"', 'folder = "rwos"', 2, "there is no folder"),
        ('folder = "rwos"', 'parquet = "*.parquet"', 2, "no file matches '*.parquet'"),
        ('parquet = "*.parquet"', 'loader = "functions.py:loader"', 2, "has no function 'loader'"),
        (
            'loader = "functions.py:loader"',
            'folder = "rows"\ncolumns = {inptu = "x"}',
            2,
            "the model has no input 'inptu'",
        ),
    ):
        edit(job, old, new)
        found, _, err = run(job, capsys)
        assert found == code, err
        assert said in err
        assert "Traceback" not in err
