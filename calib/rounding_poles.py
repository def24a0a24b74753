"""Finds values one rounding away from a pole, such as a 0 / 0: neither a gradient nor a single edge shows that."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch
from calibcast.calib.rounding_gradients import Gradients, at_poles
from calibcast.calib.rounding_groups import Group, Results
from calibcast.calib.rounding_tape import Call, Value

# Near a pole an edge is tried with this many times its own error, as other edges like it may add theirs.
_SEVERAL = 4.0
T = TypeVar("T")


class PoleWatch(Generic[T]):
    """Collects edges near a pole while a tape is swept backwards, each with the results that reach the pole.

    at_risk: the call, its group, the low type, those results, and what the sweep found for it. Only the last `most` are
    kept: these come first in the program. exposed: values whose error decides whether a pole is reached.
    """

    def __init__(self, gradients: Gradients, most: int) -> None:
        self._gradients = gradients
        self._exposed: set[Value] = set()
        self.at_risk: deque[tuple[Call, Group, torch.dtype, Results, T]] = deque(maxlen=most)

    def pass_on(self, call: Call) -> None:
        """Where a mover's result is exposed, its inputs are, too."""
        if call.mover and not self._exposed.isdisjoint(v for v in call.outputs if v is not None):
            self._exposed.update(call.inputs)

    def watches(self, call: Call) -> bool:
        """Whether `look` does anything for this call."""
        return self._is_near_pole(call) or not self._exposed.isdisjoint(v for v in call.outputs if v is not None)

    def look(self, call: Call, group: Group, low: torch.dtype, results: Results, found: T) -> None:
        """Note an edge whose value is one rounding away from a pole, or whose error decides whether a later value is.

        Rounding this edge alone need not reach the pole: noise of other edges may move the value first.
        """
        risky: Results | None = None
        if not self.watches(call):
            return
        if self._is_near_pole(call) and (other := group.otherwise(low)) and self._reaches_pole(call, other):
            risky = other
        elif not self._exposed.isdisjoint(v for v in call.outputs if v is not None):
            several = [_moved(call, results, factor) for factor in (_SEVERAL, -_SEVERAL)]
            risky = next((moved for moved in several if self._reaches_pole(call, moved)), None)
        if risky is not None:
            self.at_risk.append((call, group, low, risky, found))
            sources = {(edge.input, edge.output) for edge in group.edges}
            self._exposed.update(value for value in call.inputs if value.sources & sources)

    def _is_near_pole(self, call: Call) -> bool:
        return bool(at_poles(call)) or any(v is not None and self._gradients.is_near_pole(v) for v in call.outputs)

    def _reaches_pole(self, call: Call, results: Results, tried: set[tuple[int, Value]] | None = None) -> bool:
        """Whether these results have new NaN or Inf, or make them where a pole reads them. No gradient shows that.

        tried: what was asked already, a reader and the input that changes: paths that meet again are followed once.
        """
        tried = set() if tried is None else tried
        for value, made in zip(call.outputs, results, strict=True):
            if value is None or not value.differentiable:
                continue
            if bool((~made.isfinite() & value.tensor.isfinite()).any()):
                return True
            leads = self._gradients.is_near_pole(value) or value in self._exposed
            for reader in value.readers if leads else ():
                on = self._is_near_pole(reader) or any(v in self._exposed for v in reader.outputs)
                if not on or (id(reader), value) in tried:
                    continue
                tried.add((id(reader), value))
                if self._reaches_pole(reader, reader.perform({value: made}), tried):
                    return True
        return False


def _moved(call: Call, results: Results, factor: float) -> Results:
    """The results of a call with `factor` times their error."""
    pairs = zip(call.outputs, results, strict=True)
    return tuple(
        r if v is None or not v.differentiable else v.tensor + factor * (r - v.tensor) for v, r in pairs
    )  # fmt: skip
