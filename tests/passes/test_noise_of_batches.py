"""The noise of an edge in each batch, from its mean and its worst."""

from __future__ import annotations

import math
from typing import Any

import pytest
from calibcast.passes.rounding_evidence import LOST, OTHERS, _batches, _finite, _Row

INF, NAN = math.inf, math.nan


def row(
    mean: float | None = 2.0, worst: float | None = 6.0, batch: int | None = 3, by: Any = None, seen: int = 4
) -> _Row:
    return _Row(mean, worst, batch, by, seen)


@pytest.mark.parametrize(
    ("found", "batch", "part"),
    [
        (row(), 3, 3.0),  # the worst, three times the mean
        (row(), OTHERS, 3.0),
        (row(), 1, 1 / 3),  # the other three share one of four
        (row(worst=9.0), 1, 0.0),
        (row(worst=1.0), 3, 1.0),  # never less than the mean
        (row(worst=None), 3, 1.0),
        (row(seen=1), 1, 3.0),
        (row(seen=2, worst=3.0), 1, 0.5),
        (row(mean=0.0), 3, 1.0),
        (row(mean=INF), 1, 1.0),
    ],
)
def test_a_batch_has_a_part_of_the_mean(found: _Row, batch: int, part: float) -> None:
    assert found._part(batch) == pytest.approx(part)


def test_noise_by_output_and_batch() -> None:
    told = row(by=[0.5, 1.5])
    assert told.noise([3, 1], 2, ()) == pytest.approx((1.5, 4.5, 0.5 / 3, 0.5))
    # Integers count over all batches together, like an amplitude.
    assert told.noise([3, 1], 2, {1}) == pytest.approx((1.5, 2.25, 0.5 / 3, 2.25))
    # Where outputs were not told apart, each may have all of it.
    assert row().noise([3], 2, {1}) == pytest.approx((6.0, 6.0))
    assert told.noise([3], 3, ()) == pytest.approx((6.0,) * 3)
    assert row(mean=INF).noise([3, 1], 1, ()) == (LOST, LOST)
    assert row(mean=0.0, worst=0.0).noise([3], 1, ()) == (0.0,)


def test_batches_with_the_most_noise_come_first_and_the_rest_are_one() -> None:
    rows = [row(worst=float(n), batch=n) for n in range(1, 4)] + [
        row(worst=2.5, batch=1),
        row(worst=None),
        row(batch=None),
    ]
    assert _batches(rows) == [1, 3, 2]
    assert _batches([]) == [OTHERS]
    assert _batches([row(worst=INF, batch=7), row(worst=5.0, batch=8)]) == [7, 8]
    many = _batches([row(worst=float(n), batch=n) for n in range(1, 100)])
    assert many[0] == 99
    assert many[-1] == OTHERS
    assert many[:-1] == list(range(99, 100 - len(many), -1))


def test_what_is_lost_is_a_large_number() -> None:
    assert [_finite(noise) for noise in (1.0, 1e29, 1e31, INF, NAN)] == [1.0, 1e29, LOST, LOST, LOST]
    assert LOST == 1e30
