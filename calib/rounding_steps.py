"""What errors in front of steps are expected to do: how often they change an index, a comparison, a rounded number.

One edge alone changes few steps, often none in the batches that are measured, and the gradient knows nothing of them.
All edges together change many. So what steps read is given random errors of a known size, larger than those of any
edge. The noise that the outputs then have, beyond what they have with the steps held, grows like the size of the
errors: twice the error reaches twice as many elements. From there to the front it is taken to grow with their energy.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from calibcast.calib.errors import first_line
from calibcast.calib.rounding_alone import run_alone
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


def step_ends(tape: Tape, gradients: Gradients, columns: int, seed: int) -> list[End]:
    """The values in which errors change steps so much that the floating-point outputs show it.

    columns: one for each output that is a tensor, or one for all of them.
    """
    steps = {call: None for call in tape.calls if gradients.is_step(call)}
    reading: dict[Value, list[Call]] = {}
    for call in steps:
        for value in _origins(call):  # errors of what a step makes are whole steps, of which its own inputs tell
            if value.maker not in steps:
                reading.setdefault(value, []).append(call)
    size = sum(v.tensor.numel() for call in tape.calls for v in call.outputs if v is not None)
    paid, found = _RUN_SHARE * size, list[End]()
    for number, (value, readers) in enumerate(reading.items()):
        if paid <= 0 and number >= _LEAST_TRIED:
            _log.debug("%d of %d values in front of steps were not tried", len(reading) - number, len(reading))
            break
        try:
            weights, slope, elements = _tried(tape, value, steps, columns, seed + number)
        except Exception as error:
            _log.debug("errors in front of %s were not tried: %s", readers[0].name, first_line(error))
            continue
        paid -= elements
        if any(weights):
            found.append(End(value, tuple(readers), slope, weights))
    return found


def _origins(call: Call) -> Iterator[Value]:
    """The computed numbers that a step reads, past movers. What was sorted or picked is left out: its errors are those
    of what it was picked from, and alone it would no longer be one of these.
    """
    for value in call.inputs:
        while value.maker is not None and value.maker.mover and len(value.maker.inputs) == 1:
            value = value.maker.inputs[0]
        real = value.computed and value.tensor.is_floating_point()
        if real and value.maker is not None and not selects(value.maker.node):
            yield value


def _tried(
    tape: Tape, value: Value, steps: Collection[Call], columns: int, seed: int
) -> tuple[tuple[float, ...], torch.Tensor, int]:
    """Run the program with errors in a value, with all steps free and with all held. The weights and the slope of an
    `End`, and how many elements that took. No weight where steps do not matter.
    """
    assert value.maker is not None
    size = _size_of_errors(value.tensor)
    made = _with_errors(value.tensor, size, seed)
    results = tuple(made if v is value else None if v is None else v.tensor for v in value.maker.outputs)
    free, elements = _noise(tape, value.maker, results, columns)
    weights = [0.0] * columns
    if max(free) > _LEAST:
        held, more = _noise(tape, value.maker, results, columns, steps)
        elements += more
        count = max(int((size > 0).sum()), 1)
        pairs = zip(free, held, strict=True)
        weights = [(a - b) / count if 2 * b < a < math.inf and a - b > _LEAST else 0.0 for a, b in pairs]
    return tuple(weights), torch.where(size > 0, 1 / size, 0.0), elements


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
    """The standard deviation of the errors of each element. A sum has errors like those of its terms, however small it
    is itself, so it is relative to the median magnitude at least. Zeros, such as those of a ReLU, and infinities stay.
    """
    magnitude = tensor.abs()
    sound = (magnitude > 0) & magnitude.isfinite()
    known = magnitude[sound]
    typical = known.median() if known.numel() else magnitude.new_zeros(())
    return torch.where(sound, _REFERENCE * torch.maximum(magnitude, typical), 0.0)


def _with_errors(tensor: torch.Tensor, size: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator(tensor.device).manual_seed(seed)
    return tensor + size * torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
