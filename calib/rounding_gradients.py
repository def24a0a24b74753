"""Gradients of a program's outputs along a tape, one call at a time, and where a gradient is not enough."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from calibcast.calib.graph import base_op
from calibcast.calib.operators import STEPS, operator_of
from calibcast.calib.process_settings import HeldSetting
from calibcast.calib.rounding_tape import Call, Tape, Value

Grads = dict[int, torch.Tensor]  # by column
# How many pointwise calls before a pole are run with rounded values; movers do not count.
_NEAR = 3


class Gradients:
    """Gradients by value and column. The autograd graph of a call is freed once the call has been passed."""

    def __init__(self, tape: Tape, asks: bool = True, anew: bool = False) -> None:
        """asks: the host may wait for numbers where they are on the host. anew: the calls have no autograd graphs, so
        they are run once more.
        """
        self._asks, self._runs_anew = asks, anew
        self._grads: dict[Value, Grads] = defaultdict(dict)
        self._outputs = {value for value in tape.outputs if value is not None}
        self._stepping: set[Value] = set()
        self._cut: set[Value] = set()
        self._near: dict[Value, int] = {}

    def of(self, value: Value) -> Grads:
        return self._grads.get(value, {})

    def add(self, value: Value, column: int, grad: torch.Tensor) -> None:
        held = self._grads[value]
        held[column] = held[column] + grad if column in held else grad

    def lay_as(self, value: Value) -> None:
        """Give the gradients of a value its memory layout, so that products with its errors take one pass."""
        held = self._grads.get(value, {})
        for column, grad in held.items():
            if grad.stride() != value.tensor.stride():
                held[column] = torch.empty_like(value.tensor, dtype=grad.dtype).copy_(grad)

    def is_used(self, value: Value) -> bool:
        return bool(value.readers) or value in self._outputs

    def steps_next(self, value: Value) -> bool:
        """Whether a reader of `value`, past movers, rounds, compares or sorts. Known once the readers were passed."""
        return value in self._stepping

    def is_cut(self, value: Value) -> bool:
        """Whether an operator without a gradient stands somewhere between `value` and the outputs."""
        return value in self._cut

    def is_near_pole(self, value: Value) -> bool:
        """Whether a pole reads `value`, past movers and a few pointwise calls. Known once the readers were passed."""
        return value in self._near

    def is_step(self, call: Call) -> bool:
        """Whether a small error in what `call` reads may change its results by a step."""
        if call.mover or not any(value.differentiable for value in call.inputs):
            return False
        whole = any(v is not None and not v.differentiable and self.is_used(v) for v in call.outputs)
        return whole or (call.node is not None and base_op(call.node.target) in STEPS)

    def pass_on(self, call: Call) -> None:
        """Pass the gradients from the results of `call` to its inputs."""
        opaque = self._propagate(call)
        results = [value for value in call.outputs if value is not None]
        if self.is_step(call) or opaque or (call.mover and any(v in self._stepping for v in results)):
            self._stepping.update(call.inputs)
        self._look_for_poles(call, results)
        if opaque or any(v in self._cut for v in results):
            self._cut.update(v for v in call.inputs if v.computed)
        call.leaves, call.raw = {}, ()
        if not self.is_step(call) and not opaque:
            for value in results:
                if value not in self._outputs:
                    self._grads.pop(value, None)

    def _look_for_poles(self, call: Call, results: Sequence[Value]) -> None:
        before = min((self._near[value] for value in results if value in self._near), default=_NEAR)
        beyond = before + (not call.mover)
        passes = call.mover or torch.Tag.pointwise in getattr(call.run, "tags", ())
        far = call.inputs if passes and before < _NEAR else ()
        for value, distance in [*((v, beyond) for v in far), *((v, 0) for v in at_poles(call))]:
            if value.computed and value.differentiable:
                self._near[value] = min(distance, self._near.get(value, distance))

    def _propagate(self, call: Call) -> bool:
        """Add the gradients of the inputs. True where the operator has no gradient of its own."""
        columns = sorted({c for value in call.outputs if value is not None for c in self.of(value)})
        wanted = call.differentiable
        if not columns or not wanted:
            return False
        if self._runs_anew:
            call.raw = call.with_gradients(wanted) or ()
        found = self._backwards(call, columns) if call.leaves else None
        if found is None:  # the operator refused one graph for all inputs
            return any([not self._anew(call, [value], columns) for value in wanted])
        return not found and _is_foreign(call)

    def _anew(self, call: Call, inputs: Sequence[Value], columns: Sequence[int]) -> bool:
        """Add the gradients of some inputs, from a graph of these alone. False where there are none.

        cuDNN is switched off: its recurrent layers have gradients only in training.
        """
        with _CUDNN_OFF.held():
            call.raw = call.with_gradients(inputs) or ()
            return bool(call.raw and self._backwards(call, columns))

    def _backwards(self, call: Call, columns: Sequence[int]) -> bool | None:
        """Take all columns through a call. True where some input has a gradient; None where the operator refuses."""
        try:
            return any([self._backward(call, column, column != columns[-1]) for column in columns])
        except RuntimeError:
            return None

    def _backward(self, call: Call, column: int, again: bool) -> bool:
        """Take one column through a call. True where some input has a gradient."""
        roots = [
            (raw, self.of(value)[column])
            for raw, value in zip(call.raw, call.outputs, strict=True)
            if value is not None and column in self.of(value) and raw.requires_grad
        ]
        if not roots:
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an operator without a gradient warns, and gives none
            given = torch.autograd.grad(
                [raw for raw, _ in roots],
                list(call.leaves.values()),
                [grad for _, grad in roots],
                retain_graph=again,
                allow_unused=True,
            )
        for value, grad in zip(call.leaves, given, strict=True):
            if grad is not None:
                self.add(value, column, _sound(grad, self._asks and not grad.is_cuda))
        return any(grad is not None for grad in given)


def at_poles(call: Call) -> list[Value]:
    """What a call reads where it has a pole: what it divides by, what it takes the logarithm of."""
    if call.node is None or call.mover:
        return []
    given, found = call.args[0], []
    for pole in operator_of(base_op(call.node.target)).poles:
        power = None if pole.exponent is None else given[pole.exponent] if pole.exponent < len(given) else 1
        if pole.argument < len(given) and not (isinstance(power, (int, float)) and power >= 0):
            value = given[pole.argument]
            found += [value] if isinstance(value, Value) else []
    return found


def _sound(grad: torch.Tensor, asks: bool) -> torch.Tensor:
    """NaN and Inf become 0: sqrt has an infinite slope at 0, which would spoil all gradients before it.

    asks: its sum may be read first, which is cheaper than a copy; from a GPU it would be a wait.
    """
    sound = asks and math.isfinite(abs(grad.sum().item()))
    return grad if sound else grad.nan_to_num(0.0, 0.0, 0.0)


def _enable_cudnn(enabled: bool) -> None:
    cudnn: Any = torch.backends.cudnn
    cudnn.enabled = enabled


_CUDNN_OFF = HeldSetting(lambda: torch.backends.cudnn.enabled, _enable_cudnn, False)


def _is_foreign(call: Call) -> bool:
    """Whether the operator is not torch's own. Those of torch without a gradient give constants or integers."""
    return getattr(call.run, "namespace", "aten") not in {"aten", "prims"}
