"""Sums and differences that leave less than rounding their operands takes: 400.05 - 400.10, pair by pair.

`storage` looks at one tensor, and is content with one that spreads from 0 to 400. Whether two such tensors are nearly
equal, element by element, only their difference shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from calibcast.calib.graph import base_op, producer_of
from calibcast.calib.operators import ADDS, HANDS_ON
from calibcast.passes.evidence import Evidence
from calibcast.passes.facts import Cancelled, TensorFacts
from calibcast.passes.number_formats import NumberFormat, format_of
from calibcast.passes.rules import rounded
from calibcast.passes.tensor_rules import LEAST_SQNR_DB, most_noise, rounding_noise
from torch import fx


def cancelled_nodes(names: Mapping[fx.Node, str], evidence: Evidence, low_type: torch.dtype) -> dict[str, Cancelled]:
    """By name: the sums and differences of which too little is left, and the nodes that made their operands.

    Those that made them too: an operand that is rounded where it is made stays so, and through views, products, powers
    and means the share that rounding takes is handed on.
    """
    found: dict[str, Cancelled] = {}
    seen: set[fx.Node] = set()
    for node, name in names.items():
        if node.op == "call_function" and base_op(node.target) in ADDS:
            decibels = _left(node, names, evidence, format_of(low_type))
            if decibels is not None and decibels < LEAST_SQNR_DB:
                left = Cancelled(name, evidence[name, 0].rms or 0.0, decibels)
                for concerned in (node, *_makers(node, seen)):
                    if concerned in names:
                        found.setdefault(names[concerned], left)
    return found


def _left(node: fx.Node, names: Mapping[fx.Node, str], evidence: Evidence, low: NumberFormat) -> float | None:
    """The result's mean square to that of its operands' rounding, dB; None where neither is known, or there is none."""
    result = evidence.get((names[node], 0))
    operands = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
    tensors = [_facts(argument, names, evidence) for argument in operands]
    known = [tensor for tensor in tensors if tensor is not None]
    if result is None or not result.rms or result.nonfinite or len(known) < 2:
        return None
    if any(t.rms is None or t.absmax is None or t.absmax > low.max or t.masked or t.nonfinite for t in known):
        return None  # `storage`, `mask` or `nonfinite` have seen it
    power, ratio = result.rms**2, 10 ** (LEAST_SQNR_DB / 10)
    if power >= ratio * sum(most_noise(tensor.rms or 0.0, low) for tensor in known):
        return None  # without a look at histograms, as nearly always
    noise = sum(_noise(tensor, low) for tensor in known)
    return 10 * math.log10(power / noise) if noise > 0 else None


def _noise(tensor: TensorFacts, low: NumberFormat) -> float:
    if tensor.min is not None and tensor.min == tensor.max:
        return (rounded(tensor.min, low) - tensor.min) ** 2  # of a constant, such as 1, it is known
    return rounding_noise(tensor, low)


def _facts(node: fx.Node, names: Mapping[fx.Node, str], evidence: Evidence) -> TensorFacts | None:
    producer, output = producer_of(node)
    return evidence.get((names.get(producer, producer.name), output or 0))


def _makers(node: fx.Node, seen: set[fx.Node]) -> Iterator[fx.Node]:
    """The nodes that made the operands, and those that made what they hand on; of all calls together each once."""
    waiting = list(node.all_input_nodes)
    while waiting:
        maker, _ = producer_of(waiting.pop())
        if maker in seen or maker.op != "call_function":
            continue
        seen.add(maker)
        yield maker
        if base_op(maker.target) in HANDS_ON:
            waiting.extend(maker.all_input_nodes)
