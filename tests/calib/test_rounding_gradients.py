"""What gradients do not tell: where a step, a cut or a pole stands between a tensor and the outputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from calibcast.calib.rounding_gradients import Gradients
from calibcast.calib.rounding_tape import Call, Tape, Value


def value(*numbers: float, whole: bool = False) -> Value:
    return Value(torch.tensor(numbers, dtype=torch.int64 if whole else torch.float32), frozenset())


def call(*args: Value, gives: Value, mover: bool = False) -> Call:
    made = Call("c", None, torch.ops.aten.alias.default, args, mover, outputs=(gives,))
    for argument in args:
        argument.readers.append(made)
    return made


def gradients(*outputs: Value) -> Gradients:
    return Gradients(cast(Tape, SimpleNamespace(outputs=outputs)))


def test_a_step_is_seen_through_movers_and_not_through_what_computes() -> None:
    x, moved, order = value(1, 2), value(1, 2), value(0, 1, whole=True)
    computed, elsewhere, result = value(1, 2), value(1, 2), value(1, 2)
    step, mover = call(moved, gives=order), call(x, gives=moved, mover=True)
    other, plain = call(computed, gives=x), call(elsewhere, gives=result, mover=True)
    found = gradients(order, result)
    for one in (step, plain, mover, other):
        found.pass_on(one)
    assert found.steps_next(moved)  # a sort reads it
    assert found.steps_next(x)  # through a mover
    assert not found.steps_next(computed)  # what computes x has a gradient of its own
    assert not found.steps_next(elsewhere)  # a mover that no step reads


def test_indices_that_nobody_uses_are_no_step() -> None:
    x, order = value(1, 2), value(0, 1, whole=True)
    unused = call(x, gives=order)
    assert not gradients().is_step(unused)
    assert gradients(order).is_step(unused)
    mover: Any = call(value(1, 2), gives=order, mover=True)
    assert not gradients(order).is_step(mover)
    assert not gradients(order).is_step(call(value(1, whole=True), gives=order))
