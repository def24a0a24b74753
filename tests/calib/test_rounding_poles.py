"""What is asked of values near a pole, and the small sums with which that is asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibcast.calib.rounding_gradients import _sound, at_poles
from calibcast.calib.rounding_poles import _doubt, _lost, _moved
from calibcast.calib.rounding_tape import Call, Value, record
from torch import nn

INF, NAN = math.inf, math.nan


def value(*numbers: float, dtype: torch.dtype = torch.float32) -> Value:
    return Value(torch.tensor(numbers, dtype=dtype), frozenset())


@pytest.mark.parametrize("factor", [4.0, -4.0])
def test_results_are_moved_by_several_times_their_error(factor: float) -> None:
    """But not what is no tensor, nor what has no error: an integer that changed, changed."""
    call = Call("c", None, torch.sort, (), False, outputs=(value(1, 2), None, value(3, 4, dtype=torch.int64)))
    moved = _moved(call, (torch.tensor([1.5, 2.0]), "text", torch.tensor([4, 3])), factor)
    assert (moved[0].tolist(), moved[1], moved[2].tolist()) == ([1 + factor / 2, 2.0], "text", [4, 3])


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        ([1.0, 2.0], [1.0, 2.5], False),
        ([1.0, 2.0], [1.0, INF], True),
        ([1.0, 2.0], [NAN, 2.0], True),
        ([1.0, INF], [1.0, INF], False),
        ([1.0, INF], [1.0, NAN], False),
        ([1.0, INF], [-INF, INF], True),
        ([NAN, 1.0], [1.0, 1.0], False),
    ],
)
def test_an_element_is_lost_where_it_was_finite(before: list[float], after: list[float], lost: bool) -> None:
    kept, made = value(*before), torch.tensor(after)
    assert bool(_lost(kept, made)) is lost
    assert math.isinf(float(_doubt(kept, made, is_finite=False))) is lost
    if all(map(math.isfinite, before)):
        assert math.isfinite(float(_doubt(kept, made, is_finite=True))) is not lost


def test_doubts_of_complex_results() -> None:
    made = torch.tensor([complex(1, 2), complex(3, INF)])
    kept = value(1, 2, dtype=torch.complex64)
    assert float(_doubt(kept, made[:1], is_finite=True)) == 3.0
    assert math.isinf(float(_doubt(kept, made, is_finite=True)))


@pytest.mark.parametrize(
    ("grad", "sound"),
    [
        ([1.0, -2.0], [1.0, -2.0]),
        ([1.0, NAN], [1.0, 0.0]),
        ([INF, -INF, 2.0], [0.0, 0.0, 2.0]),
        ([-INF], [0.0]),
        ([3e38, 3e38], [3e38, 3e38]),  # only their sum is too large
    ],
)
def test_a_gradient_that_is_not_finite_counts_as_none(grad: list[float], sound: list[float]) -> None:
    assert torch.equal(_sound(torch.tensor(grad), True), torch.tensor(sound))
    made = _sound(torch.tensor(grad, dtype=torch.complex64), True)
    assert torch.equal(made, torch.tensor(sound, dtype=torch.complex64))


def test_a_sound_gradient_is_not_copied() -> None:
    grad = torch.ones(3)
    assert _sound(grad, True) is grad


@pytest.mark.parametrize(
    ("function", "places"),
    [
        (lambda x, y: x / y, [1]),
        (lambda x, y: x * y, []),
        (lambda x, y: x.log(), [0]),
        (lambda x, y: x.rsqrt(), [0]),
        (lambda x, y: x**-1.5, [0]),
        (lambda x, y: x**-0.25, [0]),
        (lambda x, y: x**0.0, []),
        (lambda x, y: x**0.25, []),
        (lambda x, y: x**2, []),
        (lambda x, y: x**y, [0]),
        (lambda x, y: 3.0 / y, [1]),
        (lambda x, y: x.reshape(-1), []),
    ],
)
def test_what_is_read_at_a_pole(function: Callable[..., Any], places: list[int]) -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return function(x, y)

    inputs = (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    tape = record(torch.export.export(Net(), inputs).graph_module, inputs)
    found = [v for call in tape.calls for v in at_poles(call)]
    assert [value.tensor.tolist() for value in found] == [inputs[place].tolist() for place in places]
