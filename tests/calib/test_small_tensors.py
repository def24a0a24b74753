"""The buffer of small tensors: how much goes in, what is taken, and the statistics of each row by hand."""

from __future__ import annotations

import math

import pytest
import torch
from calibcast.calib.small_tensors import SmallTensors
from calibcast.calib.statistic_names import COUNTS, VALUES

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("tensor", "takes"),
    [
        (torch.ones(()), True),
        (torch.ones(0), False),
        (torch.ones(1 << 14), True),
        (torch.ones((1 << 14) + 1), False),
        (torch.ones(2, dtype=torch.float16), True),
        (torch.ones(2, dtype=torch.bfloat16), True),
        (torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2, dtype=torch.int32), False),
        (torch.ones(2, device="meta"), False),
    ],
)
def test_small_host_tensors_of_32_bits_or_fewer_are_taken(tensor: torch.Tensor, takes: bool) -> None:
    assert SmallTensors(histogram=False).takes(tensor) is takes


def test_the_buffer_has_room_for_65536_elements() -> None:
    small = SmallTensors(histogram=False)
    for row in range(4):
        assert small.has_room(torch.empty(1 << 14))
        small.put(row, torch.zeros(1 << 14))
    assert not small.has_room(torch.empty(1))
    assert small.has_room(torch.empty(0))
    small.clear()
    assert small.has_room(torch.empty(1 << 16))
    assert not small.has_room(torch.empty((1 << 16) + 1))


def test_the_buffer_has_512_rows() -> None:
    small = SmallTensors(histogram=False)
    for row in range(512):
        assert small.has_room(torch.empty(1))
        small.put(row, torch.zeros(1))
    assert not small.has_room(torch.empty(1))
    taken = small.take()
    assert taken is not None
    assert taken.rows == list(range(512))
    assert small.has_room(torch.empty(1))


def test_statistics_of_each_row() -> None:
    small = SmallTensors(histogram=True)
    small.put(7, torch.tensor([[1.0, -3.0], [0.0, 0.5]]).t())
    small.put(3, torch.tensor([NAN, INF, -INF, INF, -0.0, 2.0**-149]))
    small.put(9, torch.tensor([NAN, NAN, NAN]))
    small.put(1, torch.tensor([0.0], dtype=torch.float16))
    small.put(4, torch.tensor([2.0]).expand(3))
    small.put(5, torch.tensor([-4.0]))
    taken = small.take()
    assert taken is not None
    assert taken.rows == [7, 3, 9, 1, 4, 5]
    assert len(VALUES) == 5
    assert taken.values.tolist() == [
        [-3.0, 1.0, 0.5, -1.5, 10.25],
        [0.0, 2.0**-149, 2.0**-149, 2.0**-149, 2.0**-298],
        [INF, -INF, INF, 0.0, 0.0],
        [0.0, 0.0, INF, 0.0, 0.0],
        [2.0, 2.0, 2.0, 6.0, 12.0],
        [-4.0, -4.0, 4.0, -4.0, 16.0],
    ]
    # Elements, NaN, +inf, -inf, zeros, masked.
    assert len(COUNTS) == 6
    assert taken.counts.tolist() == [
        [4, 0, 0, 0, 1, 0], [6, 1, 2, 1, 1, 0], [3, 3, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0], [3, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert taken.histograms is not None
    found = [{b: n for b, n in enumerate(row) if n} for row in taken.histograms.tolist()]
    assert found == [{0: 1, 126: 1, 127: 1, 128: 1}, {0: 2, 255: 4}, {255: 3}, {0: 1}, {128: 3}, {129: 1}]


def test_the_largest_and_the_smallest_magnitudes() -> None:
    small = SmallTensors(histogram=True)
    largest, normal = torch.finfo(torch.float32).max, 2.0**-126
    small.put(0, torch.tensor([largest, -largest, normal]))
    taken = small.take()
    assert taken is not None
    assert taken.values[0, :3].tolist() == [-largest, largest, normal]
    assert taken.histograms is not None
    assert {b: n for b, n in enumerate(taken.histograms[0].tolist()) if n} == {1: 1, 254: 2}


def test_nothing_is_taken_twice() -> None:
    small = SmallTensors(histogram=False)
    assert small.take() is None
    small.put(0, torch.ones(2))
    first = small.take()
    assert first is not None
    assert first.histograms is None
    assert small.take() is None
    small.put(1, torch.full((3,), 5.0))
    second = small.take()
    assert second is not None
    assert (second.rows, second.values[0, 1], second.counts[0, 0]) == ([1], 5.0, 3)
