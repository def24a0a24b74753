"""`calibcast diff` and `calibcast what-if`: what they print, and when they fail a build."""

import io
import json
import re

import polars as pl
import pytest
import torch
from calibcast.engines.cli import _run
from calibcast.engines.locations import load_model
from calibcast.passes import classify, what_if
from calibcast.passes.plan_diff import plan_diff
from torch import nn

from tests.unmeasured import calibrate
from tests.unwrapped import unwrapped

USER_FILE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
    def forward(self, x):
        return x + torch.relu(self.linear(x)) * 20.0

class Net(nn.Module):
    def __init__(self, first=False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.first = first
    def forward(self, x):
        if self.first:
            x = torch.tanh(x) + x
        for block in self.blocks:
            x = block(x)
        return x

def model():
    return Net().eval(), (torch.randn(4, 8),)

def changed():
    return Net(first=True).eval(), (torch.randn(4, 8),)
"""


def measured(name, scale):
    g = torch.Generator().manual_seed(0)
    return calibrate(
        load_model(f"user.py:{name}"),
        [torch.randn(4, 8, generator=g) * scale for _ in range(3)],
        progress=False,
        rounding_batches=0,  # the rules alone
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "user.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    measured("model", 1.0).save("old.parquet")
    measured("model", 1.2).save("near.parquet")
    measured("model", 40.0).save("far.parquet")
    measured("changed", 40.0).save("changed.parquet")
    return tmp_path


def run(capsys, *arguments):
    code = _run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_drift_is_listed_with_headroom_and_flips(here, capsys):
    code, out, err = run(capsys, "diff", "old.parquet", "far.parquet", "--program", "user.py:model")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines()[-8:])) <= 80
    assert "the same graph: 0 new, 0 gone" in out
    assert "headroom lost:" in out
    assert "x below 65504" in out
    assert "low to high (data_max): its" in out
    assert "all rules" in out


def test_flips_by_all_rules_are_those_of_the_two_plans(here, capsys):
    arguments = ("diff", "old.parquet", "far.parquet", "--program", "user.py:model", "--format", "json")
    rows = json.loads(run(capsys, *arguments)[1])
    program = load_model("user.py:model")
    old, new = (classify(program, measured("model", scale)) for scale in (1.0, 40.0))
    expected = {n for n in old.low_precision_nodes if n in new.high_precision_nodes}
    assert expected
    assert {row["node"] for row in rows if row["flip"] == "to_high"} == expected


def test_without_a_program_tensors_alone_are_judged_and_it_says_so(here, capsys):
    code, out, _ = run(capsys, "diff", "old.parquet", "far.parquet")
    assert code == 0
    assert "each tensor alone; --program MODEL asks all rules" in unwrapped(out)
    assert re.search(r"mul_1 \(.*\): low to high \(data_max\): its output reached", unwrapped(out))


@pytest.mark.parametrize(
    ("new", "gates", "code", "said"),
    [
        ("old", ["flip", "headroom=2"], 0, ""),
        ("near", ["flip", "headroom=2"], 0, ""),
        ("far", ["flip"], 3, "decisions flip: "),
        ("far", ["headroom=100000"], 3, "tensors have lost headroom and have less than 100000x: "),
        ("far", ["headroom=1.01"], 0, ""),
        ("changed", ["flip"], 3, "decisions flip: "),
    ],
)
def test_gates_are_exit_code_3(here, capsys, new, gates, code, said):
    options = [word for gate in gates for word in ("--fail-on", gate)]
    found, out, err = run(capsys, "diff", "old.parquet", f"{new}.parquet", *options)
    assert found == code
    assert said in err
    assert "tensors before" in out  # the report comes all the same


def test_the_gates_hold_with_all_rules_on_the_model_exported_anew(here, capsys):
    arguments = ("diff", "old.parquet", "changed.parquet", "--program", "user.py:changed", "--fail-on", "flip")
    code, out, _ = run(capsys, *arguments)
    assert code == 3
    assert "another export, matched by module path and structure: 2 new" in unwrapped(out)
    assert "new: tanh, add" in out
    flips = json.loads(run(capsys, *arguments, "--format", "json")[1])
    moved = {row["node"] for row in flips if row["flip"] == "to_high"}
    assert "tanh" not in moved  # new, so it did not flip
    assert any(node.startswith("mul") for node in moved)


@pytest.mark.parametrize("gate", ["flips", "headroom", "headroom=", "headroom=-1", "headroom=x"])
def test_an_unknown_gate_is_exit_code_2(here, capsys, gate):
    code, _, err = run(capsys, "diff", "old.parquet", "near.parquet", "--fail-on", gate)
    assert code == 2
    assert "known are flip and headroom=NUMBER" in err


def test_another_program_than_that_of_the_new_table_is_refused(here, capsys):
    code, _, err = run(capsys, "diff", "old.parquet", "far.parquet", "--program", "user.py:changed")
    assert code == 1
    assert "these ranges belong to another program" in err


def test_two_plans_can_be_compared(here, capsys):
    program = load_model("user.py:model")
    classify(program, measured("model", 1.0)).save("old.json")
    classify(program, measured("model", 40.0)).save("new.json")
    code, out, err = run(capsys, "diff", "old.json", "new.json", "--fail-on", "flip")
    assert code == 3
    assert "to_high" in out
    assert "decisions flip" in err
    assert run(capsys, "diff", "old.json", "old.json", "--fail-on", "flip")[:2] == (0, "no decision changed\n")
    assert run(capsys, "diff", "old.json", "old.json", "--fail-on", "headroom=2")[0] == 2


def test_a_node_that_is_high_by_another_rule_is_told_apart(here):
    program, ranges = load_model("user.py:model"), measured("model", 1.0)
    old = classify(program, ranges, nodes_to_exclude="^relu$")
    new = classify(program, ranges, targets_to_exclude=["aten.relu"])
    rows = {row["node"]: row for row in plan_diff(old, new).iter_rows(named=True)}
    assert rows["relu"]["change"] == "rule"
    assert (rows["relu"]["rule_old"], rows["relu"]["rule_new"]) == ("nodes_to_exclude", "targets_to_exclude")
    assert rows["relu_1"]["change"] == "to_high"
    assert set(rows) == {"relu", "relu_1"}


def test_what_if_prints_the_numbers_of_the_call(here, capsys):
    arguments = ("what-if", "far.parquet", "--program", "user.py:model", "--data-max", "256,inf")
    code, out, err = run(capsys, *arguments, "--low-precision-type", "fp16,bf16", "--range-quantile", "1,0.99")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines()[:9])) <= 80
    table = pl.read_csv(io.StringIO(run(capsys, *arguments, "--format", "csv")[1]))
    frame = what_if(load_model("user.py:model"), measured("model", 40.0), [256, float("inf")])
    assert table["nodes_low"].to_list() == frame["nodes_low"].to_list()
    assert table["casts"].to_list() == frame["casts"].to_list()
    rows = json.loads(run(capsys, *arguments, "--format", "json")[1])
    assert [row["data_max"] for row in rows] == [256.0, "inf"]
    assert rows[1]["to_low"] == frame["to_low"][1].to_list()


def test_what_if_takes_another_base_and_refuses_bad_numbers(here, capsys):
    classify(load_model("user.py:model"), measured("model", 40.0), data_max=float("inf")).save("p.json")
    arguments = ("what-if", "far.parquet", "--program", "user.py:model")
    code, out, _ = run(capsys, *arguments, "--data-max", "inf", "--plan", "p.json")
    assert code == 0
    assert "compared with p.json" in unwrapped(out)
    assert "+0 -0" in out
    assert run(capsys, *arguments, "--data-max", "many")[0] == 2
    assert run(capsys, *arguments, "--data-max", "0")[0] == 2


def test_an_alarm_that_cannot_compare_says_so(here, capsys):
    """Tables, and plans, of two models: without an alarm an error; with one the alarm goes off, exit code 3."""
    ranges = {}
    for name, module in (
        ("a", nn.Sequential(nn.Linear(4, 4), nn.Tanh())),
        ("b", nn.Sequential(nn.Sequential(nn.GELU()))),
    ):
        program = torch.export.export(module.eval(), (torch.randn(2, 4),))
        ranges[name] = calibrate(program, [torch.randn(2, 4)], progress=False, rounding_batches=0)
        ranges[name].save(f"{name}.parquet")
        classify(program, ranges[name]).save(f"{name}.json")
    for kind in ("parquet", "json"):
        assert _run(["diff", f"a.{kind}", f"b.{kind}", "--fail-on", "flip"]) == 3
        assert "the alarm cannot compare" in capsys.readouterr().err
        assert _run(["diff", f"a.{kind}", f"a.{kind}", "--fail-on", "flip"]) == 0
    assert _run(["diff", "a.parquet", "b.parquet"]) == 1
