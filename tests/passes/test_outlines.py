"""What a graph says about its nodes, beside the measurements, and how two tables of rounding differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import polars as pl
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from calibcast.calib import calibrate
from calibcast.calib.range_diff import headroom_text, range_diff
from calibcast.passes.program_facts import ProgramFacts, _size
from torch import nn
from torch.export import ExportedProgram

X = torch.linspace(-1.0, 2.0, 32).reshape(4, 8)


def exported(function: Callable[..., Any]) -> ExportedProgram:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8).eval()
            self.norm.running_var.copy_(torch.linspace(0.5, 4.0, 8))  # type: ignore[union-attr, operator]

        def forward(self, x: torch.Tensor) -> Any:
            return function(self, x)

    return torch.export.export(Net().eval(), (X,))


def outline(function: Callable[..., Any], name: str, measured: bool = True) -> dict[str, Any]:
    program = exported(function)
    ranges = calibrate(program, [X], progress=False, rounding_batches=0) if measured else None
    return dict(ProgramFacts.of(program, ranges).outlines[name].values)


@pytest.mark.parametrize(
    ("function", "name", "expected"),
    [
        (lambda net, x: x.sum(-1), "sum_1", {"depth": 8, "epsilon": None, "moves": False, "custom": False}),
        (lambda net, x: F.layer_norm(x, (8,), eps=1e-3), "layer_norm", {"depth": 8, "epsilon": 1e-3}),
        (lambda net, x: x.relu(), "relu", {"depth": None, "hidden": (), "least_spread": None}),
        (lambda net, x: x.reshape(-1).relu(), "reshape", {"moves": True, "depth": None}),
        (lambda net, x: net.norm(x), "batch_norm", {"least_spread": 0.5, "epsilon": 1e-5}),
    ],
)
def test_outlines_say_what_the_graph_says(function: Callable[..., Any], name: str, expected: dict[str, Any]) -> None:
    found = outline(function, name)
    assert {key: found[key] for key in expected} == {
        key: pytest.approx(value) if isinstance(value, float) else value for key, value in expected.items()
    }
    assert found["has_ranges"]
    assert not outline(function, name, measured=False)["has_ranges"]


def test_hidden_values_are_bounded_by_what_was_measured_or_by_the_peaks() -> None:
    (measured,) = outline(lambda net, x: x.sum(-1), "sum_1")["hidden"]
    assert measured.bound == pytest.approx(float(X.abs().sum(-1).max()))
    (least,) = [outline(lambda net, x: F.layer_norm(x, (8,)), "layer_norm")["least_spread"]]
    assert least == pytest.approx(float(X.var(-1, correction=0).min()), rel=1e-4)


def test_numbers_in_a_call_are_literals_but_flags_are_not() -> None:
    literals = outline(lambda net, x: torch.add(x, 2, alpha=3).clamp(min=0.5), "add")["literals"]
    assert [(literal.name, literal.value) for literal in literals] == [("other", 2.0), ("alpha", 3.0)]
    clamp = outline(lambda net, x: x.clamp(min=0.5), "clamp")["literals"]
    assert [(literal.name, literal.value) for literal in clamp] == [("min", 0.5)]


def test_a_node_writes_the_bytes_of_its_results() -> None:
    program = exported(lambda net, x: (x.half().float() + 1).reshape(-1).topk(3))
    sizes = {n.name: _size(n) for n in program.graph.nodes if n.op == "call_function"}
    assert sizes["add"] == 32 * 4
    assert sizes["topk"] == 3 * 4 + 3 * 8
    assert sizes["reshape"] == 0
    assert 32 * 2 in sizes.values()


def test_changes_of_noise_are_told_in_decibels() -> None:
    program = exported(lambda net, x: (x * 1.7).exp())
    table = calibrate(program, [X], progress=False)
    noise = pl.col("noise")
    grown = replace(
        table, rounding=table.rounding.with_columns(noise=pl.when(noise > 0).then(noise * 100).otherwise(noise))
    )
    changes = range_diff(table, grown).rounding
    assert changes.height == table.rounding.height
    assert set(changes["change_db"].round(6)) <= {20.0, 0.0}
    assert changes["change_db"][0] == pytest.approx(20.0)
    assert range_diff(grown, table).rounding["change_db"].min() == pytest.approx(-20.0)
    assert set(range_diff(table, table).rounding["change_db"]) == {0.0}


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (12.0, 1.3, "block: 12x to 1.3x below 65504"),
        (12.0, 0.0, "block: 12x below 65504 to NaN or Inf"),
        (12.0, 0.5, "block: 12x below to 2x above 65504"),
        (0.5, 0.25, "block: 2x to 4x above 65504"),
        (1.0, 1.0, "block: 1x to 1x below 65504"),
        (9.94, 9.96, "block: 9.9x to 10x below 65504"),
    ],
)
def test_headroom_is_told_as_a_factor(old: float, new: float, text: str) -> None:
    assert headroom_text({"module": "block", "node": "n", "headroom_old": old, "headroom_new": new}) == text
    assert headroom_text({"module": "", "node": "n", "headroom_old": 2.0, "headroom_new": 2.0}).startswith("n: ")


@pytest.mark.parametrize(
    ("scale", "tolerance", "change"),
    [
        (1.0, 0.01, "same"),
        (1.009, 0.01, "same"),
        (1.011, 0.01, "grew"),
        (0.991, 0.01, "same"),
        (0.989, 0.01, "shrank"),
        (1.2, 0.3, "same"),
        (1.4, 0.3, "grew"),
    ],
)
def test_a_peak_grows_where_it_passes_the_tolerance(scale: float, tolerance: float, change: str) -> None:
    program = exported(lambda net, x: x.relu())
    old, new = (calibrate(program, [X * s], progress=False, rounding_batches=0) for s in (1.0, scale))
    diff = range_diff(old, new, tolerance)
    found = dict(diff.frame.select("node", "change").iter_rows())
    assert (found["x"], found["relu"]) == (change, change)
    row = diff.frame.filter(pl.col("node") == "relu").row(0, named=True)
    assert row["growth"] == pytest.approx(scale, rel=1e-6)
    assert row["headroom_old"] == pytest.approx(65504 / 2)
    assert row["headroom_lost"] == pytest.approx(scale, rel=1e-6)
    assert diff.losses().height == (2 if scale > 1.01 else 0)
    assert diff.losses(below=65504 / 2 / 1.3).height == (2 if scale > 1.3 else 0)


def test_values_that_became_infinite_grew() -> None:
    program = exported(lambda net, x: x.relu())
    bad = X.clone()
    bad[0, 0] = math.inf
    old, new = (calibrate(program, [x], progress=False, rounding_batches=0, on_nonfinite="warn") for x in (X, bad))
    frame = range_diff(old, new).frame.filter(pl.col("node") == "x")
    assert frame["change"].to_list() == ["grew"]
    assert (frame["headroom_new"][0], frame["nonfinite_new"][0], frame["nonfinite_old"][0]) == (0.0, 1, 0)
