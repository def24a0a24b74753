"""What rounding does at each edge, in one batch: the true error where the tensor is read, then the gradient.

The tape is swept backwards, so the gradient g of the outputs is known at each call. For each tensor that the call
reads, the call is run again with that tensor rounded, which gives the error delta of its results. The outputs have
random signs, and each channel is divided by its own power. Then sum((g * delta)^2) is the noise-to-signal ratio at the
outputs, apart from the covariance of the errors (Hutchinson's estimator, with one draw).

Steps (floor, argmax, comparisons) have no gradient. Edges next to one are run alone where they change it
(`rounding_runs`); what all errors in front of one do is foreseen afterwards (`rounding_step_sweep`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from calibcast.calib.errors import first_line
from calibcast.calib.output_noise import channel_dimension, channel_power
from calibcast.calib.rounding_alone import changes
from calibcast.calib.rounding_edges import Edge
from calibcast.calib.rounding_findings import Findings, Found
from calibcast.calib.rounding_gradients import Gradients, Grads
from calibcast.calib.rounding_groups import Group, Results, Rounder
from calibcast.calib.rounding_ledger import Error, Ledger, Sum, energy, noise_energy
from calibcast.calib.rounding_poles import PoleWatch
from calibcast.calib.rounding_runs import LEAST_RUNS, MeasuredGroup, Runs, take_finite
from calibcast.calib.rounding_sums import NUMBERS, sums_of
from calibcast.calib.rounding_table import MOST_OUTPUTS, OUTPUT
from calibcast.calib.rounding_tape import Call, Tape, Value
from calibcast.calib.twins import compares, selects

LOW_TYPES = (torch.float16, torch.bfloat16)


class Sweep:
    """One backward sweep over a tape. First `launch`: it asks the tape's device for everything. Then `finish`, for what
    the host decides by the numbers. Where the tape is a CUDA graph's, `finish` is called after each replay.
    """

    _is_second = False  # whether the tape was swept before, which uses up the autograd graphs of its calls

    def __init__(
        self,
        tape: Tape,
        edges: Mapping[str, Sequence[Edge]],
        rounder: Rounder,
        seed: int,
        coherent: bool = False,
        signs: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """edges: by reader. seed: for the random signs, and for which runs come first. coherent: the outputs are so few
        that errors add up in them, as those of one rounded number do (`noise_energy`).

        signs: the random signs of each floating-point output, to be drawn (`draw_signs`) before the device runs what
        was launched; such a sweep is a blind one, for which `launch` reads nothing from the device. It takes for
        granted that values are finite where it matters, and that none is one rounding away from a pole; `finish` tells
        whether that held.
        """
        self._coherent, self._blind = coherent, signs is not None
        self.tape, self.edges, self.rounder, self._seed = tape, edges, rounder, seed
        self._outputs = [value for value in tape.outputs if value is not None]
        if signs is None:
            signs = empty_signs([v.tensor for v in self._outputs])
            draw_signs(signs, seed)
        self._signs = iter(signs)
        floating = sum(value.tensor.is_floating_point() for value in self._outputs)
        self.columns = len(self._outputs) if floating <= MOST_OUTPUTS else 1
        self.gradients = Gradients(tape, asks=not self._blind, anew=self._is_second)
        self._refused: dict[tuple[Edge, torch.dtype], str] = {}
        self._direct: dict[tuple[Edge, torch.dtype], Found] = {}  # of the outputs' own edges
        self._measured: list[MeasuredGroup] = []
        self._signals: dict[Value, float] = {}
        self._whole: dict[Value, bool] = {}  # whether all elements are finite
        self._trusted: set[Value] = set()
        self._ledger = Ledger(self._blind)
        self._slopes: dict[tuple[Value, int], torch.Tensor] = {}
        self._poles: PoleWatch[Found] = PoleWatch(
            self.gradients, LEAST_RUNS, self._is_finite, self._ledger if self._blind else None
        )

    def run(self, then: Callable[[Findings], Findings] = lambda found: found) -> Findings:
        """What was found at each edge that the tape has, for each low type. The tape is used up. then: called with what
        was found before the tape is forgotten.
        """
        try:
            self.launch()
            found = self.finish(self._seed)
            assert found is not None, "only a blind sweep can be unsound"
            return then(found)
        finally:
            self.forget()

    def forget(self) -> None:
        """Let go of the tape and of all other tensors: the sweep is of no use then. It is in cycles with its notes."""
        self.tape.forget()
        vars(self).clear()

    def launch(self) -> None:
        """Ask the device for all sums. Unless the sweep is blind, the host waits for it here and there."""
        self._note_signals()
        for number, output in enumerate(self._outputs):
            if output.tensor.is_floating_point():
                self._begin(output, min(number, self.columns - 1))
        for call in reversed(self.tape.calls):
            edges = self.edges.get(call.name, ()) if call.node is not None and self._looks_at(call) else ()
            for value in call.outputs if edges else ():
                if value is not None:
                    self.gradients.lay_as(value)
            for group in self.rounder.groups(call, edges) if edges else ():
                for low in LOW_TYPES:
                    self._measure(call, group, low)
            self._poles.pass_on(call)
            self.gradients.pass_on(call)
            self._slopes.clear()
        self._ledger.gather()

    def finish(self, seed: int) -> Findings | None:
        """What was found, by the numbers that are on the device now. None for a blind sweep where what it took for
        granted does not hold in this batch.
        """
        for found in [*self._direct.values(), *(one.found for one in self._measured)]:
            found.clear()
        for one in self._measured:
            one.steps = False
        self._poles.suspects = False
        self._ledger.settle()
        if self._poles.suspects or not all(self._whole[value] for value in self._trusted):
            return None
        runs = Runs(self.tape, self.columns, seed, self._poles.at_risk, self._twin)
        return runs.findings(self._measured, {**self._refused, **self._direct})

    def _looks_at(self, call: Call) -> bool:
        """Whether the edges into a call are measured."""
        return True

    def _note_signals(self) -> None:
        """Note the energy of each value whose error is needed, and whether all of its elements are finite."""
        read = [value for call in self.tape.calls if call.name in self.edges for value in call.outputs]
        for value in dict.fromkeys([*read, *self._outputs]):
            if value is not None and value.differentiable:
                row = self._ledger.errors(value.tensor, None, None)
                self._ledger.await_([energy(value.tensor)] if row is None else [row], partial(self._note_signal, value))
        if not self._blind:
            self._ledger.settle()

    def _note_signal(self, value: Value, numbers: Sequence[float]) -> None:
        if len(numbers) == 1 and not math.isfinite(numbers[0]):
            numbers = sums_of(value.tensor, None, None).tolist()  # of what is finite
        self._signals[value], self._whole[value] = numbers[0], not numbers[-1] if len(numbers) > 1 else True

    def _is_finite(self, value: Value) -> bool:
        if self._blind:
            self._trusted.add(value)
            return value.differentiable
        return self._whole.get(value, False)

    def _begin(self, output: Value, column: int) -> None:
        """The gradient of <u, y / |y|> by channel, u being random signs, and what rounding the output itself does."""
        tensor, dimension = output.tensor, channel_dimension(output.tensor)
        power = channel_power(tensor)
        scale = torch.where(power > 0, (power * len(power)).rsqrt(), 0.0)
        shape = (
            [-1 if i == dimension else 1 for i in range(tensor.ndim)] if dimension is not None else [1] * tensor.ndim
        )
        grad = (next(self._signs) * 2 - 1) * scale.reshape(shape).to(tensor.dtype)
        self.gradients.add(output, column, grad)
        self._take_read(output, self.edges.get(OUTPUT, ()), {column: grad})

    def _take_read(self, value: Value, edges: Iterable[Edge], grads: Grads) -> None:
        """Take what rounding a value does to those that read it along these edges."""
        for edge in edges:
            if (edge.input, edge.output) in value.sources:
                for low in LOW_TYPES:
                    again = partial(self.rounder.remade, value, (edge,), low)
                    found, made = self._of(edge, low), again()
                    if made is not value.tensor:
                        self._take(found, Error(made, again), value, grads)

    def _of(self, edge: Edge, low: torch.dtype) -> Found:
        return self._direct.setdefault((edge, low), Found([0.0] * self.columns))

    def _measure(self, call: Call, group: Group, low: torch.dtype) -> None:
        one = MeasuredGroup(call, group, low, Found([0.0] * self.columns))
        if group.added is not None and not self._coherent and (value := self._smooth(call)) is not None:
            self._take_added(one.found, group.added(low), group.along, value)
            self._keep(one)
            return
        try:
            results = group.results(low)
        except Exception as error:
            reason = f"it cannot be run on rounded inputs: {first_line(error)}"
            self._refused |= {(edge, low): reason for edge in group.edges}
            return
        if results is not None:
            one.changes = True
            self._look_at(one, results)
            self._poles.look(call, group, low, results, one.found)
        self._keep(one)

    def _keep(self, one: MeasuredGroup) -> None:
        """Keep what was measured. Edges that were rounded together share it out by the energy of their errors."""
        self._measured.append(one)
        if len(one.group.edges) > 1:
            self._ledger.await_([self.rounder.energies(one.group, one.low)], one.note_energies)

    def _look_at(self, one: MeasuredGroup, results: Results) -> None:
        """Take the errors of a call's results through the gradient, and note where that is not enough."""
        call, group, low = one.call, one.group, one.low
        twin = self._twin(call, group, low)
        for position, (value, made) in enumerate(zip(call.outputs, results, strict=True)):
            if value is None or not self.gradients.is_used(value):
                continue
            if value.differentiable:
                alone = len(results) == 1 and not self.gradients.steps_next(value) and not self._poles.watches(call)
                error = Error(
                    made, partial(_again, group, low, position), alone, coherent=group.coherent or self._coherent
                )
                self._take(one.found, error, value, self.gradients.of(value))
                one.always |= self.gradients.is_cut(value)
                if self.gradients.steps_next(value):
                    self._step(one, value, made, twin)
            else:
                self._count(one, made, value, needs_run=True)

    def _count(self, one: MeasuredGroup, made: torch.Tensor, value: Value, needs_run: bool) -> None:
        """Count the integers or booleans that changed."""

        def note(numbers: Sequence[float]) -> None:
            one.found.steps += int(numbers[0])
            one.steps |= needs_run and numbers[0] > 0

        self._ledger.await_([(made != value.tensor).sum(dtype=torch.float64)], note)

    def _twin(self, call: Call, group: Group, low: torch.dtype) -> Callable[[Value], torch.Tensor] | None:
        """Where a call picks elements: what rounds the tensor that they are compared with."""
        return partial(self.rounder.remade, edges=group.edges, low=low) if selects(call.node) else None

    def _take(self, found: Found, error: Error, value: Value, grads: Grads) -> None:
        """Add what the error of a value does, by its gradient. Elements that are not finite in fp32 are left out."""
        if (rows := self._rows(error, value, grads)) is not None:
            self._ledger.await_(rows, partial(self._note_rows, found, value, list(grads), error.counts))
            return
        difference, columns = error.difference(value.tensor), list(grads)
        again, counts = error.again, error.counts  # not `error`: `made` need not be held until the end
        sums: list[Sum] = [energy(difference)]
        for number, column in enumerate(columns, 1):
            # In place, as fresh memory costs more than the product.
            last = number == len(columns) and grads[column].dtype == difference.dtype
            product = difference.mul_(grads[column]) if last else difference * grads[column]
            sums.append(noise_energy(product, error.coherent))

        def note(numbers: Sequence[float]) -> None:
            whole, *parts = numbers
            if math.isfinite(whole):
                if counts:
                    self._add_local(found, whole, value)
            else:
                take_finite(found, again(), value, {}, counts)
            for column, part in zip(columns, parts, strict=True):
                found.noise[column] += math.inf if math.isnan(part) else part
            if found.nonfinite:
                found.noise = [math.inf] * self.columns

        self._ledger.await_(sums, note)

    def _rows(self, error: Error, value: Value, grads: Grads) -> list[Sum] | None:
        """The sums of `_take` by one kernel for each column, where there is one for these tensors. Where the value may
        have elements that are not finite, such sums in any case, as they leave these out.
        """
        whole = self._is_finite(value) if error.coherent or not self._blind else False
        if error.coherent and whole:
            return None
        rows: list[Sum] = []
        for grad in grads.values() or [None]:
            row = self._ledger.errors(error.made, value.tensor, grad)
            if row is None and whole:
                return None
            rows.append(sums_of(error.made, value.tensor, grad) if row is None else row)
        return rows

    def _note_rows(
        self, found: Found, value: Value, columns: Sequence[int], counts: bool, numbers: Sequence[float]
    ) -> None:
        if counts:  # not as a factor: 0 * inf is NaN
            self._add_local(found, numbers[0], value)
        found.nonfinite += int(numbers[2])
        for column, part in zip(columns, numbers[1::NUMBERS], strict=False):
            found.noise[column] += math.inf if math.isnan(part) else part
        if found.nonfinite:
            found.noise = [math.inf] * self.columns

    def _add_local(self, found: Found, whole: float, value: Value) -> None:
        signal = self._signals[value]
        found.local += whole / signal if signal else math.inf if whole else 0.0

    def _smooth(self, call: Call) -> Value | None:
        """The only result of a call, where the gradient alone tells what an error added to it does; else None."""
        value = call.outputs[0] if len(call.outputs) == 1 else None
        if value is None or not self.gradients.is_used(value):
            return None
        if not self._is_finite(value):
            return None
        beyond = self.gradients.steps_next(value) or self.gradients.is_cut(value) or self._poles.watches(call)
        return None if beyond else value

    def _take_added(self, found: Found, error: torch.Tensor, along: int, value: Value) -> None:
        """`_take` for an error [channels], constant along other dimensions: by the gradient's energy per channel."""
        grads = self.gradients.of(value)
        for column, grad in grads.items():
            if (value, column) not in self._slopes:
                self._slopes[value, column] = channel_norms(grad, along % value.tensor.ndim)
        columns, each = list(grads), value.tensor.numel() / max(len(error), 1)
        sums: list[Sum] = []
        slopes: list[torch.Tensor | None] = [self._slopes[value, column] for column in columns]
        for slope in slopes or [None]:
            row = self._ledger.errors(error, None, slope)
            sums.append(sums_of(error, None, slope) if row is None else row)

        def note(numbers: Sequence[float]) -> None:
            lost = numbers[2]  # how many channels
            self._add_local(found, numbers[0] * each, value)
            found.nonfinite += int(lost * each)
            for column, part in zip(columns, numbers[1::NUMBERS], strict=False):
                found.noise[column] += math.inf if lost or math.isnan(part) else part

        self._ledger.await_(sums, note)

    def _step(
        self, one: MeasuredGroup, value: Value, made: torch.Tensor, twin: Callable[[Value], torch.Tensor] | None
    ) -> None:
        """Look at the readers of a value, past movers, that may step, and note where integers or booleans changed.

        twin: rounds the other side of a comparison, where `value` was picked from it. What changes there is left to the
        edges of the comparison: to round what was picked is the same as to pick from what is rounded.
        """
        for reader in value.readers:
            steps = self.gradients.is_step(reader)
            if not steps and not reader.mover:
                continue
            other = {v: twin(v) for v in reader.inputs} if twin is not None and compares(reader.node) else {}
            for output, stepped in self._stepped(reader, reader.perform({**other, value: made})):
                if steps and not output.differentiable and self.gradients.is_used(output):
                    self._count(one, stepped, output, needs_run=not other)
                elif steps and output.differentiable:
                    error = Error(stepped, partial(_given, stepped), counts=False)
                    self._take(one.found, error, output, self.gradients.of(output))
                if output.differentiable and self.gradients.steps_next(output):
                    self._step(one, output, stepped, twin)

    def _stepped(self, reader: Call, results: Results) -> Iterator[tuple[Value, torch.Tensor]]:
        """The results of a reader that changed; all of them where the host must not ask."""
        if not self._blind:
            yield from changes(reader, results).items()
            return
        for value, made in zip(reader.outputs, results, strict=True):
            if value is not None and isinstance(made, torch.Tensor):
                yield value, made


def channel_norms(tensor: torch.Tensor, along: int) -> torch.Tensor:
    """The norm of each channel, [channels]; along: their dimension. A host is slow at norms over several dimensions."""
    before, behind = list(range(along)), list(range(along + 1, tensor.ndim))
    if not before and not behind:
        return tensor.abs()
    if tensor.is_cuda:
        return cast("torch.Tensor", torch.linalg.vector_norm(tensor, dim=before + behind))
    if tensor.stride(along) == 1:  # channels lie side by side
        return tensor.square().sum(before + behind).sqrt()
    inner = torch.linalg.vector_norm(tensor, dim=behind) if behind else tensor.abs()
    return cast("torch.Tensor", torch.linalg.vector_norm(inner, dim=before) if before else inner)


def empty_signs(outputs: Iterable[Any], device: torch.device | None = None) -> list[torch.Tensor]:
    """Tensors for the random signs of a program's floating-point outputs, in order: 0 and 1. device: None for that of
    each output.
    """
    floating = [t for t in outputs if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return [torch.empty(t.shape, dtype=torch.int8, device=device or t.device) for t in floating]


def draw_signs(signs: Iterable[torch.Tensor], seed: int) -> None:
    """Draw random signs, on their own device: drawing those of an encoder's output on the host costs more than three
    forward passes.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for tensor in signs:
        if tensor.device not in generators:
            generators[tensor.device] = torch.Generator(tensor.device).manual_seed(seed)
        torch.randint(0, 2, tensor.shape, generator=generators[tensor.device], out=tensor)


def _given(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _again(group: Group, low: torch.dtype, position: int) -> torch.Tensor:
    """A result of a group's call, computed once more."""
    made = group.results(low)
    assert made is not None
    return cast("torch.Tensor", made[position])
