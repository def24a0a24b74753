"""Evidence of rounding of a rescaled program: carried over, estimated, and good enough to plan and tune by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib.calibration import calibrate
from calibcast.calib.range_schema import Rescaled
from calibcast.calib.ranges import RangeTable
from calibcast.calib.rounding_scaling import NumberScale, Spread, scaled_rounding
from calibcast.calib.rounding_table import ROUNDING_KEY
from calibcast.passes.classification import classify
from calibcast.passes.rescaling.rescaling import rescale
from calibcast.passes.rescaling.result import Rescaling
from calibcast.passes.rescaling.rewriting import rewritten
from calibcast.passes.tuning import tune
from torch.export import ExportedProgram

from benchmarks.rescaling_laws import random_exponents
from benchmarks.rescaling_networks import CASES
from tests.passes.rescaling_models import growing, rising

NETWORKS: dict[str, Callable[[], tuple[ExportedProgram, list[Any]]]] = {"growing": growing, "rising": rising}


def fitted_to(name: str) -> tuple[ExportedProgram, list[Any], RangeTable, Rescaling]:
    program, data = NETWORKS[name]()
    ranges = calibrate(program, data, rounding_batches=2, progress=False)
    fitted = rescale(program, ranges)
    assert fitted.changed
    return program, data, ranges, fitted


def test_evidence_that_is_carried_over_is_a_new_calibrations() -> None:
    """Noise is the same at any power of two where the low type holds all values in full, before and after."""
    program, data = growing(gain=3e2)
    ranges = calibrate(program, data, rounding_batches=2, progress=False)
    exponents = random_exponents(program, ranges, 5)
    made = rewritten(program, exponents)
    scaled = ranges.scaled(exponents.tensors, made).rounding
    again = calibrate(made, data, rounding_batches=2, progress=False).rounding
    assert scaled.select(ROUNDING_KEY).equals(again.select(ROUNDING_KEY))
    known = scaled["method"] == "gradient"
    assert known.sum() > len(scaled) / 2
    for name in ("noise", "noise_worst", "local_sqnr_db"):
        mine, theirs = scaled.filter(known)[name].to_list(), again.filter(known)[name].to_list()
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_estimates_are_near_a_new_calibration(name: str) -> None:
    """Of edges that overflowed, or fell below the normal numbers: no gaps, the sum within a tenth, and each of those
    that matter within 3 dB. A tensor of four elements rounds by luck."""
    _, data, ranges, fitted = fitted_to(name)
    overflowed = ranges.rounding.filter(pl.col("noise").is_infinite())
    assert overflowed.height
    again = calibrate(fitted.program, data, rounding_batches=2, progress=False).rounding
    mine = fitted.ranges.rounding
    assert mine.select(ROUNDING_KEY).equals(again.select(ROUNDING_KEY))
    assert not mine["noise"].null_count()
    both = mine.join(again, on=ROUNDING_KEY, suffix="_new").filter(pl.col("low_precision_type") == "float16")
    assert (both["method"] == "scaled").sum() >= 6
    assert 0.9 < both["noise"].sum() / both["noise_new"].sum() < 1.1
    loud = both.filter(pl.col("noise_new") > 0.02 * both["noise_new"].sum())
    assert loud.select((pl.col("noise") / pl.col("noise_new")).is_between(0.5, 2.0).all()).item()


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_rescaled_program_is_planned_and_tuned_as_any_other(name: str) -> None:
    """The budget decides on it without data; `tune` proves it, and keeps less in fp32 than of the original."""
    program, data, ranges, fitted = fitted_to(name)
    plan = classify(fitted.program, fitted.ranges)
    assert plan.rounding is not None
    assert len(plan.high_precision_nodes) < len(classify(program, ranges).high_precision_nodes)
    tuned = tune(fitted.program, fitted.ranges, data)
    assert tuned.proof is not None
    assert tuned.proof.sqnr_db > 50.0
    assert abs(plan.rounding.predicted_sqnr_db - tuned.proof.sqnr_db) < 12.0
    assert len(tuned.high_precision_nodes) <= len(plan.high_precision_nodes)


def test_a_growing_sum_is_multiplied_on_its_way_into_the_sum_alone() -> None:
    """The norm reads what the sum began as, as it is; the table is a new calibration's, and is turned back."""
    program, data, ranges, fitted = fitted_to("rising")
    (node,) = fitted.rewrite.multiplied
    assert node == "linear"
    users = {n.name: [u.name for u in n.users] for n in fitted.program.graph.nodes}
    assert users["linear_rescaled"] == ["add"]
    assert "layer_norm" in users["linear"]
    assert torch.equal(fitted.program.module()(*data[0]), program.module()(*data[0]))
    again = calibrate(fitted.program, data, rounding_batches=0, progress=False)
    assert fitted.ranges.frame.equals(again.frame)
    assert fitted.ranges.true_values() == replace(ranges, rounding=ranges.rounding.clear())
    back = rewritten(fitted.program, fitted.rewrite.negated())
    assert all(torch.equal(back.state_dict[name], value) for name, value in program.state_dict.items())
    assert torch.equal(back.module()(*data[0]), program.module()(*data[0]))


def rows(**cells: Any) -> pl.DataFrame:
    """Evidence of one edge, `linear` of `x`, in both types; the same but for `cells`, a pair each."""
    from calibcast.calib.rounding_table import ROUNDING_SCHEMA

    same = {
        "node": "linear", "input": "x", "output": 0, "noise_by_output": None, "nonfinite": 0, "steps": 0,
        "worst_batch": 0, "local_sqnr_db": 60.0, "batches": 1, "method": "gradient", "why_missing": None,
    }  # fmt: skip
    pairs = {"low_precision_type": ("float16", "bfloat16"), **cells}
    made = [{**same, **{name: pair[i] for name, pair in pairs.items()}} for i in range(2)]
    return pl.DataFrame([{"noise_worst": row["noise"], **row} for row in made], schema=ROUNDING_SCHEMA)


def estimated(rounding: pl.DataFrame, k: int, magnitudes: dict[int, int], op: str = "aten.linear.default") -> Any:
    """The float16 row of an edge whose tensor has so many elements of each power of two, stored as 2^-k of itself."""
    program, data = growing()
    table = calibrate(program, data[:1], rounding_batches=0, progress=False)
    bins = [magnitudes.get(e - 127, 0) for e in range(256)]
    most, least = 2.0 ** max(magnitudes), 2.0 ** min(magnitudes)
    frame = table.frame[:2].with_columns(
        node=pl.Series(["x", "linear"]), op=pl.Series(["input", op]), absmax=most, smallest=least,
        histogram=pl.Series([bins, bins]),
    )  # fmt: skip
    record = Rescaled({"x:0": k}, {})
    found = scaled_rounding(replace(table, frame=frame, rounding=rounding), record, {}, [("linear", "x", 0)])
    return found.row(0, named=True)


def test_where_float16_overflowed_bfloat16_says_a_64th() -> None:
    """Its rounding is 8 times as coarse. Where the program had to be run, an 8th, as steps go with their number."""
    evidence = rows(noise=(float("inf"), 64e-6), nonfinite=(3, 0))
    found = estimated(evidence, 10, {18: 5, 10: 5})
    assert found["noise"] == pytest.approx(1e-6)
    assert found["method"] == "scaled"
    ran = rows(noise=(float("inf"), 64e-6), nonfinite=(3, 0), method=("run", "run"))
    assert estimated(ran, 10, {18: 5, 10: 5})["noise"] == pytest.approx(8e-6)
    assert estimated(rows(noise=(float("inf"),) * 2, nonfinite=(3, 3)), 10, {18: 5})["noise"] is None
    assert "overflows" in estimated(evidence, 1, {18: 5})["why_missing"]


def test_what_falls_below_the_normal_numbers_is_louder() -> None:
    """Stored 2^-6 of itself, 2^-12 is 2^-18: its step is 2^-24 in place of 2^-28. At a pole the smallest counts."""
    evidence = rows(noise=(1e-6, 64e-6))
    assert estimated(evidence, 6, {-12: 1})["noise"] == pytest.approx(256e-6, rel=1e-3)
    assert estimated(evidence, 6, {-12: 1, 3: 99})["noise"] == pytest.approx(1e-6, rel=1e-3)
    assert estimated(evidence, 6, {-12: 1, 3: 99}, "aten.log.default")["noise"] == pytest.approx(256e-6, rel=1e-3)
    assert estimated(evidence, 20, {-12: 1, 3: 99}, "aten.log.default")["noise"] is None
    assert estimated(evidence, -6, {-12: 1, 3: 99})["noise"] == pytest.approx(1e-6, rel=1e-3)
    assert not Spread(1.0, 2.0**-12, None).whole(6)


def test_a_weight_that_overflows_in_the_original_blames_no_other() -> None:
    """A running variance of 10^8 overflows; a scale of 1 beside it has no noise, before and after."""
    case = CASES["convolutions, batch norm"]
    program, data = case.program(), [case.batch(i) for i in range(2)]
    ranges = calibrate(program, data, rounding_batches=1, progress=False)
    fitted = rescale(program, ranges)
    for table in (ranges, fitted.ranges):
        found = table.rounding.filter(pl.col("input") == "p_a_weight")
        assert found["noise"].to_list() == [0.0, 0.0]
    assert not classify(fitted.program, fitted.ranges).high_precision_nodes


def test_estimates_stay_estimates_when_tables_merge() -> None:
    """A row of which a part was estimated says so, whichever table comes first; a measured row stays measured."""
    _, data, _, fitted = fitted_to("rising")
    again = calibrate(fitted.program, data[:1], rounding_batches=1, progress=False)
    for tables in ([fitted.ranges, again], [again, fitted.ranges]):
        merged = RangeTable.merge(tables).rounding
        methods = zip(fitted.ranges.rounding["method"], merged["method"], strict=True)
        assert all((before == "scaled") == (after == "scaled") for before, after in methods)
    assert "scaled" in set(fitted.ranges.rounding["method"])


def test_a_number_is_as_loud_as_its_own_rounding() -> None:
    """1e-6 in float16 is 17 steps of 2^-24, 1.3% off; times 2^14 it is 0.01% off. 0.5 is exact until it vanishes."""
    evidence = rows(noise=(1e-4, 1e-5), input=("literal:other", "literal:other"))
    program, data = growing()
    table = replace(calibrate(program, data[:1], rounding_batches=0, progress=False), rounding=evidence)

    def noise(value: float, k: int) -> Any:
        numbers = {("linear", "other"): NumberScale(value, k)}
        edges = [("linear", "literal:other", 0)]
        return scaled_rounding(table, Rescaled({}, {}), numbers, edges)["noise"][0]

    share = [float((torch.tensor(1e-6 * s).half().double() - 1e-6 * s) / (1e-6 * s)) for s in (1.0, 2.0**14)]
    assert noise(1e-6, -14) == pytest.approx(1e-4 * (share[1] / share[0]) ** 2, rel=1e-2)
    assert noise(0.5, 3) == 0.0
    assert noise(0.5, 40) is None
