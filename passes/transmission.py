"""How much noise the arguments of a node may have, so that its result has no more noise than allowed.

Computed to first order from the measured tensors. How an operator passes on an error is said by its entry in the table
of operators, not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from calibcast.calib.graph import argument_at, base_op, size_hint
from calibcast.calib.hidden import is_pool
from calibcast.calib.operators import MOVES, Operator, Pole, operator_of
from calibcast.calib.operators import operator as terms
from calibcast.passes.facts import TensorFacts
from calibcast.passes.reductions import depth_of_reduction
from torch import fx

_PRODUCTS = frozenset({terms.MATRIX, terms.CONVOLUTION, terms.TRANSPOSED, terms.CONTRACTION})
# The least distance to a pole: smaller ones are not told apart.
_LEAST = 1e-12
# Arguments of exp below minus this hardly count: e^-4 is 2%.
_TOP = 4.0


@dataclass(frozen=True)
class Need:
    """The error that a tensor may have.

    noise: a mean square error that all elements may have. most: larger elements may have more. share: the square of the
    relative error that each element may have; rounding is a relative error, so only a share below that of rounding
    counts. floor: elements below it may be off by the share of it. asked: the name of the node that needs this. firm:
    the need does not depend on the size of the result, and is passed on to what the tensor is made of. forced: the
    tensor stays high whatever its own noise, because a node that only moves it does.
    """

    asked: str
    noise: float = math.inf
    most: float = math.inf
    share: float = math.inf
    floor: float = 0.0
    firm: bool = False
    forced: bool = False


@dataclass(frozen=True)
class Seen:
    """What is known beside the graph. facts: of the tensor of a node. least: by node, the least variance that a norm
    divides by. channels: for a batch norm, the largest ratio of mean square to variance among its channels."""

    facts: Callable[[fx.Node], TensorFacts | None]
    least: Callable[[fx.Node], float | None]
    channels: Callable[[fx.Node], float | None]


def asked_of_arguments(
    node: fx.Node, need: Need | None, own: Need | None, seen: Seen, share: float
) -> Iterator[tuple[fx.Node, Need]]:
    """What `node` needs of its arguments.

    need: what its readers need of its result. own: what its result needs by itself; None where it has no floating-point
    result. share: the square of the relative error that a result may have.
    """
    entry = operator_of(base_op(node.target))
    for wanted in (own, need):
        if wanted is not None:
            yield from _through(node, entry, wanted, seen, wanted is own)
    name = need.asked if need is not None else own.asked if own is not None else node.name
    yield from _by_itself(node, entry, Need(name, firm=True), seen, share)


def _through(node: fx.Node, entry: Operator, need: Need, seen: Seen, is_own: bool) -> Iterator[tuple[fx.Node, Need]]:
    if entry.name in MOVES or entry.converts:
        if not is_own:
            yield from ((n, need) for n in node.all_input_nodes)
    elif entry.adds:
        yield from _added(node, need, seen)
    elif entry.product in _PRODUCTS:
        yield from _multiplied(node, entry, need, seen)
    elif entry.hides == terms.SUM:
        yield from _summed(node, entry, need, seen)
    elif entry.error == terms.SHARE:
        yield from _scaled(node, need, seen)
    elif entry.error == terms.EXPONENT:
        yield from _exponent(node, need, seen)
    elif entry.error == terms.LOGARITHM:
        yield from _logarithm(node, need, seen)
    elif entry.slopes or entry.error == terms.SAME:
        yield from _as_large(node, entry, need, seen, is_own)


def _by_itself(node: fx.Node, entry: Operator, need: Need, seen: Seen, share: float) -> Iterator[tuple[fx.Node, Need]]:
    """The needs that do not depend on that of the result: steps, orders, poles, offsets that a norm removes."""
    first = _tensor(node, 0)
    facts = seen.facts(first) if first is not None else None
    if first is not None and facts is not None and facts.rms is not None:
        deviation = max(0.0, facts.rms**2 - (facts.mean or 0.0) ** 2)
        if entry.error == terms.STEP or _becomes_integer(node, entry):
            yield first, replace(need, noise=share / 4 * _step(node, seen) ** 2)
        elif entry.error == terms.ORDER and deviation > 0:
            yield first, replace(need, noise=share * deviation)
        elif entry.centred and (least := seen.least(node)) is not None and _are_far_from_zero(node, facts, least):
            yield first, replace(need, noise=share * least)
        elif entry.variance_at is not None and (ratio := seen.channels(node)) is not None:
            yield first, replace(need, noise=share * facts.rms**2 / (1 + ratio))
    if entry.places is not None and first is not None and (grid := _tensor(node, entry.places)) is not None:
        width = max(size_hint(size) for size in first.meta["val"].shape[2:])
        yield grid, replace(need, noise=share * (2 / width) ** 2)
    for pole in entry.poles:
        yield from _near(node, entry, pole, need, seen, share)


def _are_far_from_zero(node: fx.Node, facts: TensorFacts, least: float) -> bool:
    """Whether the slice of least variance has an offset, to which rounding is relative. A slice around zero would have
    more elements that are so small."""
    length = depth_of_reduction(node, base_op(node.target))
    if facts.histogram is None or not length or not 0 < least < math.inf:
        return least < math.inf
    small = min(254, max(0, math.frexp(4 * math.sqrt(least))[1] + 126))
    return sum(facts.histogram[: small + 1]) < length / 2


def _near(
    node: fx.Node, entry: Operator, pole: Pole, need: Need, seen: Seen, share: float
) -> Iterator[tuple[fx.Node, Need]]:
    x = _tensor(node, pole.argument)
    facts = seen.facts(x) if x is not None else None
    exponent = None if pole.exponent is None else argument_at(node, pole.exponent)
    regular = pole.exponent is not None and not (isinstance(exponent, (int, float)) and exponent < 0)
    if x is None or facts is None or facts.min is None or facts.max is None or regular:
        return
    if pole.at == 0.0:
        if entry.error != terms.LOGARITHM:
            yield x, replace(need, share=share, floor=facts.smallest or 0.0)
        return
    inside = facts.min < pole.at < facts.max
    distance = 0.0 if inside else min(abs(facts.min - pole.at), abs(facts.max - pole.at))
    # Beyond twice the pole, elements are at least half their magnitude away from it, and rounding is relative to that.
    yield x, replace(need, noise=max(share * distance**2, _LEAST**2), most=2 * abs(pole.at))


def _added(node: fx.Node, need: Need, seen: Seen) -> Iterator[tuple[fx.Node, Need]]:
    """Operands that do not cancel may have the relative error of the sum; operands that cancel, its absolute error."""
    operands = [argument_at(node, position) for position in (0, 1)]
    signs = {_sign(operand, seen) for operand in operands}
    takes = not operator_of(base_op(node.target)).hands_on or not _plus(node)
    cancels = len(signs) > 1 or 0 in signs if not takes else len(signs) < 2 or 0 in signs
    wanted = replace(need, floor=_floor(node, need, seen))
    if cancels and not math.isinf(need.share):
        wanted = _absolute(node, need, seen)
    for operand, other in (operands, operands[::-1]):
        if isinstance(operand, fx.Node):  # beyond this the sum is above `need.most`, whatever the other operand is
            yield operand, replace(wanted, most=need.most + _largest(other, seen))


def _largest(value: Any, seen: Seen) -> float:
    if isinstance(value, (int, float)):
        return abs(value)
    facts = seen.facts(value) if isinstance(value, fx.Node) else None
    return math.inf if facts is None or facts.absmax is None else facts.absmax


def _plus(node: fx.Node) -> bool:
    alpha = node.kwargs.get("alpha", 1)
    return not operator_of(base_op(node.target)).subtracts and not (isinstance(alpha, (int, float)) and alpha < 0)


def _sign(value: Any, seen: Seen) -> int:
    """1 or -1 where all its elements have that sign or are 0; else 0."""
    facts = seen.facts(value) if isinstance(value, fx.Node) else None
    least, most = (value, value) if isinstance(value, (int, float)) else (-1, 1)
    if facts is not None and facts.min is not None and facts.max is not None:
        least, most = facts.min, facts.max
    return 1 if least >= 0 else -1 if most <= 0 else 0


def _absolute(node: fx.Node, need: Need, seen: Seen) -> Need:
    """A relative need as a mean square error: the share of the smallest magnitude in the result of `node`."""
    if math.isinf(need.share):
        return replace(need, most=math.inf)
    noise = need.share * _floor(node, need, seen) ** 2
    return replace(need, noise=min(need.noise, noise), most=math.inf, share=math.inf, floor=0.0)


def _floor(node: fx.Node, need: Need, seen: Seen) -> float:
    """The smallest magnitude in the result of `node` for which a relative error counts."""
    facts = seen.facts(node)
    return max(need.floor, (facts.smallest or 0.0) if facts is not None else 0.0)


def _multiplied(node: fx.Node, entry: Operator, need: Need, seen: Seen) -> Iterator[tuple[fx.Node, Need]]:
    """In a sum of n products of x and w, the noise of x becomes n w^2 times as large."""
    places = (1, 2) if entry.fresh_of_several or entry.left else (0, 1)
    operands = [argument_at(node, place) for place in places]
    if entry.fresh_of_several:
        operands = list(argument_at(node, 1)) if len(argument_at(node, 1)) == 2 else []
    tensors = [x for x in operands if isinstance(x, fx.Node)]
    terms_summed = depth_of_reduction(node, entry.name) or _contracted(node, tensors)
    if len(tensors) < 2 or terms_summed is None:
        return
    positive = all(_sign(x, seen) == 1 for x in tensors)
    wanted = need if positive and not math.isinf(need.share) else _absolute(node, need, seen)
    for x, other in (tensors, tensors[::-1]):
        facts = seen.facts(other)
        if facts is not None and facts.rms:
            gain = terms_summed * facts.rms**2
            floor = _floor(node, need, seen) / math.sqrt(gain)
            yield x, replace(wanted, noise=wanted.noise / gain, most=math.inf, floor=floor, firm=False)


def _contracted(node: fx.Node, tensors: list[fx.Node]) -> int | None:
    """How many products an `einsum` of two operands sums into each element; None where its equation does not say."""
    equation = node.args[0]
    if not isinstance(equation, str) or "->" not in equation or "." in equation or len(tensors) != 2:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    sizes: dict[str, int] = {}
    for letters, x in zip(inputs.split(","), tensors, strict=True):
        sizes.update(zip(letters, (size_hint(size) for size in x.meta["val"].shape), strict=True))
    return math.prod(size for letter, size in sizes.items() if letter not in output)


def _summed(node: fx.Node, entry: Operator, need: Need, seen: Seen) -> Iterator[tuple[fx.Node, Need]]:
    x, count = _tensor(node, 0), depth_of_reduction(node, entry.name)
    if x is None or not count:
        return
    gain = 1 / count if entry.averages or is_pool(entry.name) else float(count)
    wanted = need if _sign(x, seen) else _absolute(node, need, seen)
    floor = _floor(node, need, seen) / math.sqrt(gain)
    yield x, replace(wanted, noise=wanted.noise / gain, most=math.inf, floor=floor, firm=False)


def _scaled(node: fx.Node, need: Need, seen: Seen) -> Iterator[tuple[fx.Node, Need]]:
    """In products and quotients, the result has the relative error of an argument; in x^n, n times that."""
    result, entry = seen.facts(node), operator_of(base_op(node.target))
    power = argument_at(node, 1) if entry.powers else entry.power
    if isinstance(node.args[0], (int, float)) and isinstance(power, fx.Node):  # a number to the power of a tensor
        if node.args[0] > 0 and node.args[0] != 1 and result is not None and result.rms:
            share = min(need.share, need.noise / result.rms**2)
            yield power, Need(need.asked, noise=share / math.log(node.args[0]) ** 2, firm=True)
        return
    steep = _steepness(power, seen) * math.sqrt(_factors(node) if entry.multiplies else 1)
    for x in node.all_input_nodes:
        facts = seen.facts(x)
        if facts is None or not facts.rms or result is None or not result.rms:
            continue
        scaled = need.noise * facts.rms**2 / result.rms**2 / steep**2
        floor = _floor(node, need, seen) * facts.rms / result.rms
        if isinstance(power, (int, float)) and power != 1:
            floor = _floor(node, need, seen) ** (1 / power) if power > 0 else 0.0
        yield x, replace(need, noise=scaled, most=math.inf, share=need.share / steep**2, floor=floor)


def _factors(node: fx.Node) -> int:
    """How many elements a product along a dimension, or over all, multiplies at most."""
    shape = [size_hint(size) for size in node.all_input_nodes[0].meta["val"].shape]
    dim = argument_at(node, 1)
    return shape[dim] if isinstance(dim, int) and shape else math.prod(shape)


def _steepness(power: Any, seen: Seen) -> float:
    if isinstance(power, (int, float)):
        return max(abs(power), 1.0)
    facts = seen.facts(power) if isinstance(power, fx.Node) else None
    return 1.0 if facts is None or facts.absmax is None else max(1.0, facts.absmax)


def _exponent(node: fx.Node, need: Need, seen: Seen) -> Iterator[tuple[fx.Node, Need]]:
    """exp(x + e) is exp(x) (1 + e)."""
    x, result = _tensor(node, 0), seen.facts(node)
    if x is not None and result is not None and result.rms:
        steep = 1 + (result.absmax or 0.0) ** 2 if operator_of(base_op(node.target)).poles else 1.0
        facts = seen.facts(x)
        # Elements far below the largest become almost 0, whatever their error.
        most = max(_TOP, facts.max) if facts is not None and facts.max is not None else math.inf
        share = need.share if math.isfinite(need.share) else need.noise / result.rms**2
        yield x, Need(need.asked, noise=share / steep, most=most if math.isinf(need.share) else math.inf, firm=True)


def _angle(node: fx.Node, need: Need, seen: Seen) -> Iterator[tuple[fx.Node, Need]]:
    """An error of the vector, relative to its length, is one of the angle. Where the angle may be pi, y must have the
    right sign, so its own smallest magnitude counts. Elsewhere the length does, at least the larger smallest one.
    """
    y, x = _tensor(node, 0), _tensor(node, 1)
    share = min(_absolute(node, need, seen).noise, 0.25)
    known = {n: seen.facts(n) for n in (y, x) if n is not None}
    least = {n: (facts.smallest or 0.0) for n, facts in known.items() if facts is not None}
    length = max(least.values(), default=0.0)
    turns = x is None or (facts := known.get(x)) is None or facts.min is None or facts.min < 0
    for n, smallest in least.items():
        yield n, Need(need.asked, share=share, floor=smallest if n is y and turns else length)


def _logarithm(node: fx.Node, need: Need, seen: Seen) -> Iterator[tuple[fx.Node, Need]]:
    if operator_of(base_op(node.target)).angle:
        yield from _angle(node, need, seen)
        return
    x = _tensor(node, 0)
    facts = seen.facts(x) if x is not None else None
    if x is not None and facts is not None:
        share = min(_absolute(node, need, seen).noise, 0.25)
        yield x, Need(need.asked, share=share, floor=facts.smallest or 0.0)


def _as_large(node: fx.Node, entry: Operator, need: Need, seen: Seen, is_own: bool) -> Iterator[tuple[fx.Node, Need]]:
    # What is picked may be far smaller than the rest, as the least distance is, and has the absolute error of the rest.
    if is_own and not (entry.error == terms.SAME and (entry.takes_offset or entry.selects)):
        return
    keeps = entry.hands_on or entry.masks
    wanted = replace(need, floor=_floor(node, need, seen)) if keeps else _absolute(node, need, seen)
    # An angle may be off by so much, however large it is.
    if (entry.takes_offset and not entry.hides) or (is_own and entry.selects):
        wanted = replace(wanted, firm=True)
    yield from ((x, wanted) for x in node.all_input_nodes)


def _step(node: fx.Node, seen: Seen) -> float:
    """The distance between two steps: 1, or the divisor."""
    divisor = argument_at(node, 1)
    if isinstance(divisor, fx.Node):
        facts = seen.facts(divisor)
        return 1.0 if facts is None or not facts.rms else facts.rms
    return abs(float(divisor)) if isinstance(divisor, (int, float)) and divisor else 1.0


def _becomes_integer(node: fx.Node, entry: Operator) -> bool:
    value = node.meta.get("val")
    return entry.converts and isinstance(value, torch.Tensor) and not value.dtype.is_floating_point


def _tensor(node: fx.Node, position: int) -> fx.Node | None:
    value = argument_at(node, position)
    return value if isinstance(value, fx.Node) else None
