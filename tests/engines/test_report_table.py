"""`calibcast report` in a terminal and in Python: worst first, filters, formats, pipes."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import polars as pl
import pytest
import torch
from calibcast.calib import calibrate as measure
from calibcast.calib.printable import printable
from calibcast.calib.ranges import RangeTable
from calibcast.calib.terminal_text import cut
from calibcast.calib.text_table import Column, text_table
from calibcast.engines.cli import _run
from calibcast.engines.colour import painted
from calibcast.engines.review.report_table import overflowing, report_frame
from calibcast.engines.usage import UsageError
from calibcast.passes import classify
from torch import nn

# The rules as they stand without evidence from rounding: tests of plans that have it are in test_rounding_plan.py.
calibrate = partial(measure, rounding_batches=0)

ROOT = Path(__file__).resolve().parents[2]


class Net(nn.Module):
    """encoder: two linears with a large product between; head: a linear."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        hidden = self.encoder(x) * 4000.0
        return self.head(hidden / 4000.0)


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    program = torch.export.export(Net().eval(), (torch.randn(4, 8),))
    ranges = calibrate(program, [torch.randn(4, 8) for _ in range(3)], progress=False)
    return ranges, classify(program, ranges)


@pytest.fixture
def files(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made[0].save("r.parquet")
    made[1].save("p.json")
    return tmp_path


def run(capsys, *arguments):
    code = _run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def nodes(made, **filters):
    return report_frame(*made, **filters)["node"].to_list()


def test_the_worst_tensor_comes_first(made):
    frame = report_frame(made[0])
    assert frame["node"][0] == "mul"
    assert frame["absmax"].is_sorted(descending=True)
    assert frame["headroom"][0] == pytest.approx(65504 / frame["absmax"][0])


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"above": 512}, {"mul"}),
        ({"op": "linear"}, {"linear", "linear_1", "linear_2"}),
        ({"op": "aten.linear"}, {"linear", "linear_1", "linear_2"}),
        ({"op": "aten.linear.default", "module": r"encoder\..*"}, {"linear", "linear_1"}),
        ({"module": "head"}, {"linear_2", "p_head_weight", "p_head_bias"}),
        ({"kind": "input"}, {"x"}),
        ({"rule": "data_max"}, {"mul", "div"}),
        ({"where": ["absmax > 512", "kind=activation"]}, {"mul"}),
        ({"where": ["op~mul|div"]}, {"mul", "div"}),
        ({"where": ["nan>0"]}, set()),
    ],
)
def test_filters_leave_what_they_say(made, filters, expected):
    assert set(nodes(made, **filters)) == expected


def test_any_column_sorts_either_way(made):
    frame = report_frame(made[0], sort="rms")
    assert frame["rms"].is_sorted(descending=True)
    assert report_frame(made[0], sort="node", descending=False)["node"].is_sorted()


def test_what_has_no_finite_value_is_above_every_limit():
    program = torch.export.export(nn.Identity(), (torch.zeros(2),))
    with pytest.warns(UserWarning, match="NaN or Inf"):
        ranges = calibrate(program, [torch.tensor([float("nan"), float("inf")])], progress=False)
    assert report_frame(ranges, above=512)["nonfinite"].to_list() == [2]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"sort": "absmxa"}, "no column 'absmxa'; near names: absmax"),
        ({"sort": "shape"}, "it is a list"),
        ({"where": ["rmss>3"]}, "near names: rms"),
        ({"where": ["rms>many"]}, "rms is a number, and 'many' is not"),
        ({"where": ["rms"]}, "give COLUMN, one of"),
        ({"where": ["histogram>3"]}, "histogram is a list"),
        ({"op": "linaer"}, "near names: linear"),
        ({"kind": "weight"}, "no kind of tensor; known: activation, buffer, constant, input, parameter"),
        ({"rule": "data_mx"}, "near names: data_max"),
        ({"module": "a("}, "not a regular expression"),
    ],
)
def test_unknown_names_list_the_known_ones(made, filters, message):
    with pytest.raises(UsageError, match="(?s)" + message.replace("(", r"\(")):
        report_frame(*made, **filters)


@pytest.mark.parametrize("filters", [{"kind": "buffer"}, {"rule": "nonfinite"}, {"rule": "interior", "kind": "input"}])
def test_what_nothing_has_is_no_row_and_no_mistake(made, filters):
    """A model without buffers, a plan without that rule: a pipeline that asks for them gets no rows."""
    assert nodes(made, **filters) == []


def test_what_is_all_mask_is_not_worst():
    """`full(-inf)` has no finite value, and nothing is wrong with it: it is no worse than a magnitude of 600."""

    class Causal(nn.Module):
        def forward(self, x):
            return (600 * x @ x.mT + torch.full((4, 4), float("-inf")).triu(1)).softmax(-1)

    x = torch.eye(4)[None]
    ranges = calibrate(torch.export.export(Causal(), (x,)), [x], progress=False)
    assert ranges.frame.filter(node="full")["absmax"].to_list() == [None]
    assert set(report_frame(ranges, above=512)["node"]) == {"mul", "matmul", "add"}
    assert report_frame(ranges)["absmax"].to_list()[:1] == [600.0]


def test_a_rule_needs_a_plan(made):
    with pytest.raises(UsageError, match="give --plan"):
        report_frame(made[0], rule="data_max")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_the_terminal_and_says_what_was_left_out(files, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = run(capsys, "report", "r.parquet", "--plan", "p.json", "--rows", "3")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= width
    assert "data_max" in out
    assert "and 10 more" in out
    code, out, _ = run(capsys, "report", "r.parquet", "--kind", "parameter")
    assert "6 of 13 tensors" in out


def test_the_column_that_the_table_is_sorted_by_is_shown_and_stands_in_front(made, files, capsys):
    out = run(capsys, "report", "r.parquet", "--sort", "rms", "--rows", "1")[1]
    assert "rms" in out.splitlines()[1].split()
    assert report_frame(made[0], sort="rms").columns[:3] == ["node", "module", "rms"]
    assert "absmax" in str(report_frame(made[0]))


def test_only_the_table_is_cut_unless_rows_are_asked_for(files, capsys):
    ranges = RangeTable.load("r.parquet")
    many = pl.concat([ranges.frame.with_columns(output=pl.lit(copy).cast(pl.Int64)) for copy in range(5)])
    replace(ranges, frame=many).save("many.parquet")
    assert run(capsys, "report", "many.parquet")[1].count("\n") == 1 + 1 + 40 + 1
    assert "and 25 more; --rows 0 shows all" in run(capsys, "report", "many.parquet")[1]
    assert len(json.loads(run(capsys, "report", "many.parquet", "--format", "json")[1])) == 65
    assert len(json.loads(run(capsys, "report", "many.parquet", "--format", "json", "--rows", "2")[1])) == 2


def test_a_table_gives_long_texts_what_is_left_and_drops_what_matters_least():
    columns = [Column("a", "a"), Column("b", "b", 9, number=True, drop=1), Column("c", "c", head=True)]
    row = {"a": "layer." * 10, "b": 1.5, "c": "because " * 10}
    wide, narrow = (text_table([row], columns, width) for width in (70, 40))
    assert max(map(len, wide)) <= 70
    assert wide[0].split() == ["a", "b", "c"]
    assert max(map(len, narrow)) <= 40
    assert narrow[0].split() == ["a", "c"]
    assert narrow[1].startswith("..")  # of a path, its end
    assert narrow[1].endswith("..")  # of a sentence, its beginning


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert painted("over", "red", Terminal()) == "\x1b[31mover\x1b[0m"
    assert painted("over", "red", io.StringIO()) == "over"
    monkeypatch.setenv("NO_COLOR", "1")
    assert painted("over", "red", Terminal()) == "over"


def test_lines_with_what_fp16_cannot_hold_are_red(made):
    frame = pl.DataFrame({"headroom": [0.5, 2.0, None, None], "nonfinite": [0, 0, 1, 0]})
    assert overflowing(made[0], frame) == {2, 4}


def test_json_and_csv_and_parquet_hold_the_same_rows(files, capsys):
    arguments = ("report", "r.parquet", "--plan", "p.json", "--above", "100")
    rows = json.loads(run(capsys, *arguments, "--format", "json")[1])
    assert [row["node"] for row in rows] == ["mul"]
    assert rows[0]["rule"] == "data_max"
    table = pl.read_csv(io.StringIO(run(capsys, *arguments, "--format", "csv")[1]))
    assert table["absmax"].to_list() == [rows[0]["absmax"]]
    assert table["shape"].to_list() == ["4 8"]
    assert run(capsys, *arguments, "--format", "parquet", "-o", "out.parquet")[0] == 0
    assert pl.read_parquet("out.parquet")["node"].to_list() == ["mul"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "xml"], "--format xml: known are table, json, csv, parquet"),
        (["--kind", "weights"], "known: activation"),
        (["--rule", "data_max"], "give --plan"),
        (["--sort", "size"], "there is no column 'size'"),
    ],
)
def test_mistakes_on_the_command_line_are_exit_code_2(files, capsys, arguments, message):
    code, out, err = run(capsys, "report", "r.parquet", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_closed_pipe_is_no_error(made, files):
    """As in `calibcast report .. --format json | head -1`."""
    command = [sys.executable, "-m", "calibcast", "report", "r.parquet", "--format", "json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".package")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait() == 0
        assert process.stderr.read() == b""


def test_cells_are_cut_at_their_start_and_cannot_drive_the_terminal():
    assert cut("encoder.layers.11.linear", 12) == "...11.linear"
    assert cut("\u5c64\u5c64\u5c64\u5c64", 6) == "..\u5c64\u5c64"
    assert printable("a\x1b[31mb\nc") == "a\ufffd[31mb\ufffdc"
