"""Shares as people read them."""

import math

import pytest
from calibcast.calib.number_text import percent


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0.0%"), (1e-9, "<0.1%"), (0.000999, "<0.1%"), (0.001, "0.1%"), (0.5, "50.0%"), (0.9949, "99.5%"),
        (0.999, "99.9%"), (0.99901, ">99.9%"), (1 - 1e-9, ">99.9%"), (1.0, "100.0%"), (math.nan, "-"),
    ],
)  # fmt: skip
def test_a_share_is_never_none_nor_all_of_something_else(share: float, text: str) -> None:
    assert percent(share) == text
