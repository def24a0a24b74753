"""Which nodes a budget of rounding noise keeps in fp32, and the sentences that say why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import getitem

from calibcast.calib.graph import base_op
from calibcast.calib.operators import operator_of
from calibcast.calib.rounding_edges import literals_of
from calibcast.calib.rounding_table import LITERAL, OUTPUT
from calibcast.passes.proof import EdgeCost, RoundingSummary
from calibcast.passes.rounding_course import MARGIN, Course, Step, noise_of
from calibcast.passes.rounding_evidence import LOST, MeasuredEdge
from calibcast.passes.verdict import Verdict
from torch import fx

# Least SQNR at each output channel, dB: in float16 a hundredth of the amplitude is noise, in bfloat16 a twentieth.
DEFAULT_BUDGETS = {"float16": 40.0, "bfloat16": 26.0}
WORST_EDGES = 10


def allowance_of(min_sqnr_db: float, margin: float = MARGIN) -> float:
    """The noise-to-signal power that a plan may be predicted to make for this budget."""
    return float(margin**2 * 10 ** (-min_sqnr_db / 10))


def budget_of(allowance: float, margin: float = MARGIN) -> float:
    """The budget, dB, that has this allowance, the inverse of `allowance_of`: inf for none, -inf for any noise."""
    return decibels(allowance / margin**2)


def decibels(noise: float) -> float:
    """Signal to noise in dB."""
    return math.inf if noise <= 0 else -math.inf if noise >= LOST else -10 * math.log10(noise)


@dataclass(frozen=True)
class RoundingPlan:
    """The nodes that a course keeps in fp32 at one budget.

    allowance: predicted noise that is allowed; `allowance_of(budget)` unless a run has shown that it must be another.
    peaks: the largest true magnitude of each tensor, by (node, output). nodes: those of the program, by name, for the
    numbers in their calls. others: the dB that other low types can give, by name; known only where noise is spread.
    """

    course: Course
    low_type: str
    min_sqnr_db: float
    allowance: float
    peaks: Mapping[tuple[str, int], float | None] = field(default_factory=dict, repr=False)
    nodes: Mapping[str, fx.Node] = field(default_factory=dict, repr=False)
    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def spread(self) -> bool:
        """Whether the budget would raise much of the program, with no edge to blame."""
        return self.allowance < self.course.spread

    @cached_property
    def active(self) -> list[MeasuredEdge]:
        """The edges that are rounded under the plan."""
        high = [name for name in self.course.thresholds if self.course.is_high(name, self.allowance)]
        return self.course.active(high)

    @cached_property
    def predicted_db(self) -> float:
        """The SQNR that the table predicts, at the worst output."""
        return decibels(noise_of(self.active))

    @cached_property
    def _costs(self) -> dict[str, float]:
        costs = dict.fromkeys(self.course.thresholds, 0.0)
        for edge in self.active:
            for name in edge.nodes:
                if name in costs:
                    costs[name] += edge.weight
        return costs

    def verdict(self, node: str) -> Verdict | None:
        """Why the budget keeps `node` in fp32, or None. A node that is only tied to a raised one is not judged here."""
        moves = node in self.course.follows  # its threshold is inf where it follows nodes that other rules keep high
        threshold = self.course.thresholds.get(node)
        if threshold is None or (threshold == math.inf and not moves):
            return None
        if not self.course.is_high(node, self.allowance):
            return None
        number = self.course.steps_of.get(node)
        if moves and (threshold == math.inf or number is None or not self._taken(number)):
            return Verdict("rounding", self._moves_with(node, self.course.follows[node]), None, self.min_sqnr_db)
        assert number is not None
        reason = self._reason(node, self.course.steps[number])
        weight = self.course.steps[number].edge.weight
        return None if reason is None else Verdict("rounding", reason, decibels(weight), self.min_sqnr_db)

    def unmet(self, node: str) -> Verdict | None:
        """The verdict of a low node where the noise is spread: the budget is not met, and what can be reached."""
        number = self.course.steps_of.get(node)
        if not self.spread or number is None or not self.allowance < self.course.steps[number].allowance:
            return None
        return Verdict("spread", self.what_can_be_had(), self.predicted_db, self.min_sqnr_db)

    def low_reason(self, node: str) -> tuple[str, float]:
        """What rounding at a low node costs, as a sentence and in dB."""
        cost = decibels(self._costs.get(node, 0.0))
        if cost == math.inf:
            return "its rounding changes no output", cost
        return f"its rounding costs {cost:.3g} dB; the budget is {self.min_sqnr_db:g}", cost

    def what_can_be_had(self) -> str:
        """`bfloat16 gives 26 dB here; float16 would give 41`."""
        others = "".join(f"; {name} would give {_db(value)}" for name, value in self.others.items())
        return f"{self.low_type} gives {_db(self.predicted_db)} dB here{others}"

    def notes(self) -> tuple[str, ...]:
        """What a reader of the plan should know before the nodes."""
        if not self.spread:
            return ()
        return (
            f"{self.what_can_be_had()}: below the budget of {self.min_sqnr_db:g}, and no edge is to blame. Rounding "
            "noise comes from everywhere, so more nodes in fp32 would take much of the program. Lower min_sqnr_db, "
            "or use another type.",
        )

    def summary(self) -> RoundingSummary:
        """The summary that the plan stores."""
        worst = sorted(self.active, key=lambda e: -e.weight)[:WORST_EDGES]
        edges = tuple(
            EdgeCost(e.edge.node, e.edge.input, e.edge.output, decibels(e.weight)) for e in worst if e.weight > 0
        )
        return RoundingSummary(self.min_sqnr_db, self.predicted_db, self.spread, edges)

    def _taken(self, number: int) -> bool:
        return self.course.chosen is None and self.course.allowed(self.allowance) < self.course.steps[number].allowance

    def _reason(self, node: str, step: Step) -> str | None:
        edge = step.edge.edge
        if node in edge.movers and node not in (edge.node, edge.input):
            return self._moves_with(node, edge.input if edge.node == OUTPUT else edge.node)
        if node == edge.node:
            return f"rounding {self._what(step.edge)} to {self.low_type} {self._leaves(step)}"
        if node == edge.input:
            reader = "it is a result of the program" if edge.node == OUTPUT else f"{_quoted(edge.node)} reads it"
            peak = self._peak(edge.input, edge.output)
            return f"{reader}: rounding it{peak} to {self.low_type} {self._leaves(step)}"
        return None  # it is tied to one of these, and the tie says so

    def _moves_with(self, node: str, other: str) -> str:
        known = self.nodes.get(node)
        moves = known is None or known.target is getitem or operator_of(base_op(known.target)).moves
        does = "moves data" if moves else "negates or replaces elements"
        return f"it only {does}, and has the type of {_quoted(other)}"

    def _leaves(self, step: Step) -> str:
        """The SQNR that rounding the edge leaves: alone, or as one of several that are too much together."""
        alone, budget = decibels(step.edge.weight), f"{self.min_sqnr_db:g}"
        at = f" at output {step.edge.worst_output}"
        if alone == -math.inf:
            return f"makes NaN or Inf{at}"
        if alone < self.min_sqnr_db:
            return f"alone leaves {alone:.3g} dB{at}, below the budget of {budget}"
        if self.course.chosen is not None:
            return f"leaves {alone:.3g} dB{at}; nodes of more bytes or work fill the budget of {budget}"
        if step.noise > allowance_of(self.min_sqnr_db):
            together = decibels(step.noise)
            return (
                f"leaves {alone:.3g} dB{at}, and with all smaller edges {together:.3g}, too near the budget of {budget}"
            )
        return f"leaves {alone:.3g} dB{at}: more than half of all noise, and cheap to avoid; the budget is {budget}"

    def _what(self, edge: MeasuredEdge) -> str:
        if edge.edge.is_literal:
            argument = edge.edge.input.removeprefix(LITERAL)
            reader = self.nodes.get(edge.edge.node)
            number = None if reader is None else literals_of(reader).get(argument)
            return f"its number {argument}" + ("" if number is None else f"={number:g}")
        return f"its input {_quoted(edge.edge.input)}{self._peak(edge.edge.input, edge.edge.output)}"

    def _peak(self, node: str, output: int) -> str:
        peak = self.peaks.get((node, output))
        return "" if peak is None else f" (up to {peak:.4g})"


def _quoted(node: str) -> str:
    return f"`{node}`"


def _db(value: float) -> str:
    return f"{value:.3g}"
