"""Every verdict is true, wherever it is read: bounds and what was seen, in Python, JSON, terminal and page."""

import json
import math

import pytest
import torch
from calibcast.calib import CalibcastError, GateError, MismatchError, calibrate
from calibcast.calib.artifacts import save_program
from calibcast.engines import build, verify
from calibcast.engines.cli import main
from calibcast.engines.html_report import html_report
from calibcast.engines.html_report.banner import verdict_level
from calibcast.engines.judging.metrics import OutputError
from calibcast.engines.judging.report_file import load_report, save_report
from calibcast.passes import classify, insert_casts
from torch import nn

GOOD, BAD = "good", "bad"


class Temperature(nn.Module):
    """Kelvins: an offset of 285, a variation of a few."""

    def forward(self, x):
        return x * 3.0 + 285.0


def temperatures():
    torch.manual_seed(0)
    program = torch.export.export(Temperature(), (torch.randn(16, 4),))
    return program, [torch.randn(16, 4) for _ in range(3)]


def noisy(x):
    """An error of 1 K."""
    return Temperature()(x) + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


def page(report, folder):
    program, batches = temperatures()
    ranges = calibrate(program, batches, progress=False)
    save_report(folder / "v.json", report)
    content = json.loads((folder / "v.json").read_text())
    return content, html_report(ranges, classify(program, ranges), content)


@pytest.mark.parametrize(
    ("bounds", "words", "passed", "level"),
    [
        ({}, "no bounds were set", True, ""),
        ({"min_sqnr_db": 40}, "passed 40 dB with 49.0", True, GOOD),
        ({"min_sqnr_db": 400}, "failed: output: 49.0 < 400 dB", False, BAD),
        ({"min_variation_db": 40}, "< 40 dB of the variation", False, BAD),
        ({"min_channel_variation_db": 20}, "< 20 dB of the variation of the worst channel", False, BAD),
        ({"min_sqnr_db": 40, "max_rel_l2": 0.0001}, "> 0.0001 relative L2", False, BAD),
        ({"min_channel_db": 40, "max_abs": 9}, "passed 40 dB in the worst channel with 4", True, GOOD),
    ],
)
def test_one_verdict_is_read_everywhere(bounds, words, passed, level, tmp_path):
    """What the report, its file, its text and the page say is the same, and the file brings it back."""
    program, batches = temperatures()
    report = verify(noisy, program, batches, progress=False, bounds=bounds)
    content, html = page(report, tmp_path)
    verdict = str(report.verdict)
    assert words in verdict
    assert (report.passed, bool(report), content["passed"], load_report(tmp_path / "v.json").passed) == (passed,) * 4
    assert content["verdict"] == verdict == str(load_report(tmp_path / "v.json").verdict)
    assert content["bounds"] == bounds
    assert verdict in str(report).splitlines()[0]
    assert verdict.replace("<", "&lt;").replace(">", "&gt;") in html
    assert f'<strong class="{level}">' in html
    assert verdict_level(content) == level
    if not passed:
        with pytest.raises(GateError, match="the gate says no"):
            report.require()


def test_a_report_keeps_the_bounds_that_a_gate_was_asked_for():
    """`require` that said no makes the report say no, also when it is saved afterwards; more bounds add up."""
    program, batches = temperatures()
    report = verify(noisy, program, batches, progress=False)
    assert str(report.verdict) == "no bounds were set"
    assert report.require(min_sqnr_db=40) is report
    assert str(report.verdict).startswith("passed 40 dB with 49.0")
    with pytest.raises(GateError, match=r"required at most 0\.5"):
        report.require(max_abs=0.5)
    assert not report.passed
    assert report.bounds.set() == {"min_sqnr_db": 40, "max_abs": 0.5}
    for bound in ({"min_sqnr": 3}, {"min_metrics": {"nobodys": 1}}, {"min_sqnr_db": math.nan}):
        with pytest.raises(CalibcastError, match=r"no bound|no metric|nan is no bound"):
            report.require(**bound)
    with pytest.raises(CalibcastError, match="no bound 'min_sqnr'"):
        verify(noisy, program, batches, progress=False, bounds={"min_sqnr": 3})


def test_a_bound_that_nothing_can_be_held_against_does_not_hold():
    """A gate on integers asked of floats, and the other way round: nothing was compared, so nothing has passed."""
    program, batches = temperatures()
    report = verify(Temperature(), program, batches, progress=False, bounds={"min_equal": 0.5})
    assert str(report.verdict) == "failed: no output has one: nothing to compare"
    rank = torch.export.export(Ranks(), (torch.randn(4, 5),))
    found = verify(Ranks(), rank, [torch.randn(4, 5)], progress=False, bounds={"min_sqnr_db": 10})
    assert not found.passed


def test_what_rides_on_an_offset_is_seen():
    """285 K with an error of 1 K: 49 dB of power, a third of what varies; and the channel in which it is worst."""
    program, batches = temperatures()
    row = verify(noisy, program, batches, progress=False).frame.row(0, named=True)
    assert row["sqnr_db"] > 48
    assert row["variation_db"] == pytest.approx(10 * math.log10(9), abs=1.5)

    def one_channel(x):
        out = Temperature()(x)
        out[:, 2] += 30.0
        return out

    row = verify(one_channel, program, batches, progress=False).frame.row(0, named=True)
    assert row["worst_channel"] == 2
    assert row["worst_channel_db"] == pytest.approx(20 * math.log10(285 / 30), abs=0.2)
    assert row["worst_variation_db"] == pytest.approx(20 * math.log10(3 / 30), abs=1.5)
    assert row["variation_db"] > row["worst_variation_db"] + 5


def streamed(pairs):
    error = OutputError("output")
    for batch, (engine, reference) in enumerate(pairs):
        error.update(engine, reference, batch)
    return error


@pytest.mark.parametrize("shape", [(40,), (64, 5), (6, 7, 5), (2, 3, 8, 8), (2, 3, 4, 4, 4), (4, 5)])
def test_channel_numbers_are_those_of_the_whole(shape):
    """In batches, of any rank: dimension 1 of images and volumes, else the last; without NaN and Inf; far from zero."""
    torch.manual_seed(0)
    reference = torch.randn(shape, dtype=torch.float64) * 0.5 + 3e5
    engine = reference + torch.randn(shape, dtype=torch.float64) * 0.01
    reference.view(-1)[3] = math.nan
    row = streamed(list(zip(engine.split(2), reference.split(2), strict=True))).row()
    whole = len(shape) == 1 or shape == (4, 5)  # few elements in each channel say nothing of it
    channel = 1 if len(shape) > 3 else -1
    moved = [t.reshape(1, -1) if whole else t.movedim(channel, 0).flatten(1) for t in (engine, reference)]
    ours, theirs = moved
    error = (ours - theirs).nan_to_num().square().sum(1)
    variation = torch.stack([(c[c.isfinite()] - c[c.isfinite()].mean()).square().sum() for c in theirs])
    power = theirs.nan_to_num().square().sum(1)
    assert row["variation_db"] == pytest.approx(10 * math.log10(variation.sum() / error.sum()), abs=1e-3)
    ratios = variation / error
    assert row["worst_variation_db"] == pytest.approx(10 * math.log10(ratios.min()), abs=1e-3)
    assert row["worst_channel"] == int(ratios.argmin())
    assert row["worst_channel_db"] == pytest.approx(10 * math.log10((power / error).min()), abs=1e-3)


def test_channels_that_change_in_number_and_single_samples_count_together():
    """A sequence of another length; and one sample, whose channels cannot vary each about a mean of its own."""
    torch.manual_seed(0)
    widths = [torch.randn(3, 4), torch.randn(3, 6), torch.randn(3, 4)]
    row = streamed([(t + 0.1, t) for t in widths]).row()
    whole = torch.cat([t.flatten() for t in widths]).double()
    varies = (whole - whole.mean()).square().sum() / (0.01 * len(whole))
    assert row["variation_db"] == pytest.approx(10 * math.log10(varies), abs=1e-3)
    one = torch.randn(1, 50) + 100
    row = streamed([(one + 0.1, one)]).row()
    assert row["variation_db"] == pytest.approx(10 * math.log10(float(one.double().var(correction=0)) / 0.01), abs=0.05)
    silent = torch.zeros(64, 2)
    silent[:, 0] = torch.randn(64)
    assert math.isfinite(streamed([(silent + 0.1, silent)]).row()["worst_variation_db"])
    assert streamed([(silent, silent)]).row()["worst_variation_db"] == math.inf


@pytest.mark.parametrize(
    ("ours", "theirs", "wrong"),
    [
        (-math.inf, math.inf, 1),
        (math.inf, -math.inf, 1),
        (math.nan, math.inf, 1),
        (math.inf, math.nan, 1),
        (math.nan, 2.0, 1),
        (math.inf, math.inf, 0),
        (math.nan, math.nan, 0),
        (-math.inf, -math.inf, 0),
    ],
)
def test_another_infinity_is_an_error(ours, theirs, wrong):
    """-inf where the reference is +inf, and NaN for Inf, are held against the engine; equal ones are not."""
    error = streamed([(torch.tensor([ours, 1.0]), torch.tensor([theirs, 1.0]))])
    assert error.only_engine == wrong
    assert bool(error.problem) == bool(wrong)


class Ranks(nn.Module):
    """Indices and truth values: what a detector or a search gives."""

    def forward(self, x):
        return x.argsort(-1), x > 0


def test_integers_and_booleans_are_compared_by_equality():
    """Of 20 indices all are wrong: a line says so, and a gate can ask."""
    program = torch.export.export(Ranks(), (torch.randn(4, 5),))
    batches = [torch.randn(4, 5) for _ in range(2)]

    def wrong(x):
        order, sign = Ranks()(x)
        return order.roll(1, -1), sign

    report = verify(wrong, program, batches, progress=False)
    assert report.frame["equal"].to_list() == [0.0, 1.0]
    assert "output[0]" in str(report)
    assert "0% equal" in str(report)
    with pytest.raises(GateError, match=r"output\[0\]: equal 0, required at least 0.9"):
        report.require(min_equal=0.9)


class Detector(nn.Module):
    """How many rows it gives depends on the values."""

    def forward(self, x):
        keep = (x[:, 0] > 0).nonzero().squeeze(-1)
        return x[keep] * 2.0, x.mean()


def test_sizes_that_depend_on_the_data_are_told_and_metrics_run():
    """Where they differ, nothing is compared element by element; the metrics run, and a gate on elements says no."""
    program = torch.export.export(Detector(), (torch.randn(6, 3),))
    batches = [torch.randn(6, 3) for _ in range(3)]
    calls = []

    def one_more(x):
        boxes, mean = Detector()(x)
        more = torch.cat([boxes, boxes[:1]]) if len(calls) else boxes
        calls.append(len(boxes))
        return more, mean

    report = verify(
        one_more, program, batches, metrics={"boxes": lambda out, ref: len(ref[0]) / len(out[0])}, progress=False
    )
    assert report.frame["unlike"].to_list() == [2, 0]
    assert report.frame["sqnr_db"][0] == math.inf  # of the batch that could be compared
    assert 0 < report.metrics["boxes"] < 1
    assert report.require(min_metrics={"boxes": 0.1}).passed
    with pytest.raises(GateError, match=r"output\[0\]: of another size in 2 of 3 batches"):
        report.require(min_sqnr_db=10)
    with pytest.raises(MismatchError, match=r"of the program \["):  # columns do not depend on the data
        verify(lambda x: (x[:, :2], x.mean()), program, batches, progress=False)


def exit_code(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_the_command_line_writes_what_it_says(tmp_path, capsys, monkeypatch):
    """`verify --min-sqnr-db 400 -o v.json` says no, and so does the page that is made from v.json."""
    monkeypatch.chdir(tmp_path)
    program, batches = temperatures()
    ranges = calibrate(program, batches, progress=False)
    ranges.save("r.parquet")
    save_program(program, tmp_path / "net.pt2")
    plan = classify(program, ranges, nodes_to_include={"^.*$"})
    build(insert_casts(program, plan), plan, ranges, backend="eager").save("engine")
    (tmp_path / "data.py").write_text("import torch\ndef held():\n    return [torch.randn(16, 4) for _ in range(2)]\n")
    call = ["verify", "engine", "net.pt2", "--data", "data.py:held", "-o", "v.json"]
    for bound, code, words in (("400", 3, "failed: output: "), ("20", 0, "passed 20 dB with ")):
        assert exit_code([*call, "--min-sqnr-db", bound]) == code
        assert words in capsys.readouterr().out
        assert json.loads((tmp_path / "v.json").read_text())["verdict"].startswith(words)
        assert exit_code(["report", "r.parquet", "--html", "p.html", "--verification", "v.json"]) == 0
        capsys.readouterr()
        assert f"Accuracy gate: {words}" in (tmp_path / "p.html").read_text()
