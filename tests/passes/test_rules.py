"""Every rule alone, on hand-made facts: met, not met, at the limit, and what it says."""

import math

import pytest
import torch

from passes import Hidden, Literal, NodeFacts, TensorFacts
from passes.facts import holds
from passes.rules import (
    DataMax,
    Follows,
    InitMax,
    Interior,
    Legality,
    LiteralRange,
    MaxDepthOfReduction,
    NodesToExclude,
    Nonfinite,
    Storage,
    TargetsToExclude,
    Unmeasured,
    rule_id,
    storage_sqnr,
)


def tensor(name="node", absmax=1.0, **more):
    """Facts of a tensor with values evenly spread over -absmax..absmax."""
    measured = {"min": -absmax, "max": absmax, "mean": 0.0, "rms": absmax / math.sqrt(3), "smallest": absmax / 1000}
    return TensorFacts(name, absmax=absmax, **{**measured, **more})


def weight(absmax, **more):
    return tensor("p_weight", absmax, kind="parameter", **more)


def node(*inputs, output=None, **more):
    return NodeFacts("node", inputs=inputs, outputs=(output or tensor("node"),), **more)


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (DataMax(1.0), "data_max"),
        (InitMax(1.0), "init_max"),
        (LiteralRange(), "literal"),
        (MaxDepthOfReduction(1), "max_depth_of_reduction"),
        (NodesToExclude(("x",)), "nodes_to_exclude"),
        (Storage(), "storage"),
        (Interior(), "interior"),
        (Unmeasured(), "unmeasured"),
    ],
)
def test_the_class_name_is_the_id(rule, name):
    assert rule_id(rule) == name


def test_a_functions_name_is_its_id():
    def my_own(facts):
        return None

    assert rule_id(my_own) == "my_own"


class TestDataMax:
    def test_it_is_strict(self):
        assert DataMax(512.0)(node(tensor("x", 512.0))) is None
        verdict = DataMax(512.0)(node(tensor("x", 512.5, absmax_batch=3)))
        assert (verdict.rule, verdict.evidence, verdict.limit) == ("data_max", 512.5, 512.0)
        assert "its input x reached 512.5 in batch 3" in verdict.reason

    def test_its_own_output_counts(self):
        verdict = DataMax(512.0)(node(tensor("x"), output=tensor("node", 1e6)))
        assert verdict.reason.startswith("its output reached 1e+06")

    def test_the_largest_is_named(self):
        verdict = DataMax(1.0)(node(tensor("x", 5.0), tensor("y", 50.0), tensor("z", 7.0)))
        assert verdict.evidence == 50.0
        assert "input y" in verdict.reason

    def test_nothing_finite_keeps_it_high(self):
        empty = tensor("x", 1.0, min=None, max=None, mean=None, rms=None, smallest=None)
        verdict = DataMax(512.0)(node(TensorFacts("x", absmax=None), empty))
        assert "nothing finite" in verdict.reason

    def test_infinity_switches_it_off(self):
        assert DataMax(math.inf)(node(tensor("x", 1e30), TensorFacts("y", absmax=None))) is None

    def test_weights_are_not_its_business(self):
        assert DataMax(512.0)(node(tensor("x"), weight(3000.0))) is None

    def test_an_op_that_only_moves_data_answers_for_sources_alone(self):
        large = tensor("x", 1e6)
        assert DataMax(512.0)(node(large, moves=True)).evidence == 1e6
        decided = tensor("x", 1e6, precision="low")
        assert DataMax(512.0)(node(decided, output=tensor("node", 1e6), moves=True)) is None

    def test_a_quantile_leaves_outliers_out(self):
        histogram = [0] * 256
        histogram[127 + 3] = 999  # 8 to 16
        histogram[127 + 12] = 1  # 4096 to 8192
        spiky = tensor("x", 5000.0, histogram=tuple(histogram))
        assert DataMax(512.0)(node(spiky)).evidence == 5000.0
        assert DataMax(512.0, quantile=0.999)(node(spiky)) is None
        verdict = DataMax(15.0, quantile=0.999)(node(spiky))
        assert verdict.evidence == 16.0  # the upper end of the bin: never too small
        assert "quantile 0.999" in verdict.reason

    def test_what_was_not_measured_is_left_to_unmeasured(self):
        assert DataMax(512.0)(node(TensorFacts("x", measured=False))) is None


class TestInitMax:
    def test_it_judges_weights_and_nothing_else(self):
        assert InitMax(65504.0)(node(tensor("x", 1e6), weight(65504.0))) is None
        verdict = InitMax(65504.0)(node(tensor("x"), weight(1e5)))
        assert (verdict.rule, verdict.evidence, verdict.limit) == ("init_max", 1e5, 65504.0)
        assert "its parameter p_weight" in verdict.reason

    def test_infinity_switches_it_off(self):
        assert InitMax(math.inf)(node(weight(1e9))) is None


class TestLiteral:
    @pytest.mark.parametrize(
        ("value", "low_type", "held"),
        [
            (1e-12, torch.float16, False),
            (1e-8, torch.float16, False),
            (1e-5, torch.float16, True),
            (-1e9, torch.float16, False),
            (100_000.0, torch.float16, False),
            (65504.0, torch.float16, True),
            (2049.0, torch.float16, True),
            (0.0, torch.float16, True),
            (math.inf, torch.float16, True),
            (-math.inf, torch.float16, True),
            (1e-12, torch.bfloat16, True),
            (-1e9, torch.bfloat16, True),
            (1e-45, torch.bfloat16, False),
            (3.4e38, torch.bfloat16, False),
        ],
    )
    def test_what_a_type_holds(self, value, low_type, held):
        assert holds(value, low_type) is held
        verdict = LiteralRange()(node(literals=(Literal("other", value),), low_type=low_type))
        assert (verdict is None) is held

    def test_it_says_what_the_number_becomes(self):
        small = LiteralRange()(node(literals=(Literal("other", 1e-12),)))
        assert (small.rule, small.evidence) == ("literal", 1e-12)
        assert "other=1e-12 becomes 0 in fp16" in small.reason
        large = LiteralRange()(node(literals=(Literal("value", -1e9),)))
        assert (large.evidence, large.limit) == (-1e9, 65504.0)
        assert "becomes -inf in fp16" in large.reason


class TestInterior:
    def test_a_bound_above_the_largest_finite_value_is_met(self):
        assert Interior()(node(hidden=(Hidden("sum", 65504.0),))) is None
        verdict = Interior()(node(hidden=(Hidden("sum", 65505.0),)))
        assert (verdict.rule, verdict.evidence, verdict.limit) == ("interior", 65505.0, 65504.0)
        assert Interior()(node(hidden=(Hidden("sum", 65505.0),), low_type=torch.bfloat16)) is None

    def test_an_unknown_bound_is_not_safe(self):
        assert Interior()(node(hidden=(Hidden("sum", math.nan),))) is not None

    def test_an_epsilon_that_vanishes_is_met(self):
        assert "eps 1e-12 is lost in fp16" in Interior()(node(epsilon=1e-12)).reason
        assert Interior()(node(epsilon=1e-5)) is None
        assert Interior()(node(epsilon=1e-12, low_type=torch.bfloat16)) is None

    def test_it_needs_ranges(self):
        assert Interior()(node(hidden=(Hidden("sum", 1e9),), has_ranges=False)) is None


def spread(low, high, histogram=True):
    """Facts of 1001 values evenly spread from low to high, as calibration would measure them."""
    values = torch.linspace(low, high, 1001, dtype=torch.float64)
    bits = values.float().view(torch.int32)
    bins = torch.bincount((bits & 0x7FFFFFFF) >> 23, minlength=256)
    return TensorFacts(
        "x",
        min=float(values.min()),
        max=float(values.max()),
        absmax=float(values.abs().max()),
        smallest=float(values.abs()[values != 0].min()),
        mean=float(values.mean()),
        rms=float(values.square().mean().sqrt()),
        histogram=tuple(bins.tolist()) if histogram else None,
    )


def real_sqnr(low, high, low_type):
    values = torch.linspace(low, high, 1001, dtype=torch.float64).float().double()
    noise = values.to(low_type).double() - values
    return float(10 * torch.log10(values.var(correction=0) / noise.square().mean()))


class TestStorage:
    @pytest.mark.parametrize("histogram", [True, False])
    @pytest.mark.parametrize(
        ("low", "high", "kept"),
        [(400.05, 400.10, True), (1e-9, 3e-8, True), (-1e-7, 1e-7, True), (0.0, 255.0, False), (-3.0, 3.0, False)],
    )
    def test_offsets_and_faint_signals_stay(self, low, high, kept, histogram):
        verdict = Storage()(node(spread(low, high, histogram)))
        assert (verdict is not None) is kept
        if kept:
            assert (verdict.rule, verdict.limit) == ("storage", 20.0)
            assert verdict.evidence < 20.0

    @pytest.mark.parametrize(("low", "high"), [(-3.0, 3.0), (0.0, 255.0), (10.0, 12.0), (1e-6, 1e-5)])
    @pytest.mark.parametrize("low_type", [torch.float16, torch.bfloat16])
    def test_the_prediction_is_near_what_rounding_does(self, low, high, low_type):
        assert storage_sqnr(spread(low, high), low_type) == pytest.approx(real_sqnr(low, high, low_type), abs=3.0)

    def test_weights_and_constant_tensors_are_exempt(self):
        faint = spread(1e-9, 3e-8)
        as_weight = TensorFacts("p", "parameter", True, *(getattr(faint, f) for f in ("min", "max", "absmax")))
        assert Storage()(node(as_weight)) is None
        same = tensor("x", 400.05, min=400.05, max=400.05, mean=400.05, rms=400.05)
        assert Storage()(node(same)) is None

    def test_what_overflows_keeps_nothing(self):
        verdict = Storage()(node(tensor("x", 1e5)))
        assert verdict.evidence == -math.inf
        assert Storage()(node(tensor("x", 1e5), low_type=torch.bfloat16)) is None


class TestTheOthers:
    def test_max_depth_of_reduction_is_strict(self):
        assert MaxDepthOfReduction(64)(node(depth=64)) is None
        assert MaxDepthOfReduction(64)(node(depth=None)) is None
        verdict = MaxDepthOfReduction(64)(node(depth=65))
        assert (verdict.evidence, verdict.limit) == (65.0, 64.0)

    def test_nonfinite_names_count_and_batch(self):
        assert Nonfinite()(node(tensor("x"))) is None
        verdict = Nonfinite()(node(tensor("x", nonfinite=7, nonfinite_batch=2)))
        assert (verdict.rule, verdict.evidence) == ("nonfinite", 7.0)
        assert "7 NaN or Inf in fp32, first in batch 2" in verdict.reason

    def test_unmeasured_applies_only_where_there_are_ranges(self):
        unknown = TensorFacts("x", measured=False)
        assert "has not measured x" in Unmeasured()(node(unknown)).reason
        assert Unmeasured()(node(unknown, has_ranges=False)) is None
        assert Unmeasured()(node(tensor("x"))) is None

    @pytest.mark.parametrize("base", ["linalg_inv", "fft_rfft", "quantile", "ctc_loss", "cdist"])
    def test_what_no_target_has_in_half_is_illegal(self, base):
        assert Legality()(node(base=base, op=f"aten.{base}.default")).rule == "legality"

    @pytest.mark.parametrize("base", ["linear", "linalg_vector_norm", "softmax"])
    def test_ordinary_operators_are_legal(self, base):
        assert Legality()(node(base=base)) is None

    def test_a_custom_op_is_illegal_until_included(self):
        assert Legality()(node(op="mine.op.default", custom=True)).rule == "legality"
        assert Legality(allow_custom=True)(node(op="mine.op.default", custom=True)) is None

    def test_nodes_are_excluded_by_name_and_by_module(self):
        facts = NodeFacts("conv2d_1", module="encoder.block.conv")
        assert NodesToExclude(("^conv2d$",))(facts) is None
        assert NodesToExclude(("^conv2d_1$",))(facts).rule == "nodes_to_exclude"
        assert NodesToExclude((r"encoder\.",))(facts) is not None
        assert NodesToExclude(("block",))(facts) is None  # re.match: from the beginning

    def test_targets_are_excluded_with_or_without_overload(self):
        facts = NodeFacts("add", op="aten.add.Tensor")
        assert TargetsToExclude(frozenset({"aten.add.Tensor"}))(facts) is not None
        assert TargetsToExclude(frozenset({"aten.add"}))(facts) is not None
        assert TargetsToExclude(frozenset({"aten.add.Scalar"}))(facts) is None

    def test_an_op_that_moves_data_follows_its_inputs(self):
        low, high = tensor("a", precision="low"), tensor("b", precision="high")
        assert Follows()(node(low, moves=True)) is None
        assert "its input b is high" in Follows()(node(low, high, moves=True)).reason
        assert Follows()(node(high)) is None
