"""Rounding evidence of scaled tensors: squared errors against real rounding, and each choice of source by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from calibcast.calib.rounding_scaling import Spread, _finite, _missing, _number_error, _ratio, _sum, _times

FP16, BF16 = "float16", "bfloat16"
TYPES = {FP16: torch.float16, BF16: torch.bfloat16}


def bins_of(x: torch.Tensor) -> list[int]:
    counts: list[int] = torch.bincount(x.view(torch.int32).bitwise_and(0x7FFFFFFF) >> 23, minlength=256).tolist()
    return counts


@pytest.mark.parametrize("low", TYPES)
@pytest.mark.parametrize("k", [-6, 0, 6, 12])
def test_error_of_a_spread_is_that_of_rounding_it(low: str, k: int) -> None:
    """Summed over 40,000 values from 2^-10 to 2: stored as 2^-k of themselves, rounded, and scaled back."""
    x = torch.exp2(-10 + 11 * torch.linspace(0, 1, 40001)[:-1])
    stored = x * 2.0**-k
    error = float(((stored.to(TYPES[low]).double() - stored.double()) * 2.0**k).square().sum())
    spread = Spread(2.0, 2.0**-10, bins_of(x))
    # The values are spread evenly within a bin only nearly.
    assert spread.rounding(low, k, pole=False) == pytest.approx(error, rel=0.2)


def test_errors_of_powers_of_two_by_hand() -> None:
    """A step of 2^-10, and one of 2^-24 below 2^-14, for each of the types; what is far below is lost."""

    def of(exponent: int, low: str, k: int = 0) -> float:
        bins = [0] * 256
        bins[exponent + 127] = 3
        return Spread(2.0**exponent, 2.0**exponent, bins).rounding(low, k, pole=False)

    assert of(0, FP16) == 3 * 2.0**-20 / 12
    assert of(5, FP16) == 3 * 2.0**-10 / 12
    assert of(0, BF16) == 3 * 2.0**-14 / 12
    assert of(-16, FP16) == 3 * 2.0**-48 / 12
    assert of(-10, FP16, 6) == 3 * 2.0**-36 / 12  # 2^-16 there, whose step is 2^-24, times 2^6 again
    assert of(-30, FP16) == 3 * 4 * 2.0**-60
    assert of(-16, BF16) == 3 * 2.0**-46 / 12
    only_special = [5] + [0] * 254 + [5]
    assert Spread(1.0, 1.0, only_special).rounding(FP16, 0, pole=False) == 0.0


@pytest.mark.parametrize(
    ("least", "k", "low", "pole", "expected"),
    [
        (1.0, 0, FP16, True, 2.0**-20),
        (1.0, 0, BF16, True, 2.0**-14),
        (2.0**-14, 0, FP16, True, 2.0**-20),
        (2.0**-16, 0, FP16, True, 2.0**-16),  # a step four times as large, relative to it
        (2.0**-10, 6, FP16, True, 2.0**-16),
        (2.0**-25, 0, FP16, True, 2.0**2),
        (2.0**-26, 0, FP16, True, math.inf),
        (2.0**-26, 0, BF16, True, 2.0**-14),
        (2.0**-20, 5, FP16, True, 2.0**2),
        (2.0**-20, 6, FP16, True, math.inf),
        (2.0**-20, -6, FP16, True, 2.0**-20),
        (1.0, 0, FP16, False, 2.0**-20),  # without a histogram
    ],
)
def test_error_at_a_pole_is_that_of_the_smallest(least: float, k: int, low: str, pole: bool, expected: float) -> None:
    bins = None if not pole else [9] * 256
    assert Spread(4.0, least, bins).rounding(low, k, pole) == expected
    assert Spread(0.0, 0.0, bins).rounding(low, k, pole) == 0.0


@pytest.mark.parametrize(
    ("most", "least", "k", "whole"),
    [
        (65504.0, 1.0, 0, True),
        (65505.0, 1.0, 0, False),
        (65505.0, 1.0, 1, False),  # it was not held before
        (40000.0, 1.0, -1, False),
        (30000.0, 1.0, -1, True),
        (1.0, 2.0**-14, 0, True),
        (1.0, 2.0**-15, 0, False),
        (1.0, 2.0**-15, -3, False),
        (1.0, 2.0**-13, 1, True),
        (1.0, 2.0**-13, 2, False),
        (0.0, 0.0, 40, True),
    ],
)
def test_all_is_held_in_full_before_and_after(most: float, least: float, k: int, whole: bool) -> None:
    assert Spread(most, least, None).whole(k) is whole


@pytest.mark.parametrize("low", TYPES)
@pytest.mark.parametrize("value", [0.1, -0.1, 1e-6, 3e-5, -1e-7, 1000.1, 1.0, -2.5, 65504.0, 1e-8, 1 / 3])
def test_error_of_a_number_is_that_of_torch(value: float, low: str) -> None:
    single = float(np.float32(value))
    rounded = float(torch.tensor(single).to(TYPES[low]))
    assert _number_error(value, low) == pytest.approx(abs(rounded - single) / abs(single), rel=1e-6, abs=1e-12)


def test_error_of_special_numbers() -> None:
    assert _number_error(0.0, FP16) == _number_error(math.inf, FP16) == _number_error(math.nan, BF16) == 0.0
    assert _number_error(65505.0, FP16) == _number_error(-65505.0, FP16) == math.inf
    assert _number_error(65505.0, BF16) < 0.01
    assert _number_error(65504.0, FP16) == 0.0


def row(**cells: Any) -> dict[str, Any]:
    same = {
        "noise": 1e-4, "noise_worst": 4e-4, "worst_batch": 3, "noise_by_output": [1e-5, 9e-5], "nonfinite": 0,
        "steps": 0, "local_sqnr_db": 40.0, "batches": 2, "method": "gradient", "why_missing": None,
    }  # fmt: skip
    return same | cells


@pytest.mark.parametrize(
    ("cells", "factor", "by"),
    [
        ({}, 4.0, 4.0),
        ({}, 0.25, 0.25),
        ({"steps": 1}, 0.25, 0.5),  # as many steps change as the error is large
        ({"method": "run"}, 0.25, 0.5),
        ({"steps": 1}, 4.0, 4.0),
        ({"method": "run"}, 1.0, 1.0),
    ],
)
def test_all_noise_grows_by_the_same_factor(cells: dict[str, Any], factor: float, by: float) -> None:
    found = _times(row(**cells), factor)
    assert (found["noise"], found["noise_worst"]) == (1e-4 * by, 4e-4 * by)
    assert found["noise_by_output"] == [1e-5 * by, 9e-5 * by]
    assert found["local_sqnr_db"] == pytest.approx(40 - 10 * math.log10(by))
    assert (found["method"], found["worst_batch"], found["batches"]) == ("scaled", 3, 2)
    assert _times(row(noise_by_output=None), factor)["noise_by_output"] is None


@pytest.mark.parametrize("factor", [0.0, math.inf])
def test_a_factor_of_nothing_or_all_leaves_the_local_ratio(factor: float) -> None:
    assert _times(row(), factor)["local_sqnr_db"] == 40.0


def test_noise_of_several_readers_adds_up() -> None:
    other = row(noise=2e-4, noise_worst=1e-4, noise_by_output=[2e-4, 0.0], nonfinite=1, steps=5, local_sqnr_db=30.0)
    found = _sum([row(steps=2), other])
    assert found == row(
        noise=1e-4 + 2e-4, noise_worst=4e-4 + 1e-4, noise_by_output=[1e-5 + 2e-4, 9e-5], nonfinite=1, steps=7,
        local_sqnr_db=30.0, method="scaled",
    )  # fmt: skip
    assert _sum([row(), row(noise_by_output=None)])["noise_by_output"] is None
    assert _sum([row(), row(noise_worst=1.0, worst_batch=7)])["worst_batch"] == 7


def test_ratios_of_errors() -> None:
    assert [_ratio(6.0, 3.0), _ratio(0.0, 3.0), _ratio(0.0, 0.0), _ratio(3.0, 0.0)] == [2.0, 0.0, 1.0, math.inf]


@pytest.mark.parametrize(
    ("cells", "finite"),
    [({}, True), ({"noise": None}, False), ({"noise": math.inf}, False), ({"nonfinite": 1}, False)],
)
def test_evidence_is_finite_where_its_noise_is(cells: dict[str, Any], finite: bool) -> None:
    assert _finite(row(**cells)) is finite


def test_a_gap_says_why() -> None:
    gap = _missing("no reason")
    assert gap.keys() == row().keys()
    assert (gap["why_missing"], gap["batches"]) == ("no reason", 0)
    assert all(value is None for name, value in gap.items() if name not in {"why_missing", "batches"})
