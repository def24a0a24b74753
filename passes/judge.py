"""The judge: facts of one node in, a decision with every verdict out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from calibcast.calib.errors import PlanError
from calibcast.passes.facts import NodeFacts
from calibcast.passes.node_types import refused_verdict
from calibcast.passes.plan import Decision
from calibcast.passes.rounding_plan import DEFAULT_BUDGETS, RoundingPlan
from calibcast.passes.rules import Legality, matched, rule_id
from calibcast.passes.tensor_rules import DEFAULT_DATA_MAX, InitMax
from calibcast.passes.verdict import HIGH, LOW, Rule, Verdict


@dataclass(frozen=True)
class Included:
    """Whether the user's include list asks for a node to be low. That overrides all rules but legality."""

    nodes: tuple[str, ...]
    targets: frozenset[str]

    def __call__(self, facts: NodeFacts) -> bool:
        if not self.nodes and not self.targets:
            return False
        by_target = facts.op in self.targets or facts.op.rpartition(".")[0] in self.targets
        return by_target or matched(self.nodes, facts.name, facts.module) is not None


@dataclass(frozen=True)
class Judge:
    """Turns facts into a decision by all rules. settings: those that it was made from, as a plan stores them.

    data_max: None where rounding was measured and the user gives no limit. rounding: the nodes that the budget
    `min_sqnr_db` keeps high; None where rounding was not measured.
    """

    rules: tuple[Rule, ...]
    included: Callable[[NodeFacts], bool]
    data_max: float | None
    low_type: torch.dtype
    init_max: float | None = None
    min_sqnr_db: float | None = None
    rounding: RoundingPlan | None = field(default=None, repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def in_type(self, low_type: torch.dtype) -> Judge:
        """The same rules for another low type. Its largest value limits the weights, unless the user gave a limit.

        The result has no rounding plan, since a rounding plan is for one low type.
        """
        limit = weight_limit(self.init_max, low_type)
        rules = tuple(InitMax(limit) if isinstance(rule, InitMax) else rule for rule in self.rules)
        return replace(self, low_type=low_type, rules=rules, rounding=None)

    @property
    def budget(self) -> float:
        """The least SQNR, dB, that a plan is made for: the user's, or that of the low type."""
        return default_budget(self.low_type) if self.min_sqnr_db is None else self.min_sqnr_db

    def decide(self, facts: NodeFacts, work: int, tied: Verdict | None) -> Decision:
        included = self.included(facts)
        legality = Legality(allow_custom=included)(facts)
        refused = None if facts.refused is None else refused_verdict(facts.refused, facts.low.name)
        rounding = None if self.rounding is None else self.rounding.verdict(facts.name)
        asked = (_verdict(rule, facts) for rule in self.rules)
        verdicts = [v for v in (legality, tied, *asked, rounding, refused) if v is not None]
        binding = [v for v in (legality, tied, refused) if v is not None] if included else verdicts
        place: dict[str, Any] = {"node": facts.name, "op": facts.op, "module": facts.module, "work": work}
        if binding:
            first = binding[0]
            return Decision(
                **place, precision=HIGH, rule=first.rule, reason=first.reason, evidence=first.evidence,
                limit=first.limit, verdicts=tuple([first] + [v for v in verdicts if v is not first]),
            )  # fmt: skip
        unmet = None if self.rounding is None else self.rounding.unmet(facts.name)
        verdicts += [] if unmet is None else [unmet]
        reason, evidence, limit = self._why_low(facts, included)
        return Decision(
            **place, precision=LOW, rule=None, reason=reason, evidence=evidence, limit=limit, verdicts=tuple(verdicts)
        )

    def keeps_high(self, facts: NodeFacts) -> bool:
        """Whether `decide` would keep an untied node high: the same checks, without the reasons."""
        included = self.included(facts)
        if facts.refused is not None or Legality(allow_custom=included)(facts) is not None:
            return True
        if included:
            return False
        by_budget = self.rounding is not None and self.rounding.verdict(facts.name) is not None
        return by_budget or any(_verdict(rule, facts) is not None for rule in self.rules)

    def _why_low(self, facts: NodeFacts, included: bool) -> tuple[str, float | None, float | None]:
        """The reason, the number that was seen, and the limit that it is within."""
        seen = [t.absmax for t in facts.tensors if t.measured and not t.is_weight and t.absmax is not None]
        if self.rounding is not None and facts.rounding_known and not included:
            return (*self.rounding.low_reason(facts.name), self.budget)
        limit = DEFAULT_DATA_MAX if self.data_max is None else self.data_max
        if included:
            return "the user's include list asks for it", max(seen, default=None), limit if seen else None
        if not facts.has_ranges:
            return "no rule that needs no ranges is met; none was given", None, None
        if not seen:
            return "no rule is met", None, None
        if max(seen) > limit:  # it only moves data, or `range_quantile` leaves the peak out
            return f"no rule is met; its largest magnitude is {max(seen):.4g}", max(seen), limit
        return f"its largest magnitude is {max(seen):.4g}, within data_max {limit:g}", max(seen), limit


def default_budget(low_type: torch.dtype) -> float:
    """The budget, dB, of a low type."""
    return DEFAULT_BUDGETS[str(low_type).removeprefix("torch.")]


def weight_limit(init_max: float | None, low_type: torch.dtype) -> float:
    """The limit of weights: the user's, or the largest finite value of the low type."""
    return float(torch.finfo(low_type).max) if init_max is None else float(init_max)


def _verdict(rule: Rule, facts: NodeFacts) -> Verdict | None:
    try:
        verdict = rule(facts)
    except Exception as error:
        raise PlanError(f"rule {rule_id(rule)} raised {type(error).__name__} on node {facts.name}: {error}") from error
    if verdict is not None and not isinstance(verdict, Verdict):
        raise PlanError(
            f"rule {rule_id(rule)} answered {verdict!r} on node {facts.name}; a rule answers a Verdict or None"
        )
    return verdict
