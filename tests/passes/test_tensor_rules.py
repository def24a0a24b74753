"""The rules that look at tensors alone: each threshold from both sides, and rounding noise against real rounding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from calibcast.passes import NodeFacts, TensorFacts
from calibcast.passes.number_formats import format_of
from calibcast.passes.tensor_rules import (
    DataMax,
    Headroom,
    InitMax,
    Nonfinite,
    Storage,
    keeps_surely,
    median_noise,
    most_noise,
    rounding_noise,
    storage_sqnr,
)

FP16, BF16 = format_of(torch.float16), format_of(torch.bfloat16)
INF = math.inf


def peak(value: float, name: str = "x", **known: Any) -> TensorFacts:
    known = {"min": -value, "max": value, "absmax": value, "absmax_batch": 3, "nonfinite_batch": 5} | known
    return TensorFacts(name, **known)


def node(*inputs: TensorFacts, outputs: tuple[TensorFacts, ...] = (), **known: Any) -> NodeFacts:
    return NodeFacts("n", inputs=inputs, outputs=outputs, **known)


def of_values(x: torch.Tensor, **known: Any) -> TensorFacts:
    """Facts of a tensor, by torch in float64."""
    wide = x.double()
    bins = torch.bincount(x.float().view(torch.int32).bitwise_and(0x7FFFFFFF) >> 23, minlength=256).tolist()
    numbers = {"min": float(wide.min()), "max": float(wide.max()), "absmax": float(wide.abs().max())}
    rms = float(wide.square().mean().sqrt())
    return TensorFacts("x", mean=float(wide.mean()), rms=rms, histogram=bins, **numbers, **known)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-20, -14, -12, -3, 0, 9])
def test_noise_of_a_bin_is_that_of_rounding_what_is_in_it(low: torch.dtype, exponent: int) -> None:
    """Squared errors of values spread evenly over a bin, which torch rounds, within 3%."""
    x = torch.linspace(1.0, 2.0, 40001)[:-1] * 2.0**exponent
    error = float((x.to(low).double() - x.double()).square().mean())
    assert rounding_noise(of_values(x), format_of(low)) == pytest.approx(error, rel=0.03)


def test_noise_of_what_is_lost_is_its_own_square_or_little_more() -> None:
    """Below half of the smallest subnormal of fp16, 2^-25, everything becomes 0."""
    x = torch.linspace(1.0, 2.0, 1000)[:-1] * 2.0**-30
    assert 1.0 <= rounding_noise(of_values(x), FP16) / float(x.double().square().mean()) <= 4.0
    assert rounding_noise(TensorFacts("x", histogram=[7] + [0] * 255), FP16) == 0.0
    assert rounding_noise(TensorFacts("x", histogram=[0] * 255 + [7]), FP16) == 0.0


def test_zeros_share_the_noise_of_the_others() -> None:
    histogram = [0] * 256
    histogram[127] = 3
    alone = rounding_noise(TensorFacts("x", histogram=histogram), FP16)
    assert alone == (2.0**-10) ** 2 / 12
    histogram[0], histogram[255] = 9, 100  # what is not finite has no part in it
    assert rounding_noise(TensorFacts("x", histogram=histogram), FP16) == alone / 4


@pytest.mark.parametrize(
    ("most", "bins"), [(INF, (120, 127, 130)), (1.5, (120, 127)), (1.0, (120, 127)), (0.99, (120,)), (1e-30, ())]
)
def test_noise_up_to_a_magnitude_leaves_out_larger_bins(most: float, bins: tuple[int, ...]) -> None:
    histogram = [0] * 256
    for bin_ in (120, 127, 130):
        histogram[bin_] = 5
    only = [5 if bin_ in bins else 0 for bin_ in range(256)]
    found = rounding_noise(TensorFacts("x", histogram=histogram), FP16, most)
    assert found == rounding_noise(TensorFacts("x", histogram=only), FP16)


def test_without_a_histogram_the_noise_is_bounded_by_the_size() -> None:
    """An error of half a step at most, of the value's own and of a subnormal's: u^2 / 12 each, for the step at rms."""
    bound = (4.0 * 2.0**-10) ** 2 / 12 + (2.0**-24) ** 2 / 12
    assert most_noise(4.0, FP16) == bound
    assert rounding_noise(TensorFacts("x", rms=4.0), FP16) == bound
    assert rounding_noise(TensorFacts("x", rms=4.0), FP16, most=1.0) == most_noise(1.0, FP16)
    assert rounding_noise(TensorFacts("x", rms=4.0), FP16, most=8.0) == bound
    assert rounding_noise(TensorFacts("x"), FP16) == median_noise(TensorFacts("x"), FP16) == most_noise(0.0, FP16)


@pytest.mark.parametrize(
    ("counts", "bin_"),
    [({127: 10, 140: 9}, 127), ({127: 9, 140: 10}, 140), ({127: 5, 140: 5}, 140), ({0: 99, 254: 1}, 254), ({1: 2}, 1)],
)
def test_median_noise_is_that_of_the_middle_element(counts: dict[int, int], bin_: int) -> None:
    """Zeros and what is not finite have no magnitude."""
    histogram = [0] * 256
    for place, count in counts.items():
        histogram[place] = count
    histogram[255] = 1000
    alone = [0] * 256
    alone[bin_] = 1
    assert median_noise(TensorFacts("x", histogram=histogram), BF16) == rounding_noise(
        TensorFacts("x", histogram=alone), BF16
    )
    assert median_noise(TensorFacts("x", histogram=[9] + [0] * 254 + [9]), BF16) == 0.0


@pytest.mark.parametrize("offset", [0.0, 3.0, 400.0])
@pytest.mark.parametrize("counts", [True, False])
def test_signal_over_rounding_is_what_rounding_leaves(offset: float, counts: bool) -> None:
    x = offset + 0.1 * torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    noise = float((x.half().double() - x.double()).square().mean())
    signal = float(x.double().var() if counts else x.double().square().mean())
    facts = of_values(x, offset_counts=counts)
    assert storage_sqnr(facts, FP16) == pytest.approx(10 * math.log10(signal / noise), abs=0.3)


def test_signal_over_rounding_of_what_has_none() -> None:
    assert storage_sqnr(peak(1.0), FP16) is None
    assert storage_sqnr(peak(1.0, min=1.0, mean=1.0, rms=1.0), FP16) is None  # constant
    assert storage_sqnr(peak(70000.0, mean=0.0, rms=1.0), FP16) == -INF
    assert storage_sqnr(peak(65504.0, mean=0.0, rms=1.0), FP16) > 0
    assert storage_sqnr(peak(4.0, mean=2.0, rms=2.0), FP16) == -INF  # no variation is left
    assert storage_sqnr(peak(4.0, mean=2.0, rms=2.0, offset_counts=False), FP16) > 60
    assert storage_sqnr(peak(4.0, mean=0.0, rms=2.0, histogram=[5] + [0] * 255), FP16) is None  # no noise


@pytest.mark.parametrize(("mean", "rms", "absmax"), [(None, 1.0, 1.0), (0.0, None, 1.0), (0.0, 1.0, None)])
def test_nothing_is_sure_of_what_was_not_measured(mean: Any, rms: Any, absmax: Any) -> None:
    tensor = TensorFacts("x", mean=mean, rms=rms, absmax=absmax)
    assert not keeps_surely(tensor, FP16, -100.0)
    assert storage_sqnr(tensor, FP16) is None


def test_what_surely_keeps_its_signal_has_a_decibel_to_spare() -> None:
    tensor = peak(4.0, mean=0.0, rms=2.0)
    decibels = storage_sqnr(tensor, FP16)
    assert decibels == pytest.approx(10 * math.log10(4.0 / ((2 * 2.0**-10) ** 2 / 12)), abs=1e-3)
    assert keeps_surely(tensor, FP16, decibels - 1.001)
    assert not keeps_surely(tensor, FP16, decibels - 0.999)
    assert not keeps_surely(peak(65505.0, mean=0.0, rms=2.0), FP16, 0.0)
    assert keeps_surely(peak(65504.0, mean=0.0, rms=2.0), FP16, 0.0)
    assert not keeps_surely(peak(4.0, mean=2.0, rms=2.0), FP16, -1000.0)


@pytest.mark.parametrize(("value", "kept"), [(512.0, False), (512.5, True), (INF, True), (math.nan, True)])
def test_data_max_is_passed_above_it_alone(value: float, kept: bool) -> None:
    verdict = DataMax(512.0)(node(peak(1.0), peak(value, "y")))
    assert (verdict is not None) is kept
    if verdict is not None:
        said = "nothing finite" if math.isnan(value) else f"{value:.4g}"
        assert verdict.reason == f"its input y reached {said} in batch 3, above data_max 512"
        assert (verdict.rule, verdict.limit) == ("data_max", 512.0)


def test_the_largest_of_several_is_named() -> None:
    verdict = DataMax(1.0)(node(peak(2.0, "a"), peak(8.0, "b"), peak(4.0, "c")))
    assert verdict is not None
    assert "its input b reached 8 " in verdict.reason
    assert verdict.evidence == 8.0
    first = DataMax(1.0)(node(peak(8.0, "a"), peak(8.0, "b")))
    assert first is not None
    assert "its input a " in first.reason


def test_data_max_leaves_out_weights_and_what_was_not_measured() -> None:
    assert DataMax(1.0)(node(peak(9.0, kind="parameter"))) is None
    assert DataMax(1.0)(node(peak(9.0, measured=False))) is None
    assert DataMax(INF)(node(peak(INF))) is None
    own = DataMax(1.0)(node(outputs=(peak(9.0, "n", absmax_batch=None),)))
    assert own is not None
    assert own.reason == "its output reached 9, above data_max 1"


@pytest.mark.parametrize(("given", "known", "kept"), [(1, 1, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1)])
def test_default_data_max_gives_way_to_measured_rounding(given: int, known: int, kept: int) -> None:
    rule = DataMax(1.0, given=bool(given))
    assert (rule(node(peak(9.0), rounding_known=bool(known))) is not None) is bool(kept)
    assert DataMax(1.0).given
    assert DataMax(1.0).quantile == 1.0


def test_a_quantile_leaves_out_the_few_that_are_larger() -> None:
    histogram = [0] * 256
    histogram[127], histogram[136] = 999, 1
    tensor = peak(600.0, histogram=histogram)
    assert DataMax(512.0, 0.99)(node(tensor)) is None
    found = DataMax(512.0, 0.9999)(node(tensor))
    assert found is not None
    assert "600 (quantile 0.9999) in batch 3" in found.reason


@pytest.mark.parametrize(
    ("low", "value", "kept"),
    [(torch.float16, 16376.0, False), (torch.float16, 16377.0, True), (torch.bfloat16, 1e37, False)],
)
def test_headroom_is_four_times_what_was_measured(low: torch.dtype, value: float, kept: bool) -> None:
    facts = node(peak(value), rounding_known=True, low_type=low)
    assert (Headroom()(facts) is not None) is kept
    assert Headroom()(node(peak(value), low_type=low)) is None  # nothing was measured: data_max decides
    assert Headroom()(node(peak(value, kind="buffer"), rounding_known=True)) is None


def test_headroom_looks_at_all_that_a_mover_moves() -> None:
    decided = peak(60000.0, precision="low")
    assert Headroom()(node(decided, moves=True, rounding_known=True)) is not None
    assert DataMax(512.0)(node(decided, moves=True)) is None
    assert DataMax(512.0)(node(peak(60000.0), moves=True)) is not None


@pytest.mark.parametrize(("value", "kept"), [(2.0, False), (2.5, True)])
def test_init_max_looks_at_weights_alone(value: float, kept: bool) -> None:
    verdict = InitMax(2.0)(node(peak(99.0), peak(value, "w", kind="parameter")))
    assert (verdict is not None) is kept
    if verdict is not None:
        assert verdict.reason == "its parameter w reached 2.5, above init_max 2"  # of no batch
    assert InitMax(INF)(node(peak(INF, kind="parameter"))) is None


def test_nonfinite_is_counted_and_named() -> None:
    verdict = Nonfinite()(node(peak(1.0), peak(1.0, "y", nonfinite=7)))
    assert verdict is not None
    assert (verdict.reason, verdict.evidence, verdict.limit) == (
        "its input y has 7 NaN or Inf in fp32, first in batch 5", 7.0, 0.0,
    )  # fmt: skip
    bare = Nonfinite()(node(peak(1.0, nonfinite=1, nonfinite_batch=None)))
    assert bare is not None
    assert bare.reason.endswith("in fp32")
    assert Nonfinite()(node(peak(1.0))) is None
    assert Nonfinite()(node(peak(1.0, nonfinite=1, measured=False))) is None


# Nothing but mask values: absmax counts none of them.
MASK = {"min": None, "max": None, "absmax": None, "masked": 4, "absmax_batch": None}


@pytest.mark.parametrize(
    ("base", "known", "kept"),
    [
        ("softmax", {"masked": 4, "max": 3.0, "absmax": 900.0}, False),  # only the upper end counts
        ("softmax", {"masked": 4, "max": 600.0, "absmax": 900.0}, True),
        ("softmax", {"masked": 4, "max": -600.0, "absmax": 900.0}, False),
        ("softmax", {"masked": 0, "max": 3.0, "absmax": 900.0}, True),
        ("add", {"masked": 4, "max": 3.0, "absmax": 900.0}, True),
        ("add", MASK | {"mask_min": None}, False),  # infinities, which the low type has
        ("add", MASK | {"mask_min": -65504.0}, False),
        ("add", MASK | {"mask_min": -65505.0}, True),
        ("topk", MASK | {"mask_min": -1e9}, False),
        ("gt", MASK | {"mask_min": -1e9}, False),
        ("add", MASK | {"mask_min": None, "nonfinite": 1}, True),
        ("add", MASK | {"mask_min": None, "masked": 0}, True),  # nothing was seen at all
    ],
)
def test_masks_count_where_the_low_type_does_not_hold_them(base: str, known: dict[str, Any], kept: bool) -> None:
    verdict = DataMax(512.0)(node(peak(1.0, **known), base=base))
    assert (verdict is not None) is kept
    if verdict is not None and known.get("mask_min") is not None:
        assert "reached nothing but mask values, down to -6.55e+04" in verdict.reason


def test_what_is_stored_scaled_says_so() -> None:
    weight = InitMax(2.0)(node(peak(9.0, "w", kind="buffer", exponent=3)))
    own = DataMax(2.0)(node(outputs=(peak(9.0, "n", exponent=-2),)))
    other = DataMax(2.0)(node(peak(9.0, "y", exponent=1)))
    assert [v.reason.split(" reached")[0] for v in (weight, own, other) if v is not None] == [
        "its buffer w, stored as 2^-3 of itself,",
        "its output, stored as 2^2 of itself,",
        "its input y, stored as 2^-1 of itself,",
    ]


def offset(spread: float, **known: Any) -> TensorFacts:
    """Values around 400 in fp16, whose step there is 1/4."""
    return peak(400.0, min=399.0, mean=400.0, rms=math.sqrt(400.0**2 + spread**2), **known)


STEP_NOISE = (400.0 * 2.0**-10) ** 2 / 12


@pytest.mark.parametrize(("decibels", "kept"), [(19.9, True), (20.1, False)])
def test_storage_keeps_what_has_less_than_twenty_decibels(decibels: float, kept: bool) -> None:
    tensor = offset(math.sqrt(STEP_NOISE * 10 ** (decibels / 10)))
    verdict = Storage()(node(tensor))
    assert (verdict is not None) is kept
    if verdict is not None:
        assert (verdict.evidence, verdict.limit) == (pytest.approx(decibels, abs=0.01), 20.0)
        assert (
            verdict.reason
        ) == "its input x would keep 19.9 dB of signal over rounding in fp16, below 20 dB (mean 400, rms 400)"
    assert Storage()(node(tensor, rounding_known=True)) is None
    assert Storage(limit=decibels + 1)(node(tensor)) is not None


def test_storage_leaves_out_weights_and_what_was_not_measured() -> None:
    assert Storage()(node(offset(0.01, kind="parameter"))) is None
    assert Storage()(node(offset(0.01, measured=False))) is None
    assert Storage()(node(peak(1.0, mean=0.0, rms=0.5), offset(0.01))) is not None


def test_storage_says_what_overflows() -> None:
    verdict = Storage()(node(peak(70000.0, mean=0.0, rms=9.0)))
    assert verdict is not None
    assert verdict.reason == "its input x reached 7e+04, which becomes inf in fp16 (it holds 65504)"
    assert verdict.evidence == -INF


def test_storage_keeps_small_values_that_are_magnified() -> None:
    tensor = peak(1.0, mean=0.0, rms=0.5, smallest=2.0**-16, magnified=True)
    verdict = Storage()(node(tensor))
    assert verdict is not None
    assert (verdict.evidence, verdict.limit) == (2.0**-16, 2.0**-14)
    assert "has values down to 1.53e-05, below 6.1e-05" in verdict.reason
    assert Storage()(node(peak(1.0, mean=0.0, rms=0.5, smallest=2.0**-16))) is None
    assert Storage()(node(peak(1.0, mean=0.0, rms=0.5, magnified=True))) is None
