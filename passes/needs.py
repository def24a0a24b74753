"""Tensors that rounding makes too noisy for their readers: 400.05 - 400.10, the angles of a sine, 1 - p.

The rule `storage` looks at one tensor by itself. This module reads the graph from its end to its beginning. The result
of every node must keep `LEAST_DB`, which limits the noise of its arguments. Where rounding makes an argument noisier
than that, the nodes that make and read it stay high, and these nodes need more exact arguments in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import getitem

import torch
from calibcast.calib.graph import argument_of, base_op, producer_of
from calibcast.calib.operators import MOVES, operator_of
from calibcast.passes.evidence import Evidence
from calibcast.passes.facts import Lost, TensorFacts
from calibcast.passes.number_formats import NumberFormat, format_of
from calibcast.passes.rules import rounded
from calibcast.passes.tensor_rules import LEAST_SQNR_DB, median_noise, most_noise, rounding_noise
from calibcast.passes.transmission import Need, Seen, asked_of_arguments
from torch import fx

# The least SQNR, dB, of a result whose arguments are rounded. float16: the default budget of a plan. bfloat16: what
# `storage` asks of every tensor, since the default budget of 26 dB would keep angles high for an error of 6%.
LEAST_DB = {"float16": 40.0, "bfloat16": LEAST_SQNR_DB}


def lost_nodes(
    names: Mapping[fx.Node, str],
    evidence: Evidence,
    least: Mapping[str, float | None],
    channels: Callable[[fx.Node], float | None],
    low_type: torch.dtype,
) -> dict[str, Lost]:
    """The nodes, by name, that read or make a tensor that rounding makes too noisy.

    least: by name, the least variance inside a norm. channels: for a batch norm, the largest ratio of mean square to
    variance.
    """
    seen = Seen(
        lambda node: _facts(node, names, evidence), lambda node: least.get(names.get(node, node.name)), channels
    )
    return _Walk(names, seen, format_of(low_type)).run()


class _Walk:
    """One walk from the end of a graph to its beginning. `_asked`: for each node, the tightest need of its readers."""

    def __init__(self, names: Mapping[fx.Node, str], seen: Seen, low: NumberFormat) -> None:
        self._names, self._seen, self._low = names, seen, low
        self._least = LEAST_DB[low.name]
        self._share = 10 ** (-self._least / 10)
        self._asked: dict[fx.Node, Need] = {}
        self._found: dict[str, Lost] = {}

    def run(self) -> dict[str, Lost]:
        for node in reversed([node for node in self._names if node.op == "call_function"]):
            need = self._asked.get(node)
            if node.target is getitem:
                if need is not None and _moves(node.args[0]):
                    self._ask(node.args[0], need)  # type: ignore[arg-type]
                continue
            self._look_at_numbers(node, need)
            for x, wanted in asked_of_arguments(node, need, self._own(node), self._seen, self._share):
                self._judge(node, x, wanted)
        return self._found

    def _own(self, node: fx.Node) -> Need | None:
        facts = self._seen.facts(node)
        return Need(self._names[node], noise=facts.rms**2 * self._share) if facts is not None and facts.rms else None

    def _judge(self, reader: fx.Node, x: fx.Node, need: Need) -> None:
        facts = self._seen.facts(x)
        if facts is None or facts.rms is None or facts.is_weight or facts.masked or facts.nonfinite:
            return  # the rule `mask` or `nonfinite` covers it
        if facts.absmax is None or facts.absmax > self._low.max:
            return  # the rule `storage` covers it
        excess = self._excess(reader, facts, need)
        if excess <= 1.0 and not need.forced:
            if math.isfinite(need.share) or need.firm:
                self._ask(x, need)
            return
        self._lose(reader, need, excess)
        maker, _ = producer_of(x)
        if maker.op == "call_function":
            self._lose(maker, need, excess)
        self._ask(x, replace(need, firm=True, forced=_moves(maker)))

    def _excess(self, reader: fx.Node, facts: TensorFacts, need: Need) -> float:
        """The rounding noise of a tensor, as a multiple of what `need` allows: above 1 is too much."""
        if facts.min == facts.max:
            noise = (rounded(facts.min or 0.0, self._low) - (facts.min or 0.0)) ** 2
            return noise / need.noise if need.noise > 0 else math.inf if noise else 0.0
        by_share = self._low.eps**2 / 24 / need.share if need.share > 0 else math.inf
        if most_noise(facts.rms or 0.0, self._low) <= need.noise:
            return by_share
        if operator_of(base_op(reader.target)).centred:
            noise = median_noise(facts, self._low)
        else:
            noise = rounding_noise(facts, self._low, need.most)
        return max(by_share, noise / need.noise if need.noise > 0 else math.inf)

    def _lose(self, node: fx.Node, need: Need, excess: float) -> None:
        if node in self._names:
            decibels = self._least - 10 * math.log10(excess) if excess > 0 else self._least
            self._found.setdefault(self._names[node], Lost(need.asked, decibels, self._least))

    def _ask(self, x: fx.Node, need: Need) -> None:
        known = self._asked.get(x)
        if known is not None:
            floor = need.floor if math.isinf(known.share) else known.floor
            noise, share = min(known.noise, need.noise), min(known.share, need.share)
            tighter = need if need.noise < known.noise or need.share < known.share else known
            most = max(known.most, need.most)
            need = Need(tighter.asked, noise, most, share, floor, True, known.forced or need.forced)
        self._asked[x] = need

    def _look_at_numbers(self, node: fx.Node, need: Need | None) -> None:
        """Judge the numbers in a call, which are rounded like tensors: a guard such as 1 - 1e-4 may vanish, and 0.99^t
        loses more the larger t is."""
        entry = operator_of(base_op(node.target))
        for name in entry.literals if need is not None and math.isfinite(need.noise) else ():
            value = argument_of(node, name)
            if isinstance(value, (int, float)) and math.isfinite(value) and need is not None:
                self._look_at_number(node, float(value), need.noise, need)
        if entry.powers and isinstance(node.args[0], (int, float)) and isinstance(node.args[1], fx.Node):
            exponent, base = self._seen.facts(node.args[1]), float(node.args[0])
            if exponent is not None and exponent.absmax and base > 0:
                own = Need(self._names[node])
                self._look_at_number(node, base, self._share * (base / exponent.absmax) ** 2, own)

    def _look_at_number(self, node: fx.Node, value: float, noise: float, need: Need) -> None:
        error = (rounded(value, self._low) - value) ** 2
        if math.isfinite(error) and error > noise:
            self._lose(node, need, error / max(noise, error * 1e-30))


def _facts(node: fx.Node, names: Mapping[fx.Node, str], evidence: Evidence) -> TensorFacts | None:
    producer, output = producer_of(node)
    return evidence.get((names.get(producer, producer.name), output or 0))


def _moves(node: object) -> bool:
    return isinstance(node, fx.Node) and base_op(node.target) in MOVES
