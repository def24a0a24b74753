"""A second sweep, from what steps read to the front: what each edge does to the outputs by changing steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from calibcast.calib.errors import first_line
from calibcast.calib.rounding_edges import Edge
from calibcast.calib.rounding_findings import Findings, Found
from calibcast.calib.rounding_ledger import parts_of
from calibcast.calib.rounding_steps import End, step_ends
from calibcast.calib.rounding_sweep import Sweep
from calibcast.calib.rounding_tape import Call, Tape, Value

_log = logging.getLogger("calibcast")
# What to multiply noise with: errors of float16 are 8 times smaller, and so is the noise that they make at a step, but
# their energy, which is what the sweep measures, is 64 times smaller.
_FACTOR = {torch.float16: 8.0, torch.bfloat16: 1.0}


def with_steps(sweep: Sweep, seed: int, found: Findings) -> Findings:
    """What a sweep has found, or what errors in front of steps are expected to do, where that is more. Overflow was
    seen by the first sweep. Where this fails, such as for lack of memory, the findings stay as they are. The sweep must
    not have been forgotten.
    """
    try:
        ends = step_ends(sweep.tape, sweep.gradients, sweep.rounder.weights, sweep.columns, seed)
        noises = _StepSweep(sweep, ends, seed).noise() if ends else {}
    except Exception as error:
        _log.warning("what errors do in front of steps was not measured: %s", first_line(error))
        return found
    for (edge, low), expected in noises.items():
        one = found.get((edge, low))
        if isinstance(one, Found):
            pairs = zip(one.noise, (_FACTOR[low] * part for part in expected), strict=True)
            one.noise = [max(seen, part) if math.isfinite(part) else seen for seen, part in pairs]
    return found


class _StepSweep(Sweep):
    """Goes by the gradient alone: what steps do was tried before it, and it begins with that."""

    _is_second = True

    def __init__(self, first: Sweep, ends: Sequence[End], seed: int) -> None:
        makers = {end.value.maker for end in ends}
        calls = first.tape.calls
        last = max(i for i, call in enumerate(calls) if call in makers)
        tape = Tape(calls[: last + 1], first.tape.made, [end.value for end in ends])
        super().__init__(tape, first.edges, first.rounder, seed)
        self.columns = first.columns
        self._ends = {end.value: end for end in ends}

    def noise(self) -> dict[tuple[Edge, torch.dtype], list[float]]:
        """The noise of each edge by column, before `_FACTOR`."""
        try:
            self.launch()
            self._ledger.settle()
            found = {key: one.noise for key, one in self._direct.items()}
            for one in self._measured:
                for edge, part in zip(one.group.edges, parts_of(one.energies), strict=True):
                    found[edge, one.low] = [part * whole for whole in one.found.noise]
            return found
        finally:
            vars(self).clear()  # but the tape, which is the first sweep's, keeps its tensors

    def _looks_at(self, call: Call) -> bool:
        """Not at steps: an error of theirs is a whole step, and what they read has a gradient of its own."""
        reached = any(value is not None and self.gradients.of(value) for value in call.outputs)
        return reached and not self.gradients.is_step(call)

    def _begin(self, output: Value, column: int) -> None:
        """The gradient in front of steps; and what rounding does that only these steps see."""
        end = self._ends[output]
        signs = next(self._signs) * 2 - 1
        grads = {
            place: (end.slope * weight**0.5).to(output.tensor.dtype)
            for place, weight in enumerate(end.weights)
            if weight
        }
        for place, grad in grads.items():
            self.gradients.add(output, place, signs * grad)
        self._take_read(
            output, dict.fromkeys(edge for step in end.steps for edge in self.edges.get(step.name, ())), grads
        )

    def _step(self, *_: object) -> None:
        """Nothing: steps were tried before."""
