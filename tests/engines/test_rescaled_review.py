"""What a reader is shown of a rescaled program: true values, and how they are stored. Limits are of what is stored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib.ranges import RangeTable
from calibcast.engines import build, cli
from calibcast.engines.html_report import html_report
from calibcast.engines.html_report.payload import payload, unpacked
from calibcast.engines.review.diagnosis import diagnosis_text, in_true_values
from calibcast.engines.review.report_table import report_frame, report_table
from calibcast.passes.cast_insertion import insert_casts
from calibcast.passes.classification import classify
from calibcast.passes.comparison import compare
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.rescaling.rescaling import rescale
from calibcast.passes.rescaling.result import Rescaling
from torch.export import ExportedProgram

from tests.passes.rescaling_models import measured, rising

_NUMBERS = ("min", "max", "absmax", "smallest", "mean", "rms")


@pytest.fixture(scope="module")
def made() -> tuple[ExportedProgram, list[Any], RangeTable, Rescaling]:
    program, data = rising()
    ranges = measured(program, data)
    fitted = rescale(program, ranges)
    assert fitted.rewrite.multiplied
    return program, data, ranges, fitted


def test_the_report_shows_true_values_and_headroom_of_what_is_stored(made: Any) -> None:
    _, _, ranges, fitted = made
    frame, original = report_frame(fitted.ranges, sort="node"), report_frame(ranges, sort="node")
    own = frame.filter(pl.col("node") != "linear_rescaled")
    assert own.select("node", *_NUMBERS).equals(original.select("node", *_NUMBERS))
    assert {"exponent", "stored_absmax"} <= set(frame.columns) - set(original.columns)
    stored = {row["node"]: row for row in frame.iter_rows(named=True)}
    add = stored["add"]
    assert add["absmax"] > 65504 > add["stored_absmax"] == add["absmax"] * 2.0 ** -add["exponent"]
    assert add["headroom"] == 65504 / add["stored_absmax"]
    assert stored["linear_rescaled"]["absmax"] == stored["linear"]["absmax"]  # the product is of the same tensor
    text = report_table(fitted.ranges)
    assert "a rescaled program, in true values" in text
    assert re.search(rf"^add .*2\^{-add['exponent']} x", text, re.MULTILINE)
    assert "these are not the true values" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_page_shows_true_values_and_how_they_are_stored(made: Any) -> None:
    _, _, ranges, fitted = made
    content, original = payload(fitted.ranges, None)["tensors"], payload(ranges, None)["tensors"]
    assert "exponent" not in original
    at = {name: place for place, name in enumerate(content["node"])}
    for place, name in enumerate(original["node"]):
        assert content["absmax"][at[name]] == original["absmax"][place]
        assert content["bins"][at[name]] == original["bins"][place]
        assert content["exponent"][at[name]] == fitted.exponents.get((name, 0), 0)
    page = html_report(fitted.ranges, classify(fitted.program, fitted.ranges))
    assert "tensors are stored as powers of two of themselves" in page
    assert "x below the largest fp16: it reaches" in page
    assert unpacked(re.search(r'id="payload"[^>]*>([^<]+)<', page).group(1).strip())["tensors"]["exponent"]  # type: ignore[union-attr]


def test_reasons_say_that_a_tensor_is_stored_otherwise(made: Any) -> None:
    """At a limit that nothing fits in, each magnitude that is not the network's own says so."""
    program, _, ranges, fitted = made
    plan = classify(fitted.program, fitted.ranges, data_max=1e-3)
    k = fitted.exponents["add", 0]
    peak = ranges.frame.row(by_predicate=pl.col("node") == "linear_2", named=True)["absmax"]
    reached = f"reached {peak * 2.0**-k:.4g} as stored (truly {peak:.4g})"
    assert f"its input linear_2, stored as 2^{-k} of itself, {reached}" in plan.explain("add")
    assert plan.exponents["add:0"] == k
    assert any("the program is rescaled" in note for note in plan.notes)
    assert "stored as" not in str([d.reason for d in classify(program, ranges, data_max=1e-3).decisions])


def test_diagnose_speaks_of_true_values(made: Any, tmp_path: Path) -> None:
    """Magnitudes of the comparison are the network's own; the plan brings the exponents, also from a file."""
    _, data, ranges, fitted = made
    plan = classify(fitted.program, fitted.ranges)
    plan.save(tmp_path / "p.json")
    plan = PrecisionPlan.load(tmp_path / "p.json")
    comparison = compare(fitted.program, insert_casts(fitted.program, plan), data, progress=False)
    true = in_true_values(comparison, plan.exponents)
    peaks = dict(ranges.frame.select("node", "absmax").iter_rows())
    for node, peak in true.frame.select("node", "absmax_reference").iter_rows():
        assert peak == pytest.approx(peaks[node.removesuffix("_rescaled")])
    text = diagnosis_text(fitted.program, plan, comparison, 6)
    assert "a rescaled program, in true values" in text
    assert f"{peaks['add']:.4g}" in text


def test_the_first_nonfinite_node_has_its_true_magnitude(made: Any) -> None:
    _, data, _, fitted = made
    plan = classify(fitted.program, fitted.ranges, nodes_to_include=[".*"])
    huge = [(x * 3e4,) for (x,) in data]
    comparison = compare(fitted.program, insert_casts(fitted.program, plan), huge, progress=False)
    assert comparison.first_nonfinite is not None
    node = comparison.first_nonfinite.node
    k = fitted.exponents.get((node, 0), 0)
    true = in_true_values(comparison, plan.exponents).first_nonfinite
    assert true is not None
    assert true.absmax_reference == comparison.first_nonfinite.absmax_reference * 2.0**k


def test_commands_on_a_rescaled_program(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`report` and `diff` of the files that `calibcast rescale` wrote: nothing has changed, and no value is scaled."""
    program, _, ranges, fitted = made
    torch.export.save(program, tmp_path / "m.pt2")
    ranges.save(tmp_path / "r.parquet")
    fitted.ranges.save(tmp_path / "f.parquet")

    def run(*arguments: Any) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        assert not ended.value.code
        return capsys.readouterr().out

    plan = classify(fitted.program, fitted.ranges)
    build(insert_casts(fitted.program, plan), plan, fitted.ranges, backend="eager").save(tmp_path / "engine")
    inspected = run("inspect", tmp_path / "engine")
    assert f"a rescaled program: {len(plan.exponents)} tensors are stored as powers of two of themselves" in inspected
    shown = run("report", tmp_path / "f.parquet", "--format", "json", "--where", "node=add")
    assert f"{ranges.frame.filter(pl.col('node') == 'add')['absmax'][0]}" in shown
    for arguments in ((), ("--program", tmp_path / "m.pt2")):
        text = run("diff", tmp_path / "r.parquet", tmp_path / "f.parquet", "--fail-on", "flip", *arguments)
        assert "0 grew, 0 shrank" in text
        assert "no decision would flip" in text
