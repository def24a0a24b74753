"""`classify`: from a program and its ranges to a plan."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl
import torch
from torch import fx
from torch.export import ExportedProgram

from calib.errors import PlanError, known
from calib.fingerprint import node_digests
from calib.graph import dtype_name, input_kinds, module_path, op_name
from calib.ranges import RangeTable
from passes.fact_reader import FactReader
from passes.facts import HIGH, KEPT, LOW, WEIGHT_KINDS, Evidence, HiddenEvidence, NodeFacts, evidence_of
from passes.flips import flips_of
from passes.low_types import LOW_TYPES
from passes.number_formats import format_of
from passes.plan import Decision, PrecisionPlan
from passes.regions import Candidate, candidates, kept_reason
from passes.rules import (
    Follows,
    Interior,
    Legality,
    LiteralRange,
    Mask,
    MaxDepthOfReduction,
    NodesToExclude,
    TargetsToExclude,
    Unmeasured,
    matched,
    rule_id,
)
from passes.sensitivity import magnified_tensors, offset_free_nodes
from passes.tensor_rules import DataMax, InitMax, Nonfinite, Rule, Storage, Verdict
from passes.ties import Tie, named_ties
from passes.work import WorkCounter

Target = Any  # an OpOverload, an OpOverloadPacket, or a name of either


@dataclass(frozen=True)
class _Included:
    """What the user asked to be low whatever the rules say, legality apart."""

    nodes: tuple[str, ...]
    targets: frozenset[str]

    def __call__(self, facts: NodeFacts) -> bool:
        by_target = facts.op in self.targets or facts.op.rpartition(".")[0] in self.targets
        return by_target or matched(self.nodes, facts.name, facts.module) is not None


def classify(  # noqa: PLR0913 - the public contract
    program: ExportedProgram,
    ranges: RangeTable | None,
    low_precision_type: torch.dtype | str = torch.float16,
    data_max: float = 512.0,
    init_max: float | None = None,
    max_depth_of_reduction: int | None = None,
    nodes_to_exclude: Iterable[str] = (),
    targets_to_exclude: Iterable[Target] = (),
    nodes_to_include: Iterable[str] = (),
    targets_to_include: Iterable[Target] = (),
    range_quantile: float = 1.0,
    rules: Iterable[Rule] = (),
    weights: str = "warn",
    wide_accumulation: Iterable[str] = (),
) -> PrecisionPlan:
    """Decide for each node whether it runs in `low_precision_type` or stays in its exported type.

    Any rule that is met keeps a node high, and every verdict is kept with the number that was seen and its limit.

    Args:
        ranges: from `calibrate`; None leaves only the rules that need no ranges, and the plan says so.
        low_precision_type: torch.float16 or torch.bfloat16.
        data_max: largest magnitude of inputs and activations; inf switches the rule off.
        init_max: largest magnitude of weights; None is the largest finite value of the low type.
        max_depth_of_reduction: most terms summed into one element; None is no limit.
        nodes_to_exclude, nodes_to_include: regexes, `re.match`ed on node names and dotted module paths. Include
            beats exclude and every rule but legality.
        targets_to_exclude, targets_to_include: operators, or their names (`aten.add.Tensor`, `aten.add`).
        range_quantile: judge `data_max` by the magnitude that this share of elements stays within.
        rules: more rules, each called with a `NodeFacts` and answering a `Verdict` or None.
        wide_accumulation: operators (`layer_norm`, `mean`) that the backend accumulates in fp32 whatever their type, so
            that `interior` has nothing to say of them.
        weights: what to do when the ranges were measured with other weights: "warn", "refuse" or "ignore".

    Raises:
        PlanError: a setting is out of range, or a pattern or target matches nothing.
        MismatchError: the ranges are of another program.
    """
    low_type = low_type_of(low_precision_type)
    if ranges is not None:
        ranges.check(program, weights)
    nodes = candidates(program)
    judge = judge_of(
        nodes, ranges, low_type, data_max=data_max, init_max=init_max, max_depth_of_reduction=max_depth_of_reduction,
        nodes_to_exclude=nodes_to_exclude, targets_to_exclude=targets_to_exclude, nodes_to_include=nodes_to_include,
        targets_to_include=targets_to_include, range_quantile=range_quantile, rules=rules,
        wide_accumulation=wide_accumulation,
    )  # fmt: skip
    reader = reader_of(program, ranges, nodes, low_type)
    decisions = decide(nodes, reader, judge)
    notes = _notes(ranges, low_type, decisions)
    flips = {}
    if ranges is not None:  # for both types, as a reader of the plan may ask for the other one, too
        for name, other in LOW_TYPES.items():
            facts = reader if other == low_type else reader_of(program, ranges, nodes, other, reader.evidence)
            flips[name] = flips_of(nodes, facts, judge.in_type(other))
    return PrecisionPlan(
        tuple(decisions), low_type, node_digests(program), judge.settings, notes, masked_nodes(ranges), flips
    )


def judge_of(  # noqa: PLR0913 - what `classify` is called with
    nodes: list[Candidate],
    ranges: RangeTable | None,
    low_type: torch.dtype,
    *,
    data_max: float = 512.0,
    init_max: float | None = None,
    max_depth_of_reduction: int | None = None,
    nodes_to_exclude: Iterable[str] = (),
    targets_to_exclude: Iterable[Target] = (),
    nodes_to_include: Iterable[str] = (),
    targets_to_include: Iterable[Target] = (),
    range_quantile: float = 1.0,
    rules: Iterable[Rule] = (),
    wide_accumulation: Iterable[str] = (),
) -> Judge:
    """All rules with these settings, checked. Raises PlanError as `classify` does."""
    check_limits(data_max, init_max, max_depth_of_reduction, range_quantile, ranges)
    exclude = _patterns(nodes_to_exclude, "nodes_to_exclude", nodes)
    include = _patterns(nodes_to_include, "nodes_to_include", nodes)
    targets = _targets(targets_to_exclude, "targets_to_exclude", nodes)
    included = _Included(include, _targets(targets_to_include, "targets_to_include", nodes))
    limit = float(torch.finfo(low_type).max) if init_max is None else float(init_max)
    every: tuple[Rule, ...] = (
        NodesToExclude(exclude),
        TargetsToExclude(targets),
        Unmeasured(),
        Nonfinite(),
        DataMax(float(data_max), range_quantile),
        InitMax(limit),
        Mask(),
        LiteralRange(),
        *(() if max_depth_of_reduction is None else (MaxDepthOfReduction(max_depth_of_reduction),)),
        Interior(frozenset(wide_accumulation)),
        Storage(),
        *rules,
        Follows(),
    )
    settings = {
        "data_max": float(data_max),
        "init_max": limit,
        "max_depth_of_reduction": max_depth_of_reduction,
        "nodes_to_exclude": list(exclude),
        "targets_to_exclude": sorted(targets),
        "nodes_to_include": list(include),
        "targets_to_include": sorted(included.targets),
        "range_quantile": range_quantile,
        "rules": [rule_id(rule) for rule in every],
    }
    return Judge(every, included, float(data_max), low_type, init_max, settings)


def masked_nodes(ranges: RangeTable | None) -> tuple[str, ...] | None:
    """The nodes in which calibration has seen mask values; None without ranges."""
    if ranges is None:
        return None
    return tuple(ranges.frame.filter(pl.col("masked") > 0)["node"].unique(maintain_order=True))


def reader_of(
    program: ExportedProgram,
    ranges: RangeTable | None,
    nodes: list[Candidate],
    low_type: torch.dtype,
    evidence: Evidence | None = None,
) -> FactReader:
    """The facts of a program's nodes by these ranges. `evidence`: of the ranges, where it has been read before."""
    names, found = _names(program, nodes), evidence_of(ranges) if evidence is None else evidence
    return FactReader(
        found,
        ranges is not None,
        input_kinds(program),
        names,
        low_type,
        HiddenEvidence.of(ranges),
        magnified_tensors(names, found, low_type),
        offset_free_nodes(names),
    )


def low_type_of(value: torch.dtype | str) -> torch.dtype:
    """`torch.float16` or `torch.bfloat16`, from itself or a name. Raises PlanError for anything else."""
    return LOW_TYPES[format_of(value).name]


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
        limit = float(torch.finfo(low_type).max) if self.init_max is None else float(self.init_max)
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


def decide(nodes: list[Candidate], reader: FactReader, judge: Judge) -> list[Decision]:
    """Decide in graph order, again until ties have settled: each round can only turn low nodes high."""
    kept = {candidate.name: kept_reason(candidate) for candidate in nodes}
    count_work = WorkCounter()
    work = {candidate.name: count_work(candidate.node) for candidate in nodes}
    ties = named_ties(nodes)
    forced: dict[str, Verdict] = {}
    while True:
        precisions: dict[str, str] = {}
        decisions = []
        for candidate in nodes:
            reason = kept[candidate.name]
            if reason is not None:
                decision = _keep(candidate, reason, work[candidate.name])
            else:
                facts = reader.read(candidate.node, precisions)
                decision = judge.decide(facts, work[candidate.name], forced.get(candidate.name))
                precisions[candidate.name] = decision.precision
            decisions.append(decision)
        more = _forced_by_ties(ties, precisions, forced)
        if not more:
            return decisions
        forced |= more


def _keep(candidate: Candidate, reason: Verdict, work: int) -> Decision:
    return Decision(
        node=candidate.name,
        op=op_name(candidate.node.target),
        module=module_path(candidate.node),
        precision=KEPT,
        rule=reason.rule,
        reason=reason.reason,
        work=work,
    )


def _forced_by_ties(
    ties: list[tuple[Tie, list[str]]], precisions: Mapping[str, str], forced: Mapping[str, Verdict]
) -> dict[str, Verdict]:
    more: dict[str, Verdict] = {}
    for tie, members in ties:
        other = next((name for name in members if precisions.get(name) != LOW), None)
        if tie.pinned is None and other is None:
            continue
        stays = "is high" if other in precisions else "keeps its type"
        reason = tie.pinned or f"{tie.why} {other}, which {stays}"
        for name in members:
            if precisions.get(name) == LOW and name not in forced:
                more[name] = Verdict(tie.rule, reason)
    return more


def _names(program: ExportedProgram, nodes: list[Candidate]) -> dict[fx.Node, str]:
    names = {candidate.node: candidate.name for candidate in nodes}
    for candidate in nodes:
        for argument in candidate.node.all_input_nodes:
            names.setdefault(argument, argument.name)
    return names


def check_limits(
    data_max: float, init_max: float | None, depth: int | None, quantile: float, ranges: RangeTable | None
) -> None:
    """Raise PlanError for a limit that is not positive, and for a quantile outside (0, 1] or without histograms."""
    for name, value in (("data_max", data_max), ("init_max", init_max), ("max_depth_of_reduction", depth)):
        if value is not None and (isinstance(value, bool) or not value > 0):
            raise PlanError(f"{name}={value}: give a positive number, or inf to switch the rule off")
    if not 0 < quantile <= 1:
        raise PlanError(f"range_quantile={quantile}: give a share above 0 and at most 1")
    if quantile < 1 and ranges is not None and ranges.frame["histogram"].null_count():
        raise PlanError(
            f"range_quantile={quantile} needs histograms, and these ranges were measured with histogram=False. "
            "Calibrate with histogram=True, or use range_quantile=1.0."
        )


def _patterns(patterns: Iterable[str], argument: str, nodes: list[Candidate]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        patterns = (patterns,)
    checked = tuple(sorted(set(patterns)))
    names = [(candidate.name, module_path(candidate.node)) for candidate in nodes]
    for pattern in checked:
        try:
            hit = any(matched((pattern,), name, module) for name, module in names)
        except re.error as error:
            raise PlanError(f"{argument}: {pattern!r} is not a regular expression: {error}") from error
        if not hit:
            plain = re.sub(r"[\^$\\.*+?()\[\]{}|]", "", pattern)
            every = {text for pair in names for text in pair if text}
            raise PlanError(f"{argument}: {pattern!r} matches no node name and no module path; {known(plain, every)}")
    return checked


def _targets(targets: Iterable[Target], argument: str, nodes: list[Candidate]) -> frozenset[str]:
    if isinstance(targets, str) or callable(targets):
        targets = (targets,)
    present = {op_name(candidate.node.target) for candidate in nodes}
    present |= {name.rpartition(".")[0] for name in present if name.count(".") > 1}
    found = set()
    for target in targets:
        name = str(target).removeprefix("torch.ops.")
        if name not in present:
            raise PlanError(f"{argument}: no node has the target {name!r}; {known(name, present)}")
        found.add(name)
    return frozenset(found)


def _notes(ranges: RangeTable | None, low_type: torch.dtype, decisions: list[Decision]) -> tuple[str, ...]:
    if ranges is None:
        return ("no ranges were given: only the rules that need none were applied, so nothing is known of overflow",)
    low = {decision.node for decision in decisions if decision.precision == LOW}
    return tuple(_lost_weights(ranges, low_type)) if low else ()


def _lost_weights(ranges: RangeTable, low_type: torch.dtype) -> list[str]:
    """Weights of which the low type makes inf or zero, by name."""
    info, name = torch.finfo(low_type), dtype_name(low_type)
    vanishing = float(info.smallest_normal * info.eps) / 2  # half the smallest subnormal rounds to zero
    notes = []
    for row in ranges.frame.filter(pl.col("kind").is_in(WEIGHT_KINDS)).iter_rows(named=True):
        weight, largest, smallest = f"{row['kind']} {row['node']}", row["absmax"], row["smallest"]
        if largest is not None and largest > info.max:
            notes.append(f"{weight} has values up to {largest:.4g}: inf in {name}")
        if smallest is not None and smallest <= vanishing:
            notes.append(f"{weight} has values down to {smallest:.4g}: zero in {name}")
    return notes
