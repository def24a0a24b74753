"""Run a program once more with rounding at one place only: only what depends on that place is computed again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from calibcast.calib.graph import base_op
from calibcast.calib.operators import STEPS
from calibcast.calib.output_noise import channel_noise
from calibcast.calib.rounding_tape import Call, Tape, Value
from calibcast.calib.twins import compares


def run_alone(
    tape: Tape,
    call: Call,
    results: tuple[object, ...],
    twin: Callable[[Value], torch.Tensor] | None = None,
    held: Collection[Call] = (),
) -> tuple[list[float], int]:
    """The noise at each output of the program (0 for one that is not a tensor), and how many elements were computed.

    results: what `call` gives, rounded at one place. twin: rounds the other side of a comparison with what `call` picks
    from it. held: calls whose steps stay what they were: which element they pick, what they round to. Raises
    RuntimeError and the like where a node refuses its inputs.
    """
    changed = changes(call, results)
    elements = 0
    for later in tape.calls[tape.calls.index(call) + 1 :]:
        if not any(value in changed for value in later.inputs) or not any(later.outputs):
            continue
        if later in held and later.node is not None and base_op(later.node.target) in STEPS:
            continue
        others = {v: twin(v) for v in later.inputs} if twin is not None and compares(later.node) else {}
        given = later.perform({**others, **changed})
        elements += sum(r.numel() for r in given if isinstance(r, torch.Tensor))
        news = changes(later, given)
        changed |= {v: made for v, made in news.items() if v.differentiable} if later in held else news
    return [_noise(changed, output) for output in tape.outputs], elements


def changes(call: Call, results: tuple[object, ...]) -> dict[Value, torch.Tensor]:
    """The results of a call that are not what they were."""
    return {
        value: made
        for value, made in zip(call.outputs, results, strict=True)
        if value is not None and isinstance(made, torch.Tensor) and not torch.equal(made, value.tensor)
    }


def _noise(changed: Mapping[Value, torch.Tensor], output: Value | None) -> float:
    if output is None or output not in changed:
        return 0.0
    return float(channel_noise(changed[output], output.tensor).mean())
