"""Shares as people read them."""

import math

import pytest
from calibcast.calib.number_text import percent, size


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0.0%"), (1e-9, "<0.1%"), (0.000999, "<0.1%"), (0.001, "0.1%"), (0.5, "50.0%"), (0.9949, "99.5%"),
        (0.999, "99.9%"), (0.99901, ">99.9%"), (1 - 1e-9, ">99.9%"), (1.0, "100.0%"), (math.nan, "-"),
    ],
)  # fmt: skip
def test_a_share_is_never_none_nor_all_of_something_else(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234, "1.23 kB"), (12_340, "12.3 kB"), (999_000, "999 kB"),
        (1_000_000, "1 MB"), (999_000_000, "999 MB"), (10**9, "1 GB"), (10**12, "1 TB"), (5 * 10**15, "5e+03 TB"),
    ],
)  # fmt: skip
def test_a_size_has_three_digits_and_a_unit(count: int, text: str) -> None:
    assert size(count) == text
