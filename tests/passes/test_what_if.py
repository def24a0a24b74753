"""`what_if`: other settings from the same statistics. That it decides as `classify` does is a law (conftest.py)."""

import copy
import math
import pickle

import polars as pl
import pytest
import torch
from calibcast.calib import MismatchError, PlanError, RangeTable
from calibcast.passes import PrecisionPlan, Verdict, classification, classify, insert_casts, what_if
from calibcast.passes.cast_insertion import CAST
from calibcast.passes.flips import flips_of, low_at
from calibcast.passes.shares import losses
from calibcast.passes.what_if_table import SCHEMA
from torch import nn

from tests.unmeasured import calibrate


class Net(nn.Module):
    """x [4, 8] -> [4, 2]; `scaled` reaches hundreds of times the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(x))
        scaled = hidden * 300.0
        return self.last(scaled.view(-1, 16) / 300.0)


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    program = torch.export.export(Net().eval(), (torch.randn(4, 8),))
    return program, calibrate(program, [torch.randn(4, 8) for _ in range(3)], progress=False)


def test_one_row_for_each_combination_of_settings(measured):
    frame = what_if(*measured, data_max=[1.0, 512, math.inf], low_precision_type=["fp16", torch.bfloat16])
    assert frame.schema == SCHEMA
    assert frame["low_precision_type"].to_list() == ["float16"] * 3 + ["bfloat16"] * 3
    assert frame["data_max"].to_list() == [1.0, 512.0, math.inf] * 2
    assert frame["nodes_low"].is_sorted() or frame["nodes_low"][:3].is_sorted()


def test_one_value_is_a_list_of_one(measured):
    assert what_if(*measured).equals(what_if(*measured, [512], ["float16"], range_quantile=[1.0]))


def test_flips_are_told_against_the_default_plan_or_another(measured):
    program, ranges = measured
    default = classify(program, ranges)
    row = what_if(program, ranges, math.inf).row(0, named=True)
    assert row["to_low"] == list(default.high_precision_nodes)
    assert row["to_high"] == []
    assert {"mul", "view", "div"} <= set(row["to_low"])
    row = what_if(program, ranges, 512, base=classify(program, ranges, data_max=math.inf)).row(0, named=True)
    assert (row["to_low"], set(row["to_high"])) == ([], set(default.high_precision_nodes))


def test_casts_and_activation_bytes_are_those_of_the_rewritten_program(measured):
    program, ranges = measured
    row = what_if(program, ranges, 512).row(0, named=True)
    mixed = insert_casts(program, classify(program, ranges))
    casts = [node for node in mixed.graph.nodes if node.target is CAST]
    assert row["casts"] == len(casts) > 1
    assert row["bytes_cast"] == sum(c.args[0].meta["val"].untyped_storage().nbytes() for c in casts)
    linear, relu = 4 * 16 * 4, 4 * 16 * 4  # [4, 16] float32; the last linear is low too: [4, 2]
    assert row["activation_bytes_low"] == linear + relu + 4 * 2 * 4
    assert row["activation_share"] == pytest.approx(row["activation_bytes_low"] / (4 * 4 * 16 * 4 + 32))


def test_without_keeping_the_io_types_one_cast_is_saved(measured):
    program, ranges = measured
    kept, free = (what_if(program, ranges, keep_io_types=keep)["casts"][0] for keep in (True, False))
    mixed = insert_casts(program, classify(program, ranges), keep_io_types=False)
    assert free == kept - 1 == sum(node.target is CAST for node in mixed.graph.nodes)


def test_other_arguments_of_classify_hold_for_every_row(measured):
    frame = what_if(*measured, data_max=[512, math.inf], nodes_to_exclude="^relu", targets_to_include=["aten.mul"])
    for row in frame.iter_rows(named=True):
        plan = classify(*measured, data_max=row["data_max"], nodes_to_exclude="^relu", targets_to_include=["aten.mul"])
        assert row["nodes_low"] == len(plan.low_precision_nodes)
        assert plan["relu"].precision == "high"
        assert plan["mul"].precision == "low"


def test_a_rule_of_ones_own_is_asked_with_the_inputs_as_decided(measured):
    """Such a rule may keep what reads a high node high; then only the real decisions will do."""

    def wary(facts):
        return Verdict("wary", "an input is high") if any(t.precision == "high" for t in facts.inputs) else None

    for limit in (512, math.inf):
        plan = classify(*measured, data_max=limit, rules=(rule for rule in [wary]))
        frame = what_if(*measured, data_max=limit, rules=(rule for rule in [wary]))
        assert frame["nodes_low"][0] == len(plan.low_precision_nodes)
    assert classify(*measured, rules=(wary,))["linear_1"].rule == "wary"


def test_a_quantile_looks_past_rare_peaks():
    program = torch.export.export(Net().eval(), (torch.randn(4, 8),))
    batches = [torch.randn(4, 8) for _ in range(40)]
    batches[7][0, 0] = 3000.0
    ranges = calibrate(program, batches, progress=False)
    frame = what_if(program, ranges, 2048, range_quantile=[1.0, 0.98])
    assert frame["nodes_low"][0] < frame["nodes_low"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_max": [512, -1]}, "data_max=-1: give a positive number"),
        ({"data_max": []}, "nothing to ask"),
        ({"low_precision_type": "int8"}, "known are torch.float16 and torch.bfloat16"),
        ({"range_quantile": [0.5, 2.0]}, "range_quantile=2.0"),
        ({"nodes_to_exclude": ["^linaer"]}, "near names: linear"),
    ],
)
def test_bad_settings_are_refused_by_name(measured, arguments, message):
    with pytest.raises(PlanError, match=message):
        what_if(*measured, **arguments)


def test_ranges_and_base_must_be_of_the_program(measured):
    other = torch.export.export(nn.Linear(8, 3), (torch.randn(4, 8),))
    with pytest.raises(MismatchError, match="belong to another program"):
        what_if(other, measured[1])
    with pytest.raises(MismatchError, match="for another program"):
        what_if(*measured, base=classify(other, None))


def shares_of(values, low_type=torch.float16, histogram=True):
    """The bounds for one activation with these values: (overflow, at least, underflow, at least), as counts."""
    program = torch.export.export(nn.Identity(), (torch.zeros(len(values)),))
    ranges = calibrate(program, [torch.tensor(values)], progress=False, histogram=histogram)
    row = losses(ranges.frame, low_type).row(0, named=True)
    return row["overflow"], row["overflow_at_least"], row["underflow"], row["underflow_at_least"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 65536.0, 70000.0, 1e9], (3, 3, 0, 0)),  # at powers of two the counts are exact
        ([1.0, 65504.0, 40000.0], (0, 0, 0, 0)),  # the largest fp16 value itself
        ([1.0, 65519.0], (0, 0, 0, 0)),  # rounds down to 65504
        ([1.0, 65520.0, 40000.0], (2, 1, 0, 0)),  # a tie that rounds to inf, and one in its bin that does not
        ([1.0, 0.0, 2.0**-14, 2.0**-15, 1e-9], (0, 0, 2, 2)),  # zeros are no underflow
        ([float("nan"), float("inf"), 1.0], (0, 0, 0, 0)),  # counted elsewhere
    ],
)
def test_what_fp16_loses_of_a_tensor(values, expected):
    assert shares_of(values) == expected


def test_bounds_hold_against_the_cast_itself():
    torch.manual_seed(0)
    values = (torch.randn(4000) * 2.0 ** torch.randint(-30, 18, (4000,))).tolist()
    half = torch.tensor(values).half()
    most, least, tiny, tiny_least = shares_of(values)
    assert least <= int(half.isinf().sum()) <= most
    assert tiny == tiny_least == sum(0 < abs(v) < 2.0**-14 for v in values)


def test_without_a_histogram_peaks_alone_give_the_bounds():
    assert shares_of([1.0, 70000.0, 0.0], histogram=False) == (3, 1, 0, 0)
    assert shares_of([1.0, 1e-7, 0.0], histogram=False) == (0, 0, 2, 1)
    assert shares_of([1.0, 100.0], histogram=False) == (0, 0, 0, 0)


def test_bf16_overflows_only_beyond_its_own_largest_value():
    assert shares_of([1.0, 1e9, 3.4e38, 3.3e38], torch.bfloat16) == (2, 1, 0, 0)
    assert shares_of([1.0, 1e-39], torch.bfloat16) == (0, 0, 1, 1)


def test_predicted_shares_are_over_what_exists_in_the_low_type(measured):
    program, ranges = measured
    row = what_if(program, ranges, math.inf, init_max=math.inf).row(0, named=True)
    moving = losses(ranges.frame, torch.float16).filter(pl.col("kind").is_in(["input", "activation"]))
    assert row["overflow"] == row["overflow_at_least"] == 0.0
    assert row["underflow"] == pytest.approx(moving["underflow"].sum() / moving["finite"].sum())


def test_flips_survive_a_file(measured, tmp_path):
    plan = classify(*measured)
    plan.save(tmp_path / "plan.json")
    loaded = PrecisionPlan.load(tmp_path / "plan.json")
    assert loaded.flips == plan.flips
    assert set(plan.flips) == {"float16", "bfloat16"}
    assert list(plan.flips["float16"]) == [d.node for d in plan.decisions if d.precision != "kept"]
    assert 300 < plan.flips["float16"]["mul"] == plan.flips["float16"]["view"]


def test_flips_are_found_when_they_are_asked_for(measured, monkeypatch, tmp_path):
    """Half of the time of `classify` went into what only a saved plan and its page need."""
    asked = []

    def counted(facts, judge):
        asked.append(judge.low_type)
        return flips_of(facts, judge)

    monkeypatch.setattr(classification, "flips_of", counted)
    plan = classify(*measured)
    assert (asked, len(plan.flips)) == ([], 2)
    assert low_at(plan.flips["float16"], 512.0) == list(plan.low_precision_nodes)
    assert asked == [torch.float16]
    plan.save(tmp_path / "plan.json")
    plan.save(tmp_path / "again.json")
    assert asked == [torch.float16, torch.bfloat16]
    with pytest.raises(KeyError):
        plan.flips["float8"]


def test_flips_of_ones_own_rules_are_found_at_once(measured):
    """Such a rule may answer otherwise later, and a plan does not change."""
    strict = [True]

    def moody(facts):
        return Verdict("moody", "today") if strict[0] else None

    plan = classify(*measured, rules=[moody])
    strict[0] = False
    assert set(plan.flips["float16"].values()) == set(plan.flips["bfloat16"].values()) == {None}


def test_a_copied_plan_has_its_flips_and_nothing_of_the_program(measured):
    plan = classify(*measured)
    assert dict(classify(measured[0], None).flips) == {}
    copied = pickle.loads(pickle.dumps(plan))
    assert type(copied.flips) is dict
    assert copied == plan == copy.deepcopy(plan)


def test_a_table_without_histograms_can_be_asked(measured):
    program, _ = measured
    ranges: RangeTable = calibrate(program, [torch.randn(4, 8)], progress=False, histogram=False)
    assert what_if(program, ranges, [512, math.inf]).height == 2
    with pytest.raises(PlanError, match="needs histograms"):
        what_if(program, ranges, range_quantile=0.9)


def test_a_check_of_a_type_in_the_program_is_no_obstacle(export):
    """`.to(...)` exports as a check of its input's type and a conversion; the check fails in fp16."""
    program = export(lambda x: (x * 4).to(torch.int64) % 16, torch.randn(4, 8))
    assert any("_assert_tensor_metadata" in str(node.target) for node in program.graph.nodes)
    ranges = calibrate(program, [torch.randn(4, 8)], progress=False)
    assert what_if(program, ranges, data_max=[1e-3, 512])["nodes_low"].to_list() == [0, 1]


def test_its_frame_prints_as_a_table_with_modules_and_is_a_polars_frame_all_the_same(measured):
    frame = what_if(*measured, data_max=[1e-3, 512])
    text = str(frame)
    assert isinstance(frame, pl.DataFrame)
    assert max(map(len, text.splitlines())) <= 80
    assert text.splitlines()[0].split()[:3] == ["type", "limit", "quantile"]
    assert "3 nodes no longer low: linear (first), relu, linear_1 (last)" in " ".join(text.split())
    assert str(frame.clone()).splitlines()[0] == text.splitlines()[0]
    assert str(frame.select("casts")) == str(pl.DataFrame(frame).select("casts"))
