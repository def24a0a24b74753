"""Each rule alone, called with a hand-made `NodeFacts`: met, not met, and exactly at its limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from calibcast.calib import calibrate as measure
from calibcast.passes import Hidden, Literal, Lost, NodeFacts, TensorFacts, classify
from calibcast.passes.number_formats import BFLOAT16, FLOAT16, format_of
from calibcast.passes.rules import (
    Follows,
    Interior,
    Legality,
    LiteralRange,
    Mask,
    MaxDepthOfReduction,
    NodesToExclude,
    TargetsToExclude,
    Unmeasured,
    holds,
    rule_id,
)
from calibcast.passes.tensor_rules import DataMax, InitMax, Nonfinite, Storage, keeps_surely, storage_sqnr
from hypothesis import given, seed, settings
from hypothesis import strategies as st

# The rules as they stand without evidence from rounding: tests of plans that have it are in test_rounding_plan.py.
calibrate = partial(measure, rounding_batches=0)

HALF, BRAIN = torch.float16, torch.bfloat16
SPREAD = torch.linspace(1, 400, 64)


def tensor(absmax: float | None = 1.0, name: str = "x", kind: str = "activation", **facts: object) -> TensorFacts:
    """A measured tensor with values from -absmax to absmax."""
    low = None if absmax is None else -absmax
    return TensorFacts(**{"name": name, "kind": kind, "min": low, "max": absmax, "absmax": absmax, **facts})


def node(*inputs: TensorFacts, output: TensorFacts | None = None, **facts: object) -> NodeFacts:
    """A node `n` with these inputs and one output."""
    return NodeFacts(**{"name": "n", "inputs": inputs, "outputs": (output or tensor(name="n"),), **facts})


def measured(values: torch.Tensor, histogram: bool = True, **facts: object) -> TensorFacts:
    """What calibration would say of `values`."""
    wide = values.double()
    exponents = torch.frexp(values[values != 0]).exponent + 126
    bins = torch.bincount(exponents.long().clamp(0, 254), minlength=256)
    bins[0] += int((values == 0).sum())
    return tensor(
        float(wide.abs().max()),
        min=float(wide.min()),
        max=float(wide.max()),
        smallest=float(wide[wide != 0].abs().min()) if wide.any() else None,
        mean=float(wide.mean()),
        rms=float(wide.square().mean().sqrt()),
        histogram=tuple(bins.tolist()) if histogram else None,
        **facts,
    )


class TestDataMax:
    def test_above_the_limit_keeps_the_node_high(self) -> None:
        """An input beyond the limit is met, with the number that was seen and the limit it was held to."""
        verdict = DataMax(512.0)(node(tensor(512.5, absmax_batch=3)))
        assert (verdict.rule, verdict.evidence, verdict.limit) == ("data_max", 512.5, 512.0)
        assert verdict.reason == "its input x reached 512.5 in batch 3, above data_max 512"

    def test_the_limit_itself_is_allowed(self) -> None:
        """The comparison is strict: exactly 512 is no reason, the next fp32 number is."""
        assert DataMax(512.0)(node(tensor(512.0))) is None
        above = float(torch.nextafter(torch.tensor(512.0), torch.tensor(math.inf)))
        assert DataMax(512.0)(node(tensor(above))) is not None

    def test_the_output_counts(self) -> None:
        """A node answers for its own output, and the largest of several is named."""
        verdict = DataMax(512.0)(node(tensor(600.0), output=tensor(900.0, name="n")))
        assert verdict.evidence == 900.0
        assert verdict.reason.startswith("its output reached 900")

    def test_nothing_finite_is_high(self) -> None:
        """A tensor of which nothing finite was seen has no largest magnitude, and NaN keeps the node high."""
        verdict = DataMax(512.0)(node(tensor(None)))
        assert math.isnan(verdict.evidence)
        assert "nothing finite" in verdict.reason

    def test_nan_as_evidence_is_high(self) -> None:
        """NaN compares as false with everything, and yet the rule is met."""
        assert DataMax(512.0)(node(tensor(math.nan))) is not None

    def test_a_number_is_told_before_nan(self) -> None:
        """Of a tensor without a number and one above the limit, the latter is the evidence."""
        verdict = DataMax(512.0)(node(tensor(None, name="a"), tensor(700.0, name="b")))
        assert verdict.evidence == 700.0

    @pytest.mark.parametrize("absmax", [1e30, None])
    def test_infinity_switches_it_off(self, absmax: float | None) -> None:
        """With inf as the limit not even NaN is a reason."""
        assert DataMax(math.inf)(node(tensor(absmax))) is None

    @pytest.mark.parametrize("kind", ["parameter", "buffer", "constant"])
    def test_weights_are_not_its_business(self, kind: str) -> None:
        """A running variance of 3000 is no overflow: weights are judged by init_max."""
        assert DataMax(512.0)(node(tensor(3000.0, kind=kind))) is None

    def test_graph_inputs_are(self) -> None:
        """The user's own inputs are activations to this rule."""
        assert DataMax(512.0)(node(tensor(3000.0, kind="input"))) is not None

    def test_unmeasured_tensors_are_left_to_unmeasured(self) -> None:
        """Nothing is concluded from numbers that were never measured."""
        assert DataMax(512.0)(node(tensor(9e9, measured=False))) is None

    def test_quantile_leaves_the_peak_out(self) -> None:
        """999 values below 2 and one of 900: the share 0.99 stays within 2, which is the end of its bin."""
        histogram = [0] * 256
        histogram[127], histogram[136] = 999, 1  # [1, 2) and [512, 1024)
        facts = node(tensor(900.0, histogram=tuple(histogram)))
        assert DataMax(512.0, 1.0)(facts) is not None
        assert DataMax(512.0, 0.99)(facts) is None
        assert DataMax(1.9, 0.99)(facts).evidence == 2.0
        assert "(quantile 0.99)" in DataMax(1.9, 0.99)(facts).reason

    def test_quantile_never_exceeds_the_peak(self) -> None:
        """The end of a bin is cut off at the largest magnitude that was seen."""
        histogram = [0] * 256
        histogram[136] = 10
        assert tensor(600.0, histogram=tuple(histogram)).magnitude(0.5) == 600.0

    def test_quantile_without_histogram_is_the_peak(self) -> None:
        """Without a histogram nothing is known below the peak."""
        assert tensor(600.0).magnitude(0.5) == 600.0

    @given(seen=st.floats(0, 1e30), limits=st.tuples(st.floats(1e-3, 1e30), st.floats(1e-3, 1e30)))
    @seed(0)
    def test_raising_the_limit_only_frees(self, seen: float, limits: tuple[float, float]) -> None:
        """What is allowed under a limit is allowed under a higher one."""
        facts = node(tensor(seen))
        if DataMax(min(limits))(facts) is None:
            assert DataMax(max(limits))(facts) is None


class TestInitMax:
    @pytest.mark.parametrize("kind", ["parameter", "buffer", "constant"])
    def test_weights_above_the_limit(self, kind: str) -> None:
        """A weight is judged by init_max; batches have no part in it."""
        verdict = InitMax(65504.0)(node(tensor(70000.0, kind=kind, absmax_batch=0)))
        assert (verdict.rule, verdict.evidence, verdict.limit) == ("init_max", 70000.0, 65504.0)
        assert verdict.reason == f"its {kind} x reached 7e+04, above init_max 65504"

    def test_the_limit_itself_is_allowed(self) -> None:
        """Exactly the largest finite half is allowed."""
        assert InitMax(65504.0)(node(tensor(65504.0, kind="parameter"))) is None

    def test_activations_are_not_its_business(self) -> None:
        """Inputs and activations are judged by data_max."""
        assert InitMax(1.0)(node(tensor(9.0), tensor(9.0, kind="input"))) is None

    def test_nan_is_high_and_infinity_switches_off(self) -> None:
        """A weight without a finite value keeps its readers high, unless the rule is off."""
        facts = node(tensor(None, kind="parameter"))
        assert InitMax(1.0)(facts) is not None
        assert InitMax(math.inf)(facts) is None


class TestMovement:
    def test_a_decided_input_is_not_judged_again(self) -> None:
        """A view of what a decided node made has no range rule."""
        facts = node(tensor(9e9, precision="low"), output=tensor(9e9, name="n"), moves=True)
        assert DataMax(512.0)(facts) is None

    def test_a_source_is_judged(self) -> None:
        """A view of an input, or of what a kept node made, answers for it: nobody else does."""
        facts = node(tensor(9e9, kind="input", precision=None), moves=True)
        assert DataMax(512.0)(facts).evidence == 9e9
        weights = node(tensor(9e9, kind="parameter", precision=None), moves=True)
        assert InitMax(512.0)(weights).evidence == 9e9

    def test_storage_judges_sources_only(self) -> None:
        """An offset that the producer answers for is not held against its view."""
        offset = measured(torch.tensor([400.05, 400.10]))
        assert Storage()(node(replace(offset, precision="high"), moves=True)) is None
        assert Storage()(node(offset, moves=True)) is not None

    def test_it_follows_its_inputs(self) -> None:
        """High if any input is (cat), low if all are."""
        high, low = tensor(name="h", precision="high"), tensor(name="l", precision="low")
        verdict = Follows()(node(low, high, moves=True))
        assert verdict.rule == "follows"
        assert "its input h is high" in verdict.reason
        assert Follows()(node(low, low, moves=True)) is None

    def test_kept_and_given_inputs_bind_nothing(self) -> None:
        """An input without a decision leaves the choice open."""
        assert Follows()(node(tensor(kind="input"), moves=True)) is None

    def test_others_do_not_follow(self) -> None:
        """An op that computes is decided by its own evidence."""
        assert Follows()(node(tensor(precision="high"))) is None


class TestLiteralRange:
    @pytest.mark.parametrize(
        ("value", "low_type", "limit"),
        [
            (1e-12, HALF, 2.0**-24),
            (-1e9, HALF, 65504.0),
            (100000.0, HALF, 65504.0),
            (70000.0, HALF, 65504.0),
            (65520.0, HALF, 65504.0),
            (1e39, BRAIN, torch.finfo(BRAIN).max),
            (1e-45, BRAIN, 2.0**-133),
        ],
    )
    def test_what_the_low_type_does_not_hold(self, value: float, low_type: torch.dtype, limit: float) -> None:
        """The literal is the evidence; the limit is the largest or the least value of the low type."""
        verdict = LiteralRange()(node(literals=(Literal("other", value),), low_type=low_type))
        assert (verdict.rule, verdict.evidence, verdict.limit) == ("literal", value, limit)

    @pytest.mark.parametrize(
        ("value", "low_type"),
        [
            (1e-5, HALF),
            (0.0, HALF),
            (-0.0, HALF),
            (0.1, HALF),
            (65504.0, HALF),
            (65519.0, HALF),
            (-math.inf, HALF),
            (math.nan, HALF),
            (1e-12, BRAIN),
            (-1e9, BRAIN),
            (100000.0, BRAIN),
            (1e-5, BRAIN),
        ],
    )
    def test_what_the_low_type_holds(self, value: float, low_type: torch.dtype) -> None:
        """Rounding is allowed, zero is, and what is not finite in fp32 either: other rules see to that."""
        assert LiteralRange()(node(literals=(Literal("other", value),), low_type=low_type)) is None

    def test_each_literal_counts(self) -> None:
        """The one that is not held is named, as the sentence says what becomes of it."""
        literals = (Literal("min", 0.0), Literal("max", 100000.0))
        verdict = LiteralRange()(node(literals=literals))
        assert verdict.reason == "its literal max=100000 becomes inf in fp16"
        assert "becomes 0 in fp16" in LiteralRange()(node(literals=(Literal("other", 1e-12),))).reason

    def test_it_needs_no_ranges(self) -> None:
        """Literals stand in the graph."""
        assert LiteralRange()(node(literals=(Literal("other", 1e9),), has_ranges=False)) is not None

    @given(value=st.floats(allow_nan=False, allow_infinity=False), low_type=st.sampled_from([HALF, BRAIN]))
    @seed(0)
    def test_held_means_within_one_percent(self, value: float, low_type: torch.dtype) -> None:
        """`holds` says what rounding to the low type, done by torch, says."""
        stored = torch.tensor(value, dtype=torch.float64).to(low_type).double().item()
        within = math.isfinite(stored) and abs(stored - value) <= 0.01 * abs(value)
        assert holds(value, low_type) == within


class TestStorage:
    @pytest.mark.parametrize("histogram", [True, False])
    def test_an_offset_is_caught(self, histogram: bool) -> None:
        """400.05 and 400.10 become the same half."""
        verdict = Storage()(node(measured(torch.tensor([400.05, 400.10] * 8), histogram)))
        assert (verdict.rule, verdict.limit) == ("storage", 20.0)
        assert verdict.evidence < 0

    @pytest.mark.parametrize("histogram", [True, False])
    def test_a_faint_signal_is_caught(self, histogram: bool) -> None:
        """Values of 2e-8 are below half of the least half-precision value, and vanish."""
        values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 2e-8
        assert Storage()(node(measured(values, histogram))) is not None

    def test_faint_signals_must_keep_more(self) -> None:
        """Subnormal values do not round relative to themselves: 1e-6 keeps 35 dB, too little; 1e-5 keeps 55."""
        values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
        verdict = Storage()(node(measured(values * 1e-6)))
        assert (verdict.evidence, verdict.limit) == (pytest.approx(35, abs=1), 40.0)
        assert Storage()(node(measured(values * 1e-5))) is None
        assert Storage()(node(measured(values * 1e-6), low_type=BRAIN)) is None

    def test_small_values_that_are_magnified(self) -> None:
        """A divisor of 1e-6 among ones is lost in fp16; where nothing divides by it, nobody cares."""
        values = torch.ones(4096)
        values[0] = 1e-6
        divisor = replace(measured(values), magnified=True)
        verdict = Storage()(node(divisor))
        assert (verdict.rule, verdict.evidence) == ("storage", pytest.approx(1e-6))
        assert "a division or a logarithm blows them up" in verdict.reason
        assert Storage()(node(measured(values))) is None

    @pytest.mark.parametrize("low_type", [HALF, BRAIN])
    @given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=2, max_size=9), st.floats(1e-7, 1.0))
    @settings(max_examples=150, deadline=None)
    @seed(0)
    def test_a_histogram_is_left_alone_only_where_it_would_say_the_same(
        self, low_type: torch.dtype, values: list[float], scale: float
    ) -> None:
        """The bound that passes a tensor unseen: no such tensor is below the limit by its histogram."""
        facts = measured(torch.tensor(values) * scale)
        for limit in (20.0, 40.0):
            decibels = storage_sqnr(facts, format_of(low_type))
            assert not keeps_surely(facts, format_of(low_type), limit) or decibels is None or decibels >= limit

    @pytest.mark.parametrize("histogram", [True, False])
    def test_images_are_fine(self, histogram: bool) -> None:
        """Pixels from 0 to 255 are far above the rounding."""
        values = torch.arange(256.0).repeat(4)
        assert Storage()(node(measured(values, histogram))) is None

    def test_constant_tensors_are_exempt(self) -> None:
        """A tensor of one value carries no signal to lose."""
        assert Storage()(node(measured(torch.full((8,), 400.05)))) is None
        assert Storage()(node(measured(torch.zeros(8)))) is None

    @pytest.mark.parametrize("kind", ["parameter", "buffer", "constant"])
    def test_weights_are_exempt(self, kind: str) -> None:
        """Weights have `init_max`, and vanishing ones are named in the plan."""
        assert Storage()(node(measured(torch.tensor([400.05, 400.10]), kind=kind))) is None

    def test_exactly_at_the_limit(self) -> None:
        """The limit itself is enough signal."""
        facts = measured(torch.tensor([1.0, 2.0, 3.0]))
        seen = storage_sqnr(facts, FLOAT16)
        assert Storage(limit=seen)(node(facts)) is None
        assert Storage(limit=math.nextafter(seen, math.inf))(node(facts)).evidence == seen

    def test_overflow_leaves_nothing(self) -> None:
        """A value that becomes inf in the low type leaves no signal."""
        facts = measured(torch.tensor([1.0, 70000.0]))
        assert storage_sqnr(facts, FLOAT16) == -math.inf
        assert storage_sqnr(facts, BFLOAT16) > 20

    def test_bf16_rounds_coarser(self) -> None:
        """An offset of 10 with a spread of 0.1 survives fp16, and not bf16."""
        values = 10 + 0.1 * torch.randn(4096, generator=torch.Generator().manual_seed(0))
        assert Storage()(node(measured(values), low_type=HALF)) is None
        assert Storage()(node(measured(values), low_type=BRAIN)) is not None

    @settings(max_examples=60, deadline=None)
    @given(offset=st.floats(-1000, 1000), spread=st.floats(-3, 3), low_type=st.sampled_from([HALF, BRAIN]))
    @seed(0)
    def test_the_prediction_is_what_rounding_does(self, offset: float, spread: float, low_type: torch.dtype) -> None:
        """Predicted and real SQNR of rounding a Gaussian agree within 3 dB, where there is an SQNR to speak of."""
        values = offset + 10.0**spread * torch.randn(20000, generator=torch.Generator().manual_seed(1))
        noise = (values.to(low_type).double() - values.double()).square().mean()
        real = 10 * math.log10(float(values.double().var(correction=0) / noise))
        predicted = storage_sqnr(measured(values), format_of(low_type))
        assert abs(predicted - real) < 3 or max(predicted, real) < 10


class TestCancellation:
    def test_what_rounding_leaves_of_a_result_is_held_to_the_budget_of_the_type(self) -> None:
        """Of the node itself, and of what is made of it; a limit of -inf switches the rule off."""
        lost = Lost("sub", 7.0, 40.0)
        verdict = Storage()(node(tensor(400.0), name="sub", lost=lost))
        assert (verdict.rule, verdict.evidence, verdict.limit) == ("storage", 7.0, 40.0)
        assert "its result would keep 7 dB over the rounding of what it is made of in fp16" in verdict.reason
        assert "sub, which is made of it," in Storage()(node(tensor(400.0), lost=lost)).reason
        assert Storage(-math.inf, -math.inf)(node(tensor(400.0), lost=lost)) is None

    @pytest.mark.parametrize(
        ("function", "operands", "expected"),
        [
            (lambda a, b: a - b, (SPREAD, SPREAD + 0.1), {"sub"}),
            (
                lambda a, b: (b * 1.5).view(8, 8) + a.relu().neg().view(8, 8) * 1.5,
                (SPREAD, SPREAD + 0.1),
                {"mul", "view", "relu", "neg", "view_1", "mul_1", "add"},
            ),
            (lambda a, b: a - b, (SPREAD, 0.9 * SPREAD), set()),  # a tenth is enough
            (lambda a, b: a - b, (SPREAD, SPREAD), set()),  # nothing is left, in any type
            (lambda a, b: a - b, (torch.ones(64), torch.ones(64) + 3e-4), {"sub"}),
            (lambda a, b: a - b, (torch.ones(64), torch.ones(64) + 2**-10), set()),  # the type holds both
            (lambda a, b: a - 400.0, (SPREAD, SPREAD), set()),  # a number is not rounded with a tensor
        ],
    )
    def test_what_is_found_in_a_graph(
        self, export: Any, function: Any, operands: tuple[torch.Tensor, ...], expected: set[str]
    ) -> None:
        program = export(function, *operands)
        ranges = calibrate(program, [operands], progress=False)
        plan = classify(program, ranges, data_max=math.inf)
        found = {d.node for d in plan.decisions if any(v.rule == "storage" for v in d.verdicts)}
        assert found == expected


class TestMask:
    def test_arithmetic_with_finite_mask_values(self) -> None:
        """Adding a mask of -1e9 stays in fp32, where a fully masked row loses its scores; one of -inf does no harm."""
        masked = tensor(0.0, name="mask", masked=4, mask_min=-1e9)
        verdict = Mask()(node(tensor(), masked, base="add"))
        assert (verdict.rule, verdict.evidence, verdict.limit) == ("mask", -1e9, -65504.0)
        assert Mask()(node(tensor(), tensor(0.0, masked=4), base="add")) is None

    @pytest.mark.parametrize("base", ["softmax", "scaled_dot_product_attention", "where", "masked_fill", "expand"])
    def test_what_only_reads_or_chooses_is_not_concerned(self, base: str) -> None:
        """Softmax, attention, where and movement take a saturated mask."""
        assert Mask()(node(tensor(masked=4, mask_min=-3e38), base=base)) is None

    def test_softmax_answers_for_the_upper_end_of_a_masked_tensor(self) -> None:
        """-9990, a mask plus a score, is no magnitude to a softmax; +600 is."""
        masked = tensor(9990.0, max=3.0, masked=4)
        assert DataMax(512.0)(node(masked, base="softmax")) is None
        assert DataMax(512.0)(node(masked, base="mul")) is not None
        assert DataMax(512.0)(node(replace(masked, max=600.0), base="softmax")).evidence == 600.0

    def test_what_is_all_mask_has_no_magnitude(self) -> None:
        """A tensor of -inf or -1e4 and nothing else, as `full` makes it; one of -1e9, which fp16 does not hold, has."""
        for least in (None, -1e4, -65504.0):
            every = tensor(None, masked=16, mask_min=least)
            assert DataMax(512.0)(node(output=every, base="full")) is None
            assert DataMax(512.0)(node(every, base="where")) is None
        beyond = tensor(None, masked=16, mask_min=-1e9)
        verdict = DataMax(512.0)(node(output=beyond, base="full"))
        assert "nothing but mask values, down to -1e+09" in verdict.reason
        assert DataMax(512.0)(node(output=beyond, base="full", low_type=BRAIN)) is None
        assert DataMax(512.0)(node(output=replace(beyond, masked=0, nonfinite=16), base="full")) is not None


class TestInterior:
    def test_a_bound_above_the_low_type(self) -> None:
        """A hidden sum of squares beyond 65504 keeps the node high; the bound is the evidence."""
        verdict = Interior()(node(hidden=(Hidden("sum", 10.0), Hidden("sum of squares", 65505.0))))
        assert (verdict.rule, verdict.evidence, verdict.limit) == ("interior", 65505.0, 65504.0)
        assert "its sum of squares reaches up to 6.55e+04" in verdict.reason

    def test_exactly_at_the_limit(self) -> None:
        """The largest finite half is held."""
        assert Interior()(node(hidden=(Hidden("sum", 65504.0),))) is None

    def test_an_unknown_bound_is_high(self) -> None:
        """NaN, from a peak that nobody measured, keeps the node high."""
        assert math.isnan(Interior()(node(hidden=(Hidden("sum", math.nan),))).evidence)

    def test_bf16_reaches_further(self) -> None:
        """What overflows fp16 is far within bf16."""
        assert Interior()(node(hidden=(Hidden("sum", 1e30),), low_type=BRAIN)) is None

    def test_a_vanishing_epsilon(self) -> None:
        """An eps that fp16 makes zero no longer guards the division; 1e-5 is held."""
        verdict = Interior()(node(epsilon=1e-12))
        assert (verdict.rule, verdict.evidence, verdict.limit) == ("interior", 1e-12, 2.0**-14)
        assert Interior()(node(epsilon=1e-12, least_spread=0.0)).rule == "interior"
        assert Interior()(node(epsilon=1e-12, least_spread=0.1)) is None
        assert Interior()(node(epsilon=1e-5)) is None
        assert Interior()(node(epsilon=1e-12, low_type=BRAIN)) is None

    def test_without_ranges_it_says_nothing(self) -> None:
        """Bounds come from what was measured."""
        assert Interior()(node(hidden=(Hidden("sum", math.nan),), has_ranges=False)) is None


class TestMaxDepthOfReduction:
    def test_more_terms_than_allowed(self) -> None:
        """The depth is the evidence, as a float."""
        verdict = MaxDepthOfReduction(512)(node(depth=513))
        assert (verdict.rule, verdict.evidence, verdict.limit) == ("max_depth_of_reduction", 513.0, 512.0)
        assert "sums 513 terms" in verdict.reason

    @pytest.mark.parametrize("depth", [None, 1, 512])
    def test_as_many_as_allowed(self, depth: int | None) -> None:
        """Strict, and no opinion on what sums nothing."""
        assert MaxDepthOfReduction(512)(node(depth=depth)) is None


class TestNonfinite:
    def test_nan_or_inf_in_fp32_itself(self) -> None:
        """One is enough, of an input or an output, and the first batch is named."""
        verdict = Nonfinite()(node(tensor(nonfinite=2, nonfinite_batch=7)))
        assert (verdict.rule, verdict.evidence, verdict.limit) == ("nonfinite", 2.0, 0.0)
        assert verdict.reason == "its input x has 2 NaN or Inf in fp32, first in batch 7"
        assert Nonfinite()(node(output=tensor(name="n", nonfinite=1))).reason.startswith("its output has 1")

    def test_weights_count(self) -> None:
        """A weight with Inf keeps its readers high."""
        assert "its parameter x" in Nonfinite()(node(tensor(kind="parameter", nonfinite=1))).reason

    def test_movement_counts(self) -> None:
        """Even what only moves NaN stays high."""
        assert Nonfinite()(node(tensor(nonfinite=1, precision="low"), moves=True)) is not None

    def test_none(self) -> None:
        """All finite is no reason."""
        assert Nonfinite()(node(tensor())) is None


class TestUnmeasured:
    def test_missing_evidence_is_never_safe(self) -> None:
        """With ranges, a node with an unmeasured tensor stays high and names it."""
        verdict = Unmeasured()(node(tensor(), tensor(name="y", measured=False)))
        assert verdict.rule == "unmeasured"
        assert verdict.reason == "calibration has not measured y"

    def test_without_ranges_there_is_nothing_to_miss(self) -> None:
        """Without a RangeTable the rule does not apply."""
        assert Unmeasured()(node(tensor(measured=False), has_ranges=False)) is None

    def test_all_measured(self) -> None:
        """Measured tensors are no reason."""
        assert Unmeasured()(node(tensor())) is None


class TestLegality:
    @pytest.mark.parametrize("base", ["linalg_inv", "fft_rfft", "_fft_c2c", "quantile", "_ctc_loss", "cdist", "stft"])
    def test_no_target_runs_it_in_half(self, base: str) -> None:
        """The fixed list is the same on every machine, and no include lifts it."""
        facts = node(base=base, op=f"aten.{base}.default")
        assert Legality()(facts).rule == "legality"
        assert Legality(allow_custom=True)(facts) is not None

    @pytest.mark.parametrize("base", ["linear", "softmax", "linalg_vector_norm", "special_softmax", "mean"])
    def test_ordinary_operators(self, base: str) -> None:
        """Everything else is legal; no rule decides by an op's name alone."""
        assert Legality()(node(base=base)) is None

    def test_custom_ops_only_when_included(self) -> None:
        """Of a custom op nothing is known, until the user says that its kernels take half."""
        facts = node(custom=True, op="mine.op.default")
        assert Legality()(facts).reason.startswith("mine.op.default is a custom operator, and")
        assert Legality(allow_custom=True)(facts) is None


class TestUserLists:
    @pytest.mark.parametrize(
        ("pattern", "met"),
        [
            ("n$", True),
            ("^n", True),
            ("nn", False),
            ("encoder", True),
            (r"encoder\.\d", True),
            (r"\d", False),
            ("ead", False),
        ],
    )
    def test_patterns_match_name_or_module_from_the_start(self, pattern: str, met: bool) -> None:
        """As `re.match`, on the node name and on the dotted module path."""
        verdict = NodesToExclude((pattern,))(node(module="encoder.0.head"))
        assert (verdict is not None) == met

    def test_the_pattern_is_named(self) -> None:
        """The reason tells which of several patterns it was."""
        assert NodesToExclude(("zz", "n"))(node()).reason == "it matches nodes_to_exclude 'n'"

    def test_the_root_has_no_path_to_match(self) -> None:
        """An empty module path is not matched by a pattern that allows nothing."""
        assert NodesToExclude(("(encoder)?$",))(node(module="")) is None

    @pytest.mark.parametrize(
        ("target", "met"), [("aten.add.Tensor", True), ("aten.add", True), ("aten.add.Scalar", False), ("add", False)]
    )
    def test_targets_with_and_without_overload(self, target: str, met: bool) -> None:
        """By full name, or for all overloads."""
        verdict = TargetsToExclude(frozenset([target]))(node(op="aten.add.Tensor"))
        assert (verdict is not None) == met


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (DataMax(1.0), "data_max"),
        (InitMax(1.0), "init_max"),
        (LiteralRange(), "literal"),
        (MaxDepthOfReduction(1), "max_depth_of_reduction"),
        (NodesToExclude(()), "nodes_to_exclude"),
        (Nonfinite(), "nonfinite"),
        (Storage(), "storage"),
    ],
)
def test_rules_are_called_what_their_verdicts_say(rule: object, name: str) -> None:
    """The id of a rule is its class in snake case; a function's own name is its id."""
    assert rule_id(rule) == name


def test_a_function_has_its_own_name() -> None:
    """A user's function is a rule as it is."""

    def no_softmax(facts: NodeFacts) -> None:
        return None

    assert rule_id(no_softmax) == "no_softmax"


@pytest.mark.parametrize("absent", [(), (tensor(),)])
def test_a_quiet_node_meets_no_rule(absent: Sequence[TensorFacts]) -> None:
    """Small, measured, finite: every rule has no opinion, so the node runs low."""
    facts = node(*absent, op="aten.relu.default", base="relu")
    rules = [Legality(), Unmeasured(), Nonfinite(), DataMax(512), InitMax(512), LiteralRange(), Interior(), Storage()]
    assert [rule(facts) for rule in rules] == [None] * len(rules)
