"""Runs of the program with one edge rounded, where the gradient of a sweep is not enough; and what each edge gets.

A sweep's sums are known here, so the host decides: which edges need a run, which single numbers are loud enough for
one, and which of several edges that were rounded together is to blame.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from calibcast.calib.errors import first_line
from calibcast.calib.rounding_alone import changes, run_alone
from calibcast.calib.rounding_edges import Edge
from calibcast.calib.rounding_findings import Findings, Found
from calibcast.calib.rounding_gradients import Grads
from calibcast.calib.rounding_groups import Group, Results
from calibcast.calib.rounding_ledger import parts_of
from calibcast.calib.rounding_sums import sums_of
from calibcast.calib.rounding_tape import Call, Tape, Value

_log = logging.getLogger("calibcast")
# For each low type, runs of single edges may compute twice as many elements as a forward pass; 16 runs are always made.
_RUN_SHARE, LEAST_RUNS = 2.0, 16
# Single numbers, such as the base of a power, are run as well where they make more noise than this, a hundredth of what
# the default budgets allow; until as many elements were computed as half a forward pass has.
LOUD = {torch.float16: 1e-6, torch.bfloat16: 2.5e-5}
_NUMBER_SHARE = 0.5
Twin = Callable[[Call, Group, torch.dtype], Callable[[Value], torch.Tensor] | None]


@dataclass(eq=False)
class MeasuredGroup:
    """What a sweep measured of a group of edges, for one low type.

    changes: rounding changes something. always: the gradient is not enough, in no batch. steps: integers changed.
    energies: of the edges' own errors, where there are several.
    """

    call: Call
    group: Group
    low: torch.dtype
    found: Found
    changes: bool = False
    always: bool = False
    steps: bool = False
    energies: Sequence[float] = field(default_factory=lambda: (1.0,))

    @property
    def needs_run(self) -> bool:
        return self.always or self.steps

    def note_energies(self, numbers: Sequence[float]) -> None:
        """Note the energies when they are known."""
        self.energies = tuple(numbers)


class Runs:
    """The runs for one batch. columns: of the noise. at_risk: edges near a pole, as `PoleWatch` gives them."""

    def __init__(
        self,
        tape: Tape,
        columns: int,
        seed: int,
        at_risk: Iterable[tuple[Call, Group, torch.dtype, Results, Found]],
        twin: Twin,
    ) -> None:
        self._tape, self._columns, self._seed = tape, columns, seed
        self._at_risk, self._twin = at_risk, twin
        self._size = tape.elements
        self._found: Findings = {}
        self._lost: dict[tuple[Group, torch.dtype], Call] = {}  # groups in which something became NaN or Inf

    def findings(
        self, measured: Sequence[MeasuredGroup], known: Mapping[tuple[Edge, torch.dtype], Found | str]
    ) -> Findings:
        """What was found at each edge, with the runs that are needed. known: of other edges."""
        self._found = dict(known)
        for one in measured:
            self._share_out(one)
        for low in LOUD:
            self._run_waiting([one for one in measured if one.low == low and one.needs_run])
        self._run_at_risk(measured)
        for low, loud in LOUD.items():
            numbers = [one for one in measured if one.group.coherent and one.changes and not one.needs_run]
            self._run_numbers([one for one in numbers if one.low == low], loud)
        self._run_apart()
        return self._found

    def _run_waiting(self, waiting: Sequence[MeasuredGroup]) -> None:
        """Run the program for each edge whose gradient is not enough, as far as the budget goes."""
        first = len(waiting) * (self._seed % 4) // 4  # each batch begins elsewhere
        paid = _RUN_SHARE * self._size
        for number, one in enumerate([*waiting[first:], *waiting[:first]]):
            if paid <= 0 and number >= LEAST_RUNS:
                reason = "it needs runs of its own, and more edges do than are run"
                self._found |= {(edge, one.low): reason for edge in one.group.edges}
                continue
            try:
                paid -= self._run_rounded(one)
            except Exception as error:
                reason = f"the program cannot be run with it rounded: {first_line(error)}"
                self._found |= {(edge, one.low): reason for edge in one.group.edges}

    def _run_rounded(self, one: MeasuredGroup) -> int:
        """Run the program with a group rounded, and note what that does. Returns how many elements were computed."""
        results = one.group.results(one.low)
        assert results is not None
        noise, elements = run_alone(self._tape, one.call, results, self._twin(one.call, one.group, one.low))
        self._note_run(one.found, noise)
        self._share_out(one)
        return elements

    def _run_numbers(self, numbers: Sequence[MeasuredGroup], loud: float) -> None:
        """Run the program for single numbers that seem loud, the loudest first. Their errors have one sign, so the
        estimate by one draw is rough: they may add up, or vanish in a norm.
        """
        paid = _NUMBER_SHARE * self._size
        for one in sorted(numbers, key=lambda number: -max(number.found.noise)):
            if not loud < max(one.found.noise) < math.inf or paid <= 0:
                return
            try:
                paid -= self._run_rounded(one)
            except Exception as error:
                _log.debug("%s was not run with a number rounded: %s", one.call.name, first_line(error))

    def _run_at_risk(self, measured: Sequence[MeasuredGroup]) -> None:
        """Run the program with each value at its pole. Where it gives NaN or Inf, the noise of the edge is inf."""
        entries = {id(one.found): one for one in measured}
        for call, _, _, results, found in self._at_risk:
            try:
                noise, _ = run_alone(self._tape, call, results)
            except Exception as error:
                _log.debug("%s was not run near a pole: %s", call.name, first_line(error))
                continue
            if any(math.isinf(part) for part in noise):
                found.noise, found.ran = [math.inf] * self._columns, True
                self._share_out(entries[id(found)])

    def _run_apart(self) -> None:
        """Where one of several edges that were rounded together overflows, or all of them make NaN or Inf, run the
        program with each alone: which of them does it, and what the others cost.
        """
        for (group, low), call in self._lost.items():
            for part in group.apart:
                self._found |= {(edge, low): self._alone(call, part, low) for edge in part.edges}

    def _alone(self, call: Call, group: Group, low: torch.dtype) -> Found | str:
        found = Found([0.0] * self._columns)
        try:
            if (results := group.results(low)) is not None:
                for value, made in changes(call, results).items():
                    take_finite(found, made, value, {})
                self._note_run(found, run_alone(self._tape, call, results)[0])
        except Exception as error:
            return f"the program cannot be run with it rounded: {first_line(error)}"
        if found.nonfinite:
            found.noise = [math.inf] * self._columns
        return found

    def _note_run(self, found: Found, noise: Sequence[float]) -> None:
        by_output = [
            (part, output) for part, output in zip(noise, self._tape.outputs, strict=True) if output is not None
        ]
        if self._columns == len(by_output):
            found.noise = [part for part, _ in by_output]
        else:  # the share of integers that changed is like an amplitude
            found.noise = [sum(part if output.differentiable else part**2 for part, output in by_output)]
        found.ran = True

    def _share_out(self, one: MeasuredGroup) -> None:
        """Give each edge its part: by the energy of each maker's rounding errors."""
        found, group, low = one.found, one.group, one.low
        lost = found.nonfinite or not all(map(math.isfinite, [*found.noise, *one.energies]))
        self._lost.update({(group, low): one.call} if lost and group.apart else {})
        for edge, part in zip(group.edges, parts_of(one.energies), strict=True):
            noise = [whole if math.isinf(whole) else part * whole for whole in found.noise]
            self._found[edge, low] = Found(noise, found.nonfinite, found.steps, found.local, found.ran)


def take_finite(found: Found, made: torch.Tensor, value: Value, grads: Grads, counts: bool = True) -> None:
    """Add what the error of a value does, where it has NaN or Inf, in fp32 or once rounded: these are left out, and
    what was finite is counted as lost.

    counts: it is a result of the reader itself, and counts in `local`.
    """
    rows = [sums_of(made, value.tensor, grad) for grad in grads.values() or [None]]
    [signal, *_], *sums = torch.stack([sums_of(value.tensor, None, None), *rows]).tolist()
    whole, _, lost = sums[0]
    found.nonfinite += int(lost)
    if counts:
        found.local += whole / signal if signal else math.inf if whole else 0.0
    for column, (_, part, _) in zip(grads, sums, strict=False):
        found.noise[column] += part
    if found.nonfinite:
        found.noise = [math.inf] * len(found.noise)
