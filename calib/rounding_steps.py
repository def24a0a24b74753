"""What errors in front of steps are expected to do: how often they change an index, a comparison, a rounded number.

One edge alone changes few steps, often none in the batches that are measured, and the gradient knows nothing of them.
All edges together change many. So what steps read is given random errors of a known size, larger than those of any
edge. The noise that the outputs then have, beyond what they have with the steps held, grows like the size of the
errors: twice the error reaches twice as many elements. From there to the front it is taken to grow with their energy.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from calibcast.calib.errors import first_line
from calibcast.calib.rounding_alone import changes, run_alone
from calibcast.calib.rounding_gradients import Gradients
from calibcast.calib.rounding_tape import Call, Tape, Value
from calibcast.calib.twins import selects

_log = logging.getLogger("calibcast")
# Standard deviation of the random errors, relative: what about five roundings to bfloat16 make (one: 2^-9.2).
_REFERENCE = 2.0**-8
# Less noise than this is passed over: it is within the default budgets with half the amplitude to spare (26 dB in
# bfloat16; 40 in float16, where it is 8 times less).
_LEAST = 2e-4
# The runs of a batch may compute twice as many elements as a forward pass; this many values are always tried.
_RUN_SHARE, _LEAST_TRIED = 2.0, 4


@dataclass(frozen=True)
class End:
    """A value that steps read, past movers. steps: these. slope: one over the size of the errors that were tried, 0
    where there was none. weights: by column, the noise that the steps then made, divided by the number of errors. So
    the noise of other errors is the sum of (slope * error)^2, times the weight.
    """

    value: Value
    steps: tuple[Call, ...]
    slope: torch.Tensor
    weights: tuple[float, ...]


def step_ends(tape: Tape, gradients: Gradients, weights: Collection[str], columns: int, seed: int) -> list[End]:
    """The values in which errors change steps so much that the floating-point outputs show it.

    What depends on no input of the user, such as the places of tokens, is the same in each batch: there, what was seen
    is all there is. weights: the names of inputs that are not the user's. columns: one for each output that is a
    tensor, or one for all of them.
    """
    steps = {call: None for call in tape.calls if gradients.is_step(call)}
    if not steps:
        return []
    waiting = list(_in_front(tape, steps, _varying(tape, weights)).items())
    first = len(waiting) * (seed % 4) // 4  # each batch begins elsewhere
    paid, found = _RUN_SHARE * tape.elements, list[End]()
    for number, (value, readers) in enumerate([*waiting[first:], *waiting[:first]]):
        if paid <= 0 and number >= _LEAST_TRIED:
            _log.debug("%d of %d values in front of steps were not tried", len(waiting) - number, len(waiting))
            break
        try:
            shares, size, elements = _tried(tape, value, readers, steps, columns, seed + number)
        except Exception as error:
            _log.debug("errors in front of %s were not tried: %s", readers[0].name, first_line(error))
            continue
        paid -= elements
        if any(shares):
            found.append(End(value, tuple(readers), torch.where(size > 0, 1 / size, 0.0), shares))
    return found


def _in_front(tape: Tape, steps: Collection[Call], varying: Collection[Value]) -> dict[Value, list[Call]]:
    """What steps read, and which steps do. What a step makes itself is left out: errors of it are whole steps, of which
    its own inputs tell.
    """
    found: dict[Value, list[Call]] = {}
    for call in steps:
        for value in _origins(call):
            if value in varying and value.maker not in steps:
                found.setdefault(value, []).append(call)
    return found


def _varying(tape: Tape, weights: Collection[str]) -> set[Value]:
    """The values that depend on the user's inputs, or on random numbers."""
    found = {value for (name, _), value in tape.made.items() if value.maker is None and name not in weights}
    for call in tape.calls:
        if call.random_state is not None or not found.isdisjoint(call.inputs):
            found.update(value for value in call.outputs if value is not None)
    return found


def _origins(call: Call) -> Iterator[Value]:
    """The computed numbers that a step reads, past movers and past what sorts or picks: errors of what was picked are
    those of what it was picked from. Not past a slice, of which the step reads only a part.
    """
    for value in call.inputs:
        while (before := _before(value)) is not None:
            value = before
        if value.computed and value.tensor.is_floating_point() and value.maker is not None:
            yield value


def _before(value: Value) -> Value | None:
    maker = value.maker
    if maker is None or len(maker.inputs) != 1:
        return None
    [source] = maker.inputs
    moved = maker.mover and (source.tensor.numel() <= value.tensor.numel() or _is_picked(source))
    return source if moved or selects(maker.node) else None


def _is_picked(value: Value) -> bool:
    while value.maker is not None and value.maker.mover and len(value.maker.inputs) == 1:
        value = value.maker.inputs[0]
    return value.maker is not None and selects(value.maker.node)


def _tried(
    tape: Tape, value: Value, readers: Sequence[Call], steps: Collection[Call], columns: int, seed: int
) -> tuple[tuple[float, ...], torch.Tensor, int]:
    """Run the program with errors in a value, with all steps free and with all held. The weights of an `End`, the size
    of the errors, and how many elements that took. No weight where steps do not matter.
    """
    assert value.maker is not None
    size = _size_of_errors(value.tensor)
    made = _with_errors(value.tensor, size, seed)
    weights, elements = [0.0] * columns, 0
    if _steps_change(tape, value, made, readers):
        results = tuple(made if v is value else None if v is None else v.tensor for v in value.maker.outputs)
        free, elements = _noise(tape, value.maker, results, columns)
        if max(free) > _LEAST:
            held, more = _noise(tape, value.maker, results, columns, steps)
            elements += more
            count = max(int((size > 0).sum()), 1)
            pairs = zip(free, held, strict=True)
            weights = [(a - b) / count if 2 * b < a < math.inf and a - b > _LEAST else 0.0 for a, b in pairs]
    return tuple(weights), size, elements


def _steps_change(tape: Tape, value: Value, made: torch.Tensor, readers: Sequence[Call]) -> bool:
    """Whether these steps give something else for `made` than for the value. Most masks never do."""
    assert value.maker is not None
    changed = {value: made}
    for call in tape.calls[tape.calls.index(value.maker) + 1 :]:
        if call not in readers and not call.mover and not selects(call.node):
            continue
        if any(v in changed for v in call.inputs):
            news = changes(call, call.perform(changed))
            if call in readers and news:
                return True
            changed |= news
    return False


def _noise(
    tape: Tape, call: Call, results: tuple[object, ...], columns: int, held: Collection[Call] = ()
) -> tuple[list[float], int]:
    """Noise by column, at floating-point outputs."""
    noise, elements = run_alone(tape, call, results, held=held)
    by_output = [
        part if output.differentiable else 0.0
        for part, output in zip(noise, tape.outputs, strict=True)
        if output is not None
    ]
    return (by_output if columns == len(by_output) else [sum(by_output)]), elements


def _size_of_errors(tensor: torch.Tensor) -> torch.Tensor:
    """The standard deviation of the errors of each element, in fp32 at least. A sum has errors like those of its terms,
    however small it is itself, so it is relative to the median magnitude at least. What is never negative stays so.
    Zeros, such as those of a ReLU, and infinities have none.
    """
    magnitude = tensor.abs().to(torch.promote_types(tensor.dtype, torch.float32))
    sound = (magnitude > 0) & magnitude.isfinite()
    known = magnitude[sound]
    if not known.numel():
        return torch.zeros_like(magnitude)
    size = _REFERENCE * torch.maximum(magnitude, known.median())
    if not (tensor < 0).any():
        size = torch.minimum(size, magnitude / 8)
    return torch.where(sound, size, 0.0)


def _with_errors(tensor: torch.Tensor, size: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator(tensor.device).manual_seed(seed)
    noise = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=size.dtype)
    return (tensor + size * noise).to(tensor.dtype)
