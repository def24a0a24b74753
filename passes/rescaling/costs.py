"""What each exponent would cost, tensor by tensor, from the measurements. Costs only propose; plans decide."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from calibcast.calib.graph import argument_at, base_op, input_kinds
from calibcast.calib.operators import ADDS, SQUARES, SUMS, operator_of
from calibcast.passes.number_formats import NumberFormat
from calibcast.passes.rescaling.measures import Array, Measures
from calibcast.passes.rescaling.rewriting import SUFFIX, Exponents
from calibcast.passes.rescaling.system import Form, Number, Solutions, System, Tensor
from torch import fx

REACH = 64  # exponents from -64 to 64
EXPONENTS: Array = np.arange(-REACH, REACH + 1)
IMPOSSIBLE = 1e6
# Limits of fp32 itself: room above for data that calibration has not seen, and only normal numbers below.
_MOST, _LEAST = 2.0**120, 2.0**-126
WHOLE_LOSS = 20.0  # dB: a tensor whose rounding noise grows by this costs as much as one in fp32
ABSORBED = 2.0**11  # an eps is lost in float16 beside a value that is this many times larger


@dataclass(frozen=True)
class Costs:
    """One way of weighing. limit: a magnitude above it keeps a node in fp32. floor: weight of the noise that rounding
    adds below the smallest normal number, where a node in fp32 weighs 1."""

    limit: float
    floor: float


@dataclass(frozen=True)
class CostTable:
    """The cost of each linear form of exponents: [forms, 129] over `EXPONENTS`."""

    forms: list[Form]
    costs: Array


@dataclass(frozen=True)
class _Place:
    """A tensor as it is read: the node that made it, and its readers. summed: only sums read it."""

    name: str
    readers: frozenset[str]
    summed: bool


class CostReader:
    """Makes cost tables of one program, for any weighing. What is slow to read is read once."""

    def __init__(self, measures: Measures, low: NumberFormat) -> None:
        self._measures, self._low = measures, low
        self._excess = _excess(measures.histograms, low) if measures.histograms is not None else None
        self._readers = {n.name: [u.name for u in n.users] for n in measures.program.graph.nodes}
        self._nodes = {n.name: n for n in measures.program.graph.nodes}
        kinds = input_kinds(measures.program)
        self._weights = {name for name, kind in kinds.items() if kind != "input"}
        self._vectors = self._weights - set(measures.weights)

    def table(self, solutions: Solutions, costs: Costs) -> CostTable:
        """The costs of all tensors and numbers, added up where their exponents are the same form."""
        found: dict[Form, Array] = defaultdict(lambda: np.zeros(len(EXPONENTS)))
        for variable, kind in enumerate(solutions.system.kinds):
            form = solutions.forms[variable]
            if not form or kind is None:
                continue
            if isinstance(kind, Number):
                found[form] += self._number(kind, kind.node in solutions.system.breaks)
            else:
                found[form] += self._tensor(kind, costs, self._place(kind, solutions.system))
        forms = list(found)
        rows = np.stack([found[form] for form in forms]) if forms else np.zeros((0, len(EXPONENTS)))
        return CostTable(forms, rows + 1e-9 * np.abs(EXPONENTS))

    def _place(self, kind: Tensor, system: System) -> _Place:
        name = system.breaks.get(kind.node)
        if name is not None:
            readers = system.readers[name]
            return _Place(name, readers, self._only_sums(readers))
        readers = frozenset(self._readers.get(kind.node, ())) - system.readers.get(kind.node, frozenset())
        return _Place(kind.node, readers, kind.node in self._measures.summed)

    def loss_db(self, exponents: Exponents, low: frozenset[str]) -> float:
        """By how many dB rounding noise grows, at the tensor where it grows most, as values fall below the normal ones.

        low: nodes that run in the low type. Addends do not count: only their effect on the sum matters.
        """
        worst = 0.0
        for (node, output), k in exponents.tensors.items():
            name = node.removesuffix(SUFFIX) if node not in self._nodes else node
            place = self._place_after(name, exponents, node != name)
            row = self._measures.rows.get((name, output))
            if row is not None and abs(k) <= REACH and (name in low or place.readers & low):
                lost = self._lost(place, row, name in self._weights)
                worst = max(worst, float(lost[k + REACH] - lost[REACH]) * WHOLE_LOSS)
        return worst

    def _place_after(self, name: str, exponents: Exponents, product: bool) -> _Place:
        of_product = exponents.readers.get(name, frozenset())
        if product:
            return _Place(name, of_product, self._only_sums(of_product))
        return _Place(name, frozenset(self._readers.get(name, ())) - of_product, name in self._measures.summed)

    def _only_sums(self, readers: frozenset[str]) -> bool:
        return all(base_op(self._nodes[n].target) in ADDS for n in readers)

    def _tensor(self, kind: Tensor, costs: Costs, place: _Place) -> Array:
        measures, name = self._measures, place.name
        row = measures.rows.get((name, kind.output))
        impossible = np.where(EXPONENTS == 0, 0.0, IMPOSSIBLE)
        if row is None or math.isnan(measures.absmax[row]) or measures.bin_zero[row] > 0:
            return impossible
        most, least = measures.absmax[row], measures.smallest[row]
        if most == 0.0:
            return np.zeros(len(EXPONENTS))
        scale = np.exp2(-EXPONENTS.astype(np.float64))
        result = np.where((most * scale <= _MOST) & (least * scale >= _LEAST) | (EXPONENTS == 0), 0.0, IMPOSSIBLE)
        weight = sum(measures.importance[n] for n in place.readers) + measures.importance[name]
        is_weight = name in self._weights
        limit = self._low.max if is_weight else costs.limit
        result = result + weight * (most * scale > limit)
        found: Array = result + costs.floor * weight * self._lost(place, row, is_weight) + self._inside(place, scale)
        return found

    def _lost(self, place: _Place, row: int, is_weight: bool) -> Array:
        """How far the rounding noise is above that of normal numbers: 0 for none, 1 at 20 dB, at most 2."""
        measures, name = self._measures, place.name
        if name in self._vectors or place.summed:
            return np.zeros(len(EXPONENTS))
        if is_weight:
            faintest = float(measures.weights[name].min()) if measures.weights[name].size else 0.0
            step = (self._low.smallest_normal * self._low.eps) ** 2
            normal = faintest * self._low.eps**2
            ratio = 1 + step * np.exp2(2.0 * EXPONENTS) / normal if normal else np.ones(len(EXPONENTS))
        elif self._excess is None:
            return np.zeros(len(EXPONENTS))
        else:
            ratio = self._excess[row]
        lost: Array = np.clip(10 * np.log10(np.maximum(ratio, 1.0)) / WHOLE_LOSS, 0.0, 2.0)
        return lost

    def _inside(self, place: _Place, scale: Array) -> Array:
        """The cost of overflow in what readers form inside from this tensor alone: sums, and sums of squares."""
        found = np.zeros(len(EXPONENTS))
        for reader in place.readers:
            largest, base = self._measures.largest.get(reader), base_op(self._nodes[reader].target)
            if largest is None or base not in SUMS | SQUARES:
                continue
            inside = largest * (scale**2 if base in SQUARES else scale)
            found += self._measures.importance[reader] * (inside > self._low.max)
        return found

    def _number(self, kind: Number, added: bool) -> Array:
        scale = np.exp2(-EXPONENTS.astype(np.float64))
        value = np.abs(kind.value) * scale
        result = np.where((value >= _LEAST) & (value <= 2.0**127), 0.0, IMPOSSIBLE)
        if added:
            behind = kind.node.removesuffix("_rescaled")
            return result + np.where(EXPONENTS == 0, 0.0, 1e-3 + 0.1 * self._measures.importance.get(behind, 0.0))
        node = self._nodes[kind.node]
        if self._absorbed(kind, node):
            return result
        lost = ~((value <= self._low.max) & (value >= self._low.smallest_normal))
        counts = operator_of(base_op(node.target)).says("literals")
        cost: Array = result + self._measures.importance[kind.node] * lost * counts
        return cost

    def _absorbed(self, kind: Number, node: fx.Node) -> bool:
        """Whether the number is added to a tensor that is always so much larger that the number does not matter."""
        if base_op(node.target) in ADDS:
            first = argument_at(node, 0)
            row = self._measures.rows.get((first.name, 0)) if isinstance(first, fx.Node) else None
            return row is not None and bool(self._measures.smallest[row] >= ABSORBED * abs(kind.value))
        return False


def _excess(histograms: Array, low: NumberFormat) -> Array:
    """By tensor and exponent: mean squared rounding error, divided by that of a type without a smallest number."""
    exponents = np.arange(1, 255) - 127.0
    least = np.exp2(exponents)
    normal = (least * low.eps) ** 2
    found = np.ones((len(histograms), len(EXPONENTS)))
    inner = histograms[:, 1:255]
    whole = inner @ normal
    step = (low.smallest_normal * low.eps) ** 2
    for place, k in enumerate(EXPONENTS):
        subnormal = exponents - k < math.log2(low.smallest_normal)
        # A value below the step is lost entirely, and the error is no more than that.
        noise = np.where(subnormal, np.minimum(step * 4.0**k, 48.0 * least**2), normal)
        found[:, place] = (inner @ noise) / np.where(whole > 0, whole, 1.0)
    return found
