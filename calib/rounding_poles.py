"""Finds values one rounding away from a pole, such as a 0 / 0: neither a gradient nor a single edge shows that."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from calibcast.calib.rounding_gradients import Gradients, at_poles
from calibcast.calib.rounding_groups import Group, Results
from calibcast.calib.rounding_ledger import Ledger, on_host
from calibcast.calib.rounding_tape import Call, Value

# Near a pole an edge is tried with this many times its own error, as other edges like it may add theirs.
_SEVERAL = 4.0
T = TypeVar("T")


@dataclass(frozen=True)
class _Asked(Generic[T]):
    """Whether an edge is at risk, as the device will tell. doubts: not finite where it may be."""

    group: Group
    low: torch.dtype
    found: T
    doubts: list[torch.Tensor]


class PoleWatch(Generic[T]):
    """Collects edges near a pole while a tape is swept backwards, each with the results that reach the pole.

    at_risk: the call, its group, the low type, those results, and what the sweep found for it. Only the last `most` are
    kept: these come first in the program. exposed: values whose error decides whether a pole is reached.
    """

    def __init__(
        self, gradients: Gradients, most: int, is_finite: Callable[[Value], bool], ledger: Ledger | None = None
    ) -> None:
        """is_finite: whether all elements of a value are known to be finite in fp32. ledger: where to ask the device,
        when the host must not wait for it: then `suspects` says later whether an edge may be at risk.
        """
        self._gradients, self._is_finite, self._ledger = gradients, is_finite, ledger
        self.suspects = False
        self._exposed: set[Value] = set()
        self._asked: list[_Asked[T]] = []
        self.at_risk: deque[tuple[Call, Group, torch.dtype, Results, T]] = deque(maxlen=most)

    def pass_on(self, call: Call) -> None:
        """Note the edges of a call that were at risk. Where a mover's result is exposed, its inputs are, too.

        The host waits for a GPU once for the call, not once for each tensor that was looked at.
        """
        asked, self._asked = self._asked, []
        if asked and self._ledger is not None:
            self._ledger.await_([doubt.reshape(1) for entry in asked for doubt in entry.doubts], self._note_doubts)
        elif asked:
            doubts = iter(on_host([doubt.reshape(1) for entry in asked for doubt in entry.doubts]))
            for entry in asked:
                if not all([math.isfinite(next(doubts)[0]) for _ in entry.doubts]):
                    self._look_closely(call, entry)
        if call.mover and self._is_exposed(call):
            self._exposed.update(call.inputs)

    def _note_doubts(self, doubts: Sequence[float]) -> None:
        self.suspects |= not all(map(math.isfinite, doubts))

    def watches(self, call: Call) -> bool:
        """Whether `look` does anything for this call."""
        return self._is_near_pole(call) or self._is_exposed(call)

    def look(self, call: Call, group: Group, low: torch.dtype, results: Results, found: T) -> None:
        """Ask whether the value of an edge is one rounding away from a pole, or its error decides whether a later is.

        Rounding this edge alone need not reach the pole: noise of other edges may move the value first.
        """
        tried = self._tried(call, group, low, results) if self.watches(call) else ()
        ahead = [pair for moved in tried for pair in self._ahead(call, moved, set())]
        if ahead:
            doubts = [_doubt(value, made, self._is_finite(value)) for value, made in ahead]
            self._asked.append(_Asked(group, low, found, doubts))

    def _look_closely(self, call: Call, asked: _Asked[T]) -> None:
        """Note an edge that reaches a pole: a sum that is not finite only raises the question."""
        group, low = asked.group, asked.low
        if (results := group.results(low)) is None:
            return
        for moved in self._tried(call, group, low, results):
            if any(bool(_lost(value, made)) for value, made in self._ahead(call, moved, set())):
                self.at_risk.append((call, group, low, moved, asked.found))
                sources = {(edge.input, edge.output) for edge in group.edges}
                self._exposed.update(value for value in call.inputs if value.sources & sources)
                return

    def _tried(self, call: Call, group: Group, low: torch.dtype, results: Results) -> Iterator[Results]:
        """Results of a call with its error, and with it the other way, where a pole is near; with several times it."""
        if self._is_near_pole(call):
            yield results
            if other := group.otherwise(low):
                yield other
        if self._is_exposed(call):
            yield from (_moved(call, results, factor) for factor in (_SEVERAL, -_SEVERAL))

    def _is_exposed(self, call: Call) -> bool:
        return not self._exposed.isdisjoint(v for v in call.outputs if v is not None)

    def _is_near_pole(self, call: Call) -> bool:
        return bool(at_poles(call)) or any(v is not None and self._gradients.is_near_pole(v) for v in call.outputs)

    def _ahead(
        self, call: Call, results: Results, tried: set[tuple[int, Value]]
    ) -> Iterator[tuple[Value, torch.Tensor]]:
        """These results, and what the readers at a pole make of them. No gradient shows NaN or Inf there.

        tried: what was asked already, a reader and the input that changes: paths that meet again are followed once.
        """
        for value, made in zip(call.outputs, results, strict=True):
            if value is None or not value.differentiable:
                continue
            yield value, made
            leads = self._gradients.is_near_pole(value) or value in self._exposed
            for reader in value.readers if leads else ():
                if self.watches(reader) and (id(reader), value) not in tried:
                    tried.add((id(reader), value))
                    yield from self._ahead(reader, reader.perform({value: made}), tried)


def _lost(value: Value, made: torch.Tensor) -> torch.Tensor:
    """Whether an element became NaN or Inf, a tensor without dimensions."""
    return (~made.isfinite() & value.tensor.isfinite()).any()


def _doubt(value: Value, made: torch.Tensor, is_finite: bool) -> torch.Tensor:
    """A number that is finite only where no element became NaN or Inf; one kernel where `value` is all finite."""
    if not is_finite:
        return torch.where(_lost(value, made), math.inf, 0.0)
    return (torch.view_as_real(made) if made.is_complex() else made).sum(dtype=torch.float32)


def _moved(call: Call, results: Results, factor: float) -> Results:
    """The results of a call with `factor` times their error."""
    pairs = zip(call.outputs, results, strict=True)
    return tuple(
        r if v is None or not v.differentiable else v.tensor + factor * (r - v.tensor) for v, r in pairs
    )  # fmt: skip
