"""The judge: facts of one node in, a decision with every verdict out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from calibcast.calib.errors import PlanError
from calibcast.passes.facts import NodeFacts
from calibcast.passes.plan import Decision
from calibcast.passes.rules import Legality, matched, rule_id
from calibcast.passes.tensor_rules import InitMax
from calibcast.passes.verdict import HIGH, LOW, Rule, Verdict


@dataclass(frozen=True)
class Included:
    """What the user asked to be low whatever the rules say, legality apart."""

    nodes: tuple[str, ...]
    targets: frozenset[str]

    def __call__(self, facts: NodeFacts) -> bool:
        if not self.nodes and not self.targets:
            return False
        by_target = facts.op in self.targets or facts.op.rpartition(".")[0] in self.targets
        return by_target or matched(self.nodes, facts.name, facts.module) is not None


@dataclass(frozen=True)
class Judge:
    """Turns facts into a decision by all rules. settings: what it was made from, as a plan keeps them."""

    rules: tuple[Rule, ...]
    included: Callable[[NodeFacts], bool]
    data_max: float
    low_type: torch.dtype
    init_max: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def in_type(self, low_type: torch.dtype) -> Judge:
        """The same rules for another low type, whose largest value is the limit of weights unless the user gave one."""
        limit = weight_limit(self.init_max, low_type)
        rules = tuple(InitMax(limit) if isinstance(rule, InitMax) else rule for rule in self.rules)
        return replace(self, low_type=low_type, rules=rules)

    def decide(self, facts: NodeFacts, work: int, tied: Verdict | None) -> Decision:
        included = self.included(facts)
        legality = Legality(allow_custom=included)(facts)
        verdicts = [v for v in (legality, tied, *(_verdict(rule, facts) for rule in self.rules)) if v is not None]
        binding = [v for v in (legality, tied) if v is not None] if included else verdicts
        place: dict[str, Any] = {"node": facts.name, "op": facts.op, "module": facts.module, "work": work}
        if binding:
            first = binding[0]
            return Decision(
                **place, precision=HIGH, rule=first.rule, reason=first.reason, evidence=first.evidence,
                limit=first.limit, verdicts=tuple([first] + [v for v in verdicts if v is not first]),
            )  # fmt: skip
        reason, evidence = self._why_low(facts, included)
        limit = self.data_max if evidence is not None else None
        return Decision(
            **place, precision=LOW, rule=None, reason=reason, evidence=evidence, limit=limit, verdicts=tuple(verdicts)
        )

    def keeps_high(self, facts: NodeFacts) -> bool:
        """Whether `decide` would say high of a node that is not tied: the same, without the reasons."""
        included = self.included(facts)
        if Legality(allow_custom=included)(facts) is not None:
            return True
        return not included and any(_verdict(rule, facts) is not None for rule in self.rules)

    def _why_low(self, facts: NodeFacts, included: bool) -> tuple[str, float | None]:
        seen = [t.absmax for t in facts.tensors if t.measured and not t.is_weight and t.absmax is not None]
        if included:
            return "the user's include list asks for it", max(seen, default=None)
        if not facts.has_ranges:
            return "no rule that needs no ranges is met; none was given", None
        if not seen:
            return "no rule is met", None
        if max(seen) > self.data_max:  # it only moves data, or `range_quantile` leaves the peak out
            return f"no rule is met; its largest magnitude is {max(seen):.4g}", max(seen)
        return f"its largest magnitude is {max(seen):.4g}, within data_max {self.data_max:g}", max(seen)


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
