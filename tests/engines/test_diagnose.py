"""`calibcast diagnose`: which layer is it, why was it low, and what to do; and that what it says to do helps."""

import re
import shlex

import pytest
import torch
from calibcast.engines.cli import _run
from calibcast.engines.demo import load_digits, pixels_of, train
from calibcast.engines.review.diagnosis import diagnosis_text, error_sources
from calibcast.passes import classify, compare, insert_casts
from torch import nn

from tests.unmeasured import calibrate
from tests.unwrapped import unwrapped

USER_FILE = """
import torch
from calibcast.engines.demo import held_out, load_digits, pixels_of, train

def net():
    torch.manual_seed(0)
    return train(load_digits()[0], epochs=3), (torch.rand(100, 64),)

def few():
    return [pixels_of(batch) for batch in held_out() if len(batch[0]) == 100][:2]

def wrong():
    return [torch.rand(100, 63)]
"""


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "user.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments):
    code = _run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_following_the_advice_mends_a_network_that_fp16_breaks(here, capsys):
    """All low, the digits' network is NaN. Each round excludes what the last one named, until nothing is left."""
    exclude = []
    for _ in range(6):
        options = exclude or ["--nodes-to-include", ".*"]
        made = ("plan", "user.py:net", "-o", "p.json", "--data-max", "inf", "--init-max", "inf", *options)
        assert run(capsys, *made)[0] == 0
        code, out, err = run(capsys, "diagnose", "user.py:net", "p.json", "--data", "user.py:few")
        assert (code, "Traceback" in err) == (0, False)
        advice = out.split("what to do:")[1]
        if "nodes-to-exclude" not in advice:
            break
        if not exclude:
            assert "first non-finite node: sum_1 (aten.sum.dim_IntList, " in unwrapped(out)
            assert "engines/demo.py:" in out
            why = "sum_1 (aten.sum.dim_IntList) runs in float16: the user's include list asks for it"
            assert why in unwrapped(out)
            assert "--nodes-to-exclude '^sum_1$'" in advice
        exclude += [word for word in shlex.split(advice) if word.startswith(("^", "--nodes-to-exclude"))]
    assert "first non-finite node: none" in out
    assert "nothing: no node is non-finite and none loses much" in out


def test_the_plan_from_calibration_has_nothing_to_diagnose(here, capsys):
    run(capsys, "calibrate", "user.py:net", "--data", "user.py:few", "-o", "r.parquet")
    run(capsys, "plan", "user.py:net", "r.parquet", "-o", "p.json")
    code, out, _ = run(
        capsys, "diagnose", "user.py:net", "p.json", "--data", "user.py:few", "--max-batches", "1", "--rows", "3"
    )
    assert code == 0
    assert "Comparison: 1 batch," in out
    assert "first non-finite node: none" in out
    assert "and 32 more" in out
    assert max(map(len, out.splitlines())) <= 110


def test_mistakes_are_one_message(here, capsys):
    run(capsys, "plan", "user.py:net", "-o", "p.json")
    cases = [
        (("user.py:net", "p.json", "--data", "user.py:wrong"), 1, "dimension 1 is 63, not 64"),
        (("user.py:net", "p.json"), 2, "Missing option '--data'"),
        (("user.py:net", "missing.json", "--data", "user.py:few"), 2, "no such file"),
        (("user.py:nte", "p.json", "--data", "user.py:few"), 2, "near names: net"),
        (("user.py:net", "p.json", "--data", "user.py:few", "--rows", "0"), 2, "greater than or equal to 1"),
    ]
    for arguments, code, message in cases:
        found, _, err = run(capsys, "diagnose", *arguments)
        assert (found, "Traceback" in err) == (code, False)
        assert message in re.sub(r"[│\s]+", " ", err)


def test_help_shows_an_example(capsys):
    code, out, _ = run(capsys, "diagnose", "--help")
    assert code == 0
    assert "Example: calibcast diagnose" in re.sub(r"\s+", " ", out)


def diagnosed(model, data, **rules):
    program = torch.export.export(model.eval(), (data[0],))
    plan = classify(program, calibrate(program, data, progress=False), **rules)
    comparison = compare(program, insert_casts(program, plan), data, progress=False)
    return error_sources(program, plan, comparison), diagnosis_text(program, plan, comparison, 12)


ALL_LOW = {"data_max": torch.inf, "nodes_to_include": [".*"]}


def test_a_vanishing_weight_is_told_and_its_readers_are_excluded():
    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.full((8,), 1e-8))

        def forward(self, x):
            return x * self.gain * 1e8

    found, text = diagnosed(Faint(), [torch.randn(4, 8)], **ALL_LOW)
    assert found[0].exclude == ("mul",)
    assert "p_gain (parameter): its values vanish or round away in float16" in text
    assert "--nodes-to-exclude '^mul$'" in text


def test_a_high_node_that_shows_an_earlier_rounding_blames_what_it_reads():
    """The subtraction is in fp32 and takes away what its low input had rounded."""

    class Offset(nn.Module):
        def forward(self, x):
            return (x + 1000.0) - 1000.0

    rules = {**ALL_LOW, "nodes_to_include": ["^add$"], "nodes_to_exclude": ["^sub$"]}
    found, text = diagnosed(Offset(), [torch.randn(4, 8)], **rules)
    assert [(remedy.node, remedy.exclude) for remedy in found] == [("sub", ("add",))]
    assert "sub (aten.sub.Tensor) stays in its exported type" in text
    assert "It reads what was rounded before: add." in text


def test_names_inside_regions_become_patterns_that_match(tmp_path):
    class Region(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                y = x * 1e4 * 1e4
            return y * 1e-8

    found, text = diagnosed(Region(), [torch.randn(4, 8)], **ALL_LOW)
    assert found[0].exclude == ("submod_1.mul_1",)
    pattern = re.search(r"--nodes-to-exclude '(\^submod_1[^']*)'", text).group(1)
    found, _ = diagnosed(
        Region(), [torch.randn(4, 8)], **{**ALL_LOW, "nodes_to_include": ["^mul"]}, nodes_to_exclude=[pattern]
    )
    assert "submod_1.mul_1" not in [remedy.node for remedy in found]


def test_error_that_builds_up_everywhere_is_not_blamed_on_one_node():
    class Grow(nn.Module):
        def forward(self, x):
            for _ in range(60):
                x = torch.sin(x * 3.0)
            return x

    found, text = diagnosed(Grow(), [torch.randn(64, 8)], **ALL_LOW)
    assert found == ()
    assert "error builds up over many" in text


def test_the_demo_network_under_its_own_plan():
    training, calibration, held = load_digits()
    data = [pixels_of(batch) for batch in calibration]
    found, text = diagnosed(train(training, epochs=3), data)
    assert found == ()
    assert "nothing: no node is non-finite" in text
    assert len(held)
