"""`classify`: from a program and its ranges to a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl
import torch
from calibcast.calib.execution import require_program
from calibcast.calib.gc_pause import paused
from calibcast.calib.graph import dtype_name
from calibcast.calib.program_digests import node_digests
from calibcast.calib.ranges import RangeTable, require_table
from calibcast.calib.rounding_edges import Edge
from calibcast.passes.decisions import decide
from calibcast.passes.facts import WEIGHT_KINDS
from calibcast.passes.flips import Flips, LazyFlips, flips_of
from calibcast.passes.judge import Judge
from calibcast.passes.low_types import LOW_TYPES
from calibcast.passes.plan import Decision, PrecisionPlan
from calibcast.passes.program_facts import ProgramFacts
from calibcast.passes.rounding_course import Course
from calibcast.passes.rounding_evidence import MeasuredEdge
from calibcast.passes.rounding_planning import budgets_of, course_for, with_rounding
from calibcast.passes.rules import Raised
from calibcast.passes.settings import Settings, Target, low_type_of
from calibcast.passes.verdict import LOW, Rule, Verdict
from calibcast.passes.work import WorkCounter
from torch.export import ExportedProgram


def classify(  # noqa: PLR0913 - the public contract
    program: ExportedProgram,
    ranges: RangeTable | None,
    low_precision_type: torch.dtype | str = torch.float16,
    min_sqnr_db: float | None = None,
    data_max: float | None = None,
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

    Any rule that is met keeps a node high. The plan records every verdict, with the number that was seen and its limit.
    With ranges in which rounding was measured, the plan meets a budget of rounding noise; without, it is a guess from
    magnitudes and operators.

    Args:
        ranges: from `calibrate`; None leaves only the rules that need no ranges, and the plan says so.
        low_precision_type: torch.float16 or torch.bfloat16.
        min_sqnr_db: the budget: the least ratio of signal to rounding noise in each channel of each output, in dB. None
            means 40 in float16 and 26 in bfloat16. It needs ranges in which rounding was measured (`rounding_batches`).
        data_max: largest magnitude of inputs and activations; inf switches the rule off. None means 512 where rounding
            was not measured; where it was, the low type must have room for four times what was seen.
        init_max: largest magnitude of weights; None is the largest finite value of the low type.
        max_depth_of_reduction: most terms summed into one element; None is no limit.
        nodes_to_exclude, nodes_to_include: regexes, `re.match`ed on node names and dotted module paths. Include
            beats exclude and every rule but legality.
        targets_to_exclude, targets_to_include: operators, or their names (`aten.add.Tensor`, `aten.add`).
        range_quantile: judge `data_max` by the magnitude that this share of elements stays within.
        rules: more rules, each called with a `NodeFacts` and answering a `Verdict` or None.
        wide_accumulation: operators (`layer_norm`, `mean`) that the backend accumulates in fp32 whatever their type, so
            that `interior` does not apply to them.
        weights: what to do when the ranges were measured with other weights: "warn", "refuse" or "ignore".

    Raises:
        PlanError: a setting is out of range, or a pattern or target matches nothing.
        MismatchError: the ranges are of another program.
    """
    settings = Settings(
        data_max, init_max, max_depth_of_reduction, nodes_to_exclude, targets_to_exclude, nodes_to_include,
        targets_to_include, range_quantile, rules, wide_accumulation, min_sqnr_db,
    )  # fmt: skip
    return Planning.of(program, ranges, low_precision_type, settings, weights).plan()


@dataclass(frozen=True)
class Planning:
    """A program, its ranges and settings, read once; `plan` can be called for several allowances of noise."""

    facts: ProgramFacts
    judge: Judge
    settings: Settings
    ranges: RangeTable | None
    work: Mapping[str, int]
    digests: Mapping[str, str]

    @classmethod
    def of(
        cls, program: ExportedProgram, ranges: RangeTable | None, low_type: Any, settings: Settings, weights: str
    ) -> Planning:
        """Raises what `classify` raises."""
        checked = low_type_of(low_type)
        require_program(program)
        if ranges is not None:
            require_table(ranges)
            ranges.check(program, weights)
        with paused():
            facts, count = ProgramFacts.of(program, ranges), WorkCounter()
            work = {candidate.name: count(candidate.node) for candidate in facts.nodes}
            # A table that passed the check has the digests of the graph.
            digests = node_digests(program) if ranges is None else dict(ranges.calibration.digests)
        return cls(facts, settings.judge(facts.nodes, ranges, checked), settings, ranges, work, digests)

    def plan(
        self,
        allowance: float | None = None,
        raised: Mapping[str, Verdict] | None = None,
        at_any_cost: bool = False,
        course: Course | None = None,
    ) -> PrecisionPlan:
        """The plan for the budget, or for `allowance`, a predicted noise.

        raised: nodes that must be high, as a run has shown. at_any_cost: raise all that it takes, also where noise is
        spread. course: where it is known already, or has its nodes chosen (`Course.choosing`).
        """
        bare = self.judge if not raised else replace(self.judge, rules=(*self.judge.rules, Raised(raised)))
        with paused():
            judge = with_rounding(self.facts, bare, allowance, course, at_any_cost)
            decisions = decide(self.facts, judge, self.work)
        # For both types, as a reader of the plan may ask for the other one, too.
        known = () if self.ranges is None else LOW_TYPES
        flips, budgets = LazyFlips(known, self._flips(judge)), LazyFlips(self._measured, self._budgets(bare))
        if self.settings.rules:  # now: a rule of the user's own may answer otherwise later
            flips.settle(), budgets.settle()
        rounding = judge.rounding
        return PrecisionPlan(
            tuple(decisions), judge.low_type, self.digests, judge.settings, self._notes(judge, decisions),
            masked_nodes(self.ranges), flips, budgets, None if rounding is None else rounding.summary(),
            exponents=_exponents(self.ranges),
        )  # fmt: skip

    @property
    def low_name(self) -> str:
        """The low type by name."""
        return dtype_name(self.judge.low_type)

    def in_type(self, low_type: torch.dtype, min_sqnr_db: float) -> Planning:
        """The same for another low type."""
        return replace(self, judge=replace(self.judge.in_type(low_type), min_sqnr_db=min_sqnr_db))

    def with_noise(self, noises: Mapping[torch.dtype, Mapping[Edge, float]], output: int) -> Planning:
        """The same with more evidence: what edges do to `output` by a measurement of their own."""
        rounding = {low: found.with_noise(noises[low], output) for low, found in self.facts.rounding.items()}
        return replace(self, facts=replace(self.facts, rounding=rounding))

    def course(self, raised: Mapping[str, Verdict]) -> Course | None:
        """The order in which the budget raises nodes, where those in `raised` are high already."""
        return course_for(self.facts, replace(self.judge, rules=(*self.judge.rules, Raised(raised))))

    def makers(self, readers: Collection[str]) -> set[str]:
        """The nodes that made what `readers` read."""
        return {e.edge.input for e in self._edges if e.edge.node in readers and not e.edge.is_literal}

    def makers_by_reader(self) -> dict[str, set[str]]:
        """`makers` of each node alone."""
        found: dict[str, set[str]] = {}
        for measured in self._edges:
            if not measured.edge.is_literal:
                found.setdefault(measured.edge.node, set()).add(measured.edge.input)
        return found

    def ring(self, readers: Collection[str], low: Collection[str]) -> set[str]:
        """The nodes in `low` among `readers` and the nodes that round what these read."""
        near = {name for e in self._edges if e.edge.node in readers for name in e.nodes}
        return (near | set(readers)) & set(low)

    def rounding(self, makers: Collection[str]) -> set[str]:
        """The nodes that round what `makers` made, when low: those themselves, all readers, and the movers between."""
        return {name for e in self._edges if e.edge.input in makers for name in e.nodes}

    @property
    def _edges(self) -> Sequence[MeasuredEdge]:
        """The edges that were measured for the low type."""
        evidence = self.facts.rounding.get(self.judge.low_type)
        return () if evidence is None else evidence.edges

    @property
    def _measured(self) -> list[str]:
        return [name for name, low_type in LOW_TYPES.items() if low_type in self.facts.rounding]

    def _flips(self, judge: Judge) -> Callable[[str], Flips]:
        def find(name: str) -> Flips:
            mine = LOW_TYPES[name] == judge.low_type
            return flips_of(self.facts, judge if mine else with_rounding(self.facts, judge.in_type(LOW_TYPES[name])))

        return find

    def _budgets(self, judge: Judge) -> Callable[[str], Flips]:
        return lambda name: budgets_of(self.facts, judge.in_type(LOW_TYPES[name]))

    def _notes(self, judge: Judge, decisions: list[Decision]) -> tuple[str, ...]:
        rounding = () if judge.rounding is None else judge.rounding.notes()
        return (*_notes(self.ranges, judge.low_type, decisions), *rounding)


def masked_nodes(ranges: RangeTable | None) -> tuple[str, ...] | None:
    """The nodes in which calibration has seen mask values; None without ranges."""
    if ranges is None:
        return None
    return tuple(ranges.frame.filter(pl.col("masked") > 0)["node"].unique(maintain_order=True))


def _notes(ranges: RangeTable | None, low_type: torch.dtype, decisions: list[Decision]) -> tuple[str, ...]:
    if ranges is None:
        return ("no ranges were given: only the rules that need none were applied, so nothing is known of overflow",)
    low = {decision.node for decision in decisions if decision.precision == LOW}
    stored = _exponents(ranges)
    rescaled = (
        f"the program is rescaled: {len(stored)} tensors are stored as powers of two of themselves, and limits are of "
        "what is stored; `calibcast report` shows true values",
    )
    return (*(rescaled if stored else ()), *(_lost_weights(ranges, low_type) if low else ()))


def _exponents(ranges: RangeTable | None) -> dict[str, int]:
    record = None if ranges is None else ranges.calibration.rescaled
    return {} if record is None else dict(record.exponents)


def _lost_weights(ranges: RangeTable, low_type: torch.dtype) -> list[str]:
    """Notes on weights with values that become inf or zero in the low type."""
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
