"""Whether fp32 gives the same bits after rescaling: shown from the range table, before anything is rewritten.

A product with a power of two is exact while nothing overflows or goes subnormal. For tensors that follows from `absmax`
and `smallest`: the costs allow no exponent that takes a tensor out of the normal fp32 numbers, with 2^7 to spare above.
For values that are formed inside an operator:

- products under a sum may underflow where their sum is so much larger that nothing of them is left in it. A result of
  2^-78 or more is 2^48 times what is lost below 2^-126: beyond the 24 bits of two additions.
- an elementwise product that is to be stored larger than it was must not have underflowed to 0.
- sums of squares must stay below 2^126, and the variance or eps of a norm above 2^-78.

These conditions are shown for the data that calibration has seen; other data is checked by running both programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from calibcast.calib.graph import argument_of, base_op, producer_of, tensor_values
from calibcast.calib.operators import SQUARES, WORKS, operator_of
from calibcast.calib.operators.exponents import EQUATIONS
from calibcast.passes.rescaling.equations import implied
from calibcast.passes.rescaling.measures import Measures
from calibcast.passes.rescaling.rewriting import Exponents
from torch import fx

_MOST, _NORMAL, _ABSORBS = 2.0**126, 2.0**-126, 2.0**-78


@dataclass(frozen=True)
class Refusal:
    """A node around which nothing is rescaled, and why."""

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


def refusals(measures: Measures, exponents: Exponents) -> list[Refusal]:
    """The nodes at which these exponents are not shown to be exact."""
    found: list[Refusal] = []
    for node in measures.program.graph.nodes:
        if node.op == "call_function":
            found.extend(Refusal(node.name, reason) for reason in _reasons(node, measures, exponents))
    return found


def _reasons(node: fx.Node, measures: Measures, exponents: Exponents) -> Iterator[str]:
    base = base_op(node.target)
    out = exponents.tensors.get((node.name, 0), 0)
    k = [_exponent(n, node, exponents) for n in node.all_input_nodes]
    if not out and not any(k):
        return
    if base in WORKS:
        least = _least(measures, node, 0)
        if least is not None and least * 2.0 ** -max(out, 0) < _ABSORBS:
            yield f"its results go down to {least:.3g}, and products that underflow may show in them"
    elif out < 0 and _multiplies(base):
        yield from _vanishing(node, measures)
    if base in SQUARES and k and k[0]:
        yield from _squares(node, base, measures, k[0])


def _vanishing(node: fx.Node, measures: Measures) -> Iterator[str]:
    least = [_least(measures, *_source(n)) for n in node.all_input_nodes]
    known = [value for value in least if value]
    if len(known) == 2 and known[0] * known[1] < _NORMAL:
        yield f"products down to {known[0] * known[1]:.3g} underflow"


def _squares(node: fx.Node, base: str, measures: Measures, k: int) -> Iterator[str]:
    largest = measures.largest.get(node.name)
    if largest is None or not largest * 4.0**-k < _MOST:
        yield f"its sum of squares would reach 2^126 at 2^{-k}"
    name = operator_of(base).epsilon
    if name:
        eps = argument_of(node, name)
        eps = implied(node, name) if eps is None else eps
        least = max(float(eps or 0.0), measures.least.get(node.name, 0.0))
        if least * 4.0 ** -max(k, 0) < _ABSORBS:
            yield f"its variance of {least:.3g} would go below 2^-78 at 2^{-k}"


def _multiplies(base: str) -> bool:
    """Whether exponents add up, element by element."""
    return "+" in EQUATIONS.get(base, "")


def _source(node: fx.Node) -> tuple[fx.Node, int]:
    maker, output = producer_of(node)
    return maker, output or 0


def _exponent(node: fx.Node, reader: fx.Node, exponents: Exponents) -> int:
    maker, output = _source(node)
    if reader.name in exponents.readers.get(maker.name, ()):
        return exponents.tensors.get((f"{maker.name}_rescaled", 0), 0)
    return exponents.tensors.get((maker.name, output), 0)


def _least(measures: Measures, node: fx.Node, output: int) -> float | None:
    """The smallest nonzero magnitude; None where all is 0 or nothing was seen."""
    row = measures.rows.get((node.name, output)) if tensor_values(node) else None
    return None if row is None or not measures.smallest[row] > 0 else float(measures.smallest[row])
