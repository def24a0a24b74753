"""What rounding does at each edge, in one batch: the true error where the tensor is read, then the gradient.

The tape is swept backwards, so the gradient g of the outputs is known at each call. For each tensor that the call
reads, the call is run again with that tensor rounded, which gives the error delta of its results. The outputs have
random signs, and each channel is divided by its own power. Then sum((g * delta)^2) is the noise-to-signal ratio at the
outputs, apart from the covariance of the errors (Hutchinson's estimator, with one draw).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from calibcast.calib.errors import first_line
from calibcast.calib.output_noise import channel_dimension, channel_power
from calibcast.calib.rounding_alone import changes, run_alone
from calibcast.calib.rounding_edges import Edge
from calibcast.calib.rounding_findings import Findings, Found
from calibcast.calib.rounding_gradients import Gradients, Grads
from calibcast.calib.rounding_groups import Group, Results, Rounder
from calibcast.calib.rounding_ledger import Error, Ledger, Note, energy, noise_energy, parts_of
from calibcast.calib.rounding_poles import PoleWatch
from calibcast.calib.rounding_table import MOST_OUTPUTS, OUTPUT
from calibcast.calib.rounding_tape import Call, Tape, Value
from calibcast.calib.twins import compares, selects

_log = logging.getLogger("calibcast")
LOW_TYPES = (torch.float16, torch.bfloat16)
# For each low type, runs of single edges may compute twice as many elements as a forward pass; 16 runs are always made.
_RUN_SHARE, _LEAST_RUNS = 2.0, 16
# Single numbers, such as the base of a power, are run as well where they make more noise than this, a hundredth of what
# the default budgets allow; until as many elements were computed as half a forward pass has.
LOUD = {torch.float16: 1e-6, torch.bfloat16: 2.5e-5}
_NUMBER_SHARE = 0.5


class Sweep:
    """One backward sweep over a tape."""

    def __init__(
        self,
        tape: Tape,
        edges: Mapping[str, Sequence[Edge]],
        rounder: Rounder,
        seed: int,
        coherent: bool = False,
    ) -> None:
        """edges: by reader. seed: for the random signs, and for which runs come first. coherent: the outputs are so few
        that errors add up in them, as those of one rounded number do (`noise_energy`).
        """
        self._coherent = coherent
        self._tape, self._edges, self._rounder, self._seed = tape, edges, rounder, seed
        self._outputs = [value for value in tape.outputs if value is not None]
        floating = sum(value.tensor.is_floating_point() for value in self._outputs)
        self._size = sum(v.tensor.numel() for call in tape.calls for v in call.outputs if v is not None)
        self._columns = len(self._outputs) if floating <= MOST_OUTPUTS else 1
        self._gradients = Gradients(tape)
        self._found: Findings = {}
        self._generators: dict[torch.device, torch.Generator] = {}
        self._signals: dict[Value, float] = {}
        self._ledger = Ledger()
        self._slopes: dict[tuple[Value, int], torch.Tensor] = {}
        self._waiting: list[tuple[Call, Group, torch.dtype, Found]] = []
        self._numbers: list[tuple[Call, Group, torch.dtype, Found]] = []
        self._lost: dict[tuple[Group, torch.dtype], Call] = {}  # groups in which something became NaN or Inf
        self._poles: PoleWatch[Found] = PoleWatch(self._gradients, _LEAST_RUNS, self._is_finite)

    def run(self) -> Findings:
        """What was found at each edge that the tape has, for each low type."""
        self._note_signals()
        for number, output in enumerate(self._outputs):
            if output.tensor.is_floating_point():
                self._begin(output, min(number, self._columns - 1))
        for call in reversed(self._tape.calls):
            edges = self._edges.get(call.name, ()) if call.node is not None else ()
            for value in call.outputs if edges else ():
                if value is not None:
                    self._gradients.lay_as(value)
            for group in self._rounder.groups(call, edges) if edges else ():
                for low in LOW_TYPES:
                    self._measure(call, group, low)
            self._poles.pass_on(call)
            self._gradients.pass_on(call)
            self._slopes.clear()
        self._ledger.settle()
        for low in LOW_TYPES:
            self._run_waiting([entry for entry in self._waiting if entry[2] == low])
        self._run_at_risk()
        for low in LOW_TYPES:
            self._run_numbers([entry for entry in self._numbers if entry[2] == low], LOUD[low])
        self._ledger.settle()
        self._run_apart()
        return self._found

    def _note_signals(self) -> None:
        """Note the energy of each value whose error is needed; it is not finite where the value is not."""

        def note(value: Value) -> Note:
            return lambda numbers: self._signals.update({value: numbers[0]})

        read = [value for call in self._tape.calls if call.name in self._edges for value in call.outputs]
        for value in dict.fromkeys([*read, *self._outputs]):
            if value is not None and value.differentiable:
                self._ledger.await_([energy(value.tensor)], note(value))
        self._ledger.settle()

    def _is_finite(self, value: Value) -> bool:
        return math.isfinite(self._signals.get(value, math.inf))

    def _begin(self, output: Value, column: int) -> None:
        """The gradient of <u, y / |y|> by channel, u being random signs, and what rounding the output itself does."""
        tensor, dimension = output.tensor, channel_dimension(output.tensor)
        power = channel_power(tensor)
        scale = torch.where(power > 0, (power * len(power)).rsqrt(), 0.0)
        shape = (
            [-1 if i == dimension else 1 for i in range(tensor.ndim)] if dimension is not None else [1] * tensor.ndim
        )
        signs = torch.randint(
            0, 2, tensor.shape, generator=self._generator(tensor.device), dtype=torch.int8, device=tensor.device
        )
        grad = (signs * 2 - 1) * scale.reshape(shape).to(tensor.dtype)
        self._gradients.add(output, column, grad)
        for edge in self._edges.get(OUTPUT, ()):
            if (edge.input, edge.output) in output.sources:
                for low in LOW_TYPES:
                    found, made = self._of(edge, low), self._rounder.remade(output, (edge,), low)
                    if made is not tensor:
                        self._take(
                            found,
                            Error(made, partial(self._rounder.remade, output, (edge,), low)),
                            output,
                            {column: grad},
                        )

    def _generator(self, device: torch.device) -> torch.Generator:
        """Of that device: drawing the signs of an encoder's output on the host costs more than three forward passes."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def _of(self, edge: Edge, low: torch.dtype) -> Found:
        found = self._found.setdefault((edge, low), Found([0.0] * self._columns))
        assert isinstance(found, Found)
        return found

    def _measure(self, call: Call, group: Group, low: torch.dtype) -> None:
        found = Found([0.0] * self._columns)
        if group.added is not None and not self._coherent and (value := self._smooth(call)) is not None:
            self._take_added(found, group.added(low), group.along, value)
            self._share_out(call, group, low, found)
            return
        try:
            results = group.results(low)
        except Exception as error:
            reason = f"it cannot be run on rounded inputs: {first_line(error)}"
            self._found |= {(edge, low): reason for edge in group.edges}
            return
        if results is not None:
            needs_run = self._look_at(found, call, group, low, results)
            if needs_run:
                self._waiting.append((call, group, low, found))
            self._poles.look(call, group, low, results, found)
            if group.coherent and not needs_run:
                self._numbers.append((call, group, low, found))
        self._share_out(call, group, low, found)

    def _look_at(self, found: Found, call: Call, group: Group, low: torch.dtype, results: Results) -> bool:
        """Take the errors of a call's results through the gradient. True where that is not enough."""
        needs_run = False
        twin = self._twin(call, group, low)
        for position, (value, made) in enumerate(zip(call.outputs, results, strict=True)):
            if value is None or not self._gradients.is_used(value):
                continue
            if value.differentiable:
                alone = len(results) == 1 and not self._gradients.steps_next(value) and not self._poles.watches(call)
                error = Error(
                    made, partial(_again, group, low, position), alone, coherent=group.coherent or self._coherent
                )
                self._take(found, error, value, self._gradients.of(value))
                needs_run |= self._gradients.is_cut(value)
                if self._gradients.steps_next(value):
                    needs_run |= self._step(found, value, made, twin)
            else:
                differ = int((made != value.tensor).sum())
                found.steps += differ
                needs_run |= differ > 0
        return needs_run

    def _twin(self, call: Call, group: Group, low: torch.dtype) -> Callable[[Value], torch.Tensor] | None:
        """Where a call picks elements: what rounds the tensor that they are compared with."""
        return partial(self._rounder.remade, edges=group.edges, low=low) if selects(call.node) else None

    def _take(self, found: Found, error: Error, value: Value, grads: Grads) -> None:
        """Add what the error of a value does, by its gradient. Elements that are not finite in fp32 are left out."""
        if not self._is_finite(value):
            self._take_finite(found, error.made, value, grads, error.counts)
            return
        signal, difference, columns = self._signals[value], error.difference(value.tensor), list(grads)
        again, counts = error.again, error.counts  # not `error`: `made` need not be held until the end
        sums = [energy(difference)]
        for number, column in enumerate(columns, 1):
            # In place, as fresh memory costs more than the product.
            last = number == len(columns) and grads[column].dtype == difference.dtype
            product = difference.mul_(grads[column]) if last else difference * grads[column]
            sums.append(noise_energy(product, error.coherent))

        def note(numbers: Sequence[float]) -> None:
            whole, *parts = numbers
            if math.isfinite(whole):
                if counts:  # not as a factor: 0 * inf is NaN
                    found.local += whole / signal if signal else math.inf if whole else 0.0
            else:
                self._take_finite(found, again(), value, {}, counts)
            for column, part in zip(columns, parts, strict=True):
                found.noise[column] += math.inf if math.isnan(part) else part
            if found.nonfinite:
                found.noise = [math.inf] * self._columns

        self._ledger.await_(sums, note)

    def _smooth(self, call: Call) -> Value | None:
        """The only result of a call, where the gradient alone tells what an error added to it does; else None."""
        value = call.outputs[0] if len(call.outputs) == 1 else None
        if value is None or not self._gradients.is_used(value):
            return None
        if not self._is_finite(value):
            return None
        beyond = self._gradients.steps_next(value) or self._gradients.is_cut(value) or self._poles.watches(call)
        return None if beyond else value

    def _take_added(self, found: Found, error: torch.Tensor, along: int, value: Value) -> None:
        """`_take` for an error [channels], constant along other dimensions: by the gradient's energy per channel."""
        grads, power = self._gradients.of(value), error.square()
        others = [i for i in range(value.tensor.ndim) if i != along % value.tensor.ndim]
        for column, grad in grads.items():
            if (value, column) not in self._slopes:
                self._slopes[value, column] = torch.linalg.vector_norm(grad, dim=others) ** 2 if others else grad**2
        columns = list(grads)
        sums = [power.sum(), *(torch.dot(self._slopes[value, column], power) for column in columns)]
        sums.append((~power.isfinite()).sum(dtype=power.dtype))
        each, signal = value.tensor.numel() / max(len(error), 1), self._signals[value]

        def note(numbers: Sequence[float]) -> None:
            whole, *parts, lost = numbers  # lost: how many channels
            found.local += whole * each / signal if signal else math.inf if whole else 0.0
            found.nonfinite += int(lost * each)
            for column, part in zip(columns, parts, strict=True):
                found.noise[column] += math.inf if lost or math.isnan(part) else part

        self._ledger.await_(sums, note)

    def _take_finite(self, found: Found, made: torch.Tensor, value: Value, grads: Grads, counts: bool = True) -> None:
        """`_take` for a value that has NaN or Inf, in fp32 or once rounded."""
        sound = value.tensor.isfinite()
        found.nonfinite += int((sound & ~made.isfinite()).sum())
        error = torch.where(sound & made.isfinite(), made - value.tensor, 0).double()
        whole, signal = float(energy(error)), float(energy(torch.where(sound, value.tensor, 0).double()))
        if counts:
            found.local += whole / signal if signal else math.inf if whole else 0.0
        for column, grad in grads.items():
            found.noise[column] += float(energy(error * grad))
        if found.nonfinite:
            found.noise = [math.inf] * self._columns

    def _step(
        self, found: Found, value: Value, made: torch.Tensor, twin: Callable[[Value], torch.Tensor] | None
    ) -> bool:
        """Look at the readers of a value, past movers, that may step. True where integers or booleans of one changed.

        twin: rounds the other side of a comparison, where `value` was picked from it. What changes there is left to the
        edges of the comparison: to round what was picked is the same as to pick from what is rounded.
        """
        needs_run = False
        for reader in value.readers:
            steps = self._gradients.is_step(reader)
            if not steps and not reader.mover:
                continue
            other = {v: twin(v) for v in reader.inputs} if twin is not None and compares(reader.node) else {}
            for output, stepped in changes(reader, reader.perform({**other, value: made})).items():
                if steps and not output.differentiable and self._gradients.is_used(output):
                    found.steps += int((stepped != output.tensor).sum())
                    needs_run |= not other
                elif steps and output.differentiable:
                    error = Error(stepped, partial(_given, stepped), counts=False)
                    self._take(found, error, output, self._gradients.of(output))
                if output.differentiable and self._gradients.steps_next(output):
                    needs_run |= self._step(found, output, stepped, twin)
        return needs_run

    def _run_waiting(self, waiting: Sequence[tuple[Call, Group, torch.dtype, Found]]) -> None:
        """Run the program for each edge whose gradient is not enough, as far as the budget goes."""
        first = len(waiting) * (self._seed % 4) // 4  # each batch begins elsewhere
        paid = _RUN_SHARE * self._size
        for number, (call, group, low, found) in enumerate([*waiting[first:], *waiting[:first]]):
            if paid <= 0 and number >= _LEAST_RUNS:
                reason = "it needs runs of its own, and more edges do than are run"
                self._found |= {(edge, low): reason for edge in group.edges}
                continue
            try:
                paid -= self._run_rounded(call, group, low, found)
            except Exception as error:
                reason = f"the program cannot be run with it rounded: {first_line(error)}"
                self._found |= {(edge, low): reason for edge in group.edges}

    def _run_rounded(self, call: Call, group: Group, low: torch.dtype, found: Found) -> int:
        """Run the program with a group rounded, and note what that does. Returns how many elements were computed."""
        results = group.results(low)
        assert results is not None
        noise, elements = run_alone(self._tape, call, results, self._twin(call, group, low))
        self._note_run(found, noise)
        self._share_out(call, group, low, found)
        return elements

    def _run_numbers(self, numbers: Sequence[tuple[Call, Group, torch.dtype, Found]], loud: float) -> None:
        """Run the program for single numbers that seem loud, the loudest first. Their errors have one sign, so the
        estimate by one draw is rough: they may add up, or vanish in a norm.
        """
        paid = _NUMBER_SHARE * self._size
        for call, group, low, found in sorted(numbers, key=lambda entry: -max(entry[3].noise)):
            if not loud < max(found.noise) < math.inf or paid <= 0:
                return
            try:
                paid -= self._run_rounded(call, group, low, found)
            except Exception as error:
                _log.debug("%s was not run with a number rounded: %s", call.name, first_line(error))

    def _run_at_risk(self) -> None:
        """Run the program with each value at its pole. Where it gives NaN or Inf, the noise of the edge is inf."""
        for call, group, low, results, found in self._poles.at_risk:
            try:
                noise, _ = run_alone(self._tape, call, results)
            except Exception as error:
                _log.debug("%s was not run near a pole: %s", call.name, first_line(error))
                continue
            if any(math.isinf(part) for part in noise):
                found.noise, found.ran = [math.inf] * self._columns, True
                self._share_out(call, group, low, found)

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
                    self._take_finite(found, made, value, {})
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

    def _share_out(self, call: Call, group: Group, low: torch.dtype, found: Found) -> None:
        """Give each edge its part when the sums are known: by the energy of each maker's rounding errors."""

        def note(numbers: Sequence[float]) -> None:
            lost = found.nonfinite or not all(map(math.isfinite, [*found.noise, *numbers]))
            self._lost.update({(group, low): call} if lost and group.apart else {})
            for edge, part in zip(group.edges, parts_of(numbers), strict=True):
                noise = [whole if math.isinf(whole) else part * whole for whole in found.noise]
                self._found[edge, low] = Found(noise, found.nonfinite, found.steps, found.local, found.ran)

        if len(group.edges) > 1:
            self._ledger.await_([self._rounder.energies(group, low)], note)
        else:
            self._ledger.await_([], lambda _: note([1.0]))


def _given(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _again(group: Group, low: torch.dtype, position: int) -> torch.Tensor:
    """A result of a group's call, computed once more."""
    made = group.results(low)
    assert made is not None
    return cast("torch.Tensor", made[position])
