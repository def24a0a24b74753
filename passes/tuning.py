"""`tune`: a plan that has been run, and meets the budget on the user's data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from calibcast.calib.errors import BudgetError, PlanError, require_kind
from calibcast.calib.ranges import RangeTable
from calibcast.calib.rounding_table import OUTPUT
from calibcast.passes.classification import Planning
from calibcast.passes.judge import default_budget
from calibcast.passes.low_types import LOW_TYPES
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.proving import Batch, Outcome, Proving, spare_db
from calibcast.passes.raising import nodes_around, nonfinite_paths, steps_of
from calibcast.passes.relaxing import MOST_TAKEN, RELAXED_DB, Relaxing
from calibcast.passes.rounding_course import NEVER
from calibcast.passes.rounding_plan import allowance_of
from calibcast.passes.settings import Settings
from calibcast.passes.tensor_errors import most_changed
from calibcast.passes.verdict import Verdict
from torch.export import ExportedProgram

_log = logging.getLogger("calibcast")
MOST_RUNS = 5
MOST_PLANS = 4 * MOST_RUNS  # plans are quick; one whose nodes were run before is not run again
# What the allowed noise amplitude is divided by when the budget is missed: MUCH_LESS when by more than FAR_DB.
LESS, MUCH_LESS, FAR_DB = 1.8, 3.0, 14.0
# After a near miss the allowance goes down by the miss and this much more, dB: many small steps are less than that.
PAST_DB = 1.5
# Where a run has more noise than the table predicts by this, dB, and its worst channel has OUTLYING times the mean of
# the channels, that channel is measured by itself, this often.
UNFORESEEN_DB, OUTLYING, MOST_LOOKS = 3.0, 10.0, 3
# With more than this to spare, some nodes may be in fp32 for nothing: a plan with fewer of them is tried.
SPARE_DB = 3.0
# A plan with this share of the work in the low type, or less, is taken only where no other meets the budget.
LITTLE = 0.01


def tune(  # noqa: PLR0913 - the public contract
    program: ExportedProgram,
    ranges: RangeTable,
    dataloader: Iterable[Any],
    min_sqnr_db: float | None = None,
    transform: Callable[[Any], Any] | None = None,
    max_batches: int | None = 8,
    start: PrecisionPlan | None = None,
    low_precision_type: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    weights: str = "warn",
    carry_state: bool = False,
    **settings: Any,
) -> PrecisionPlan:
    """`classify`, and then run the plan on data and mend it until it meets the budget there.

    A run computes in fp32 and rounds where the plan is low, so no half-precision kernel of this machine judges it. The
    worst channel of the worst output in the worst batch counts, also with floating-point inputs times two (of the first
    two batches); nothing may be newly non-finite. At most 5 plans are run to find one that meets the budget, and at
    most 12 more to find one with more in the low type; those that miss are soon left.
    Where noise is spread, as much goes to fp32 as the budget takes; `classify` leaves it low there, and says so.

    Args:
        dataloader, transform, device: as in `calibrate`. max_batches: how many are run at most, 8 by default.
        min_sqnr_db: the budget, dB; None is 40 in float16 and 26 in bfloat16.
        start: a plan to begin with, such as `PrecisionPlan.from_autocast`: what it has in fp32 stays there.
        low_precision_type: torch.float16 (the default) or torch.bfloat16; None is that of `start`.
        carry_state: as in `calibrate`: run the batches as a sequence, so that errors in what the program keeps between
            calls add up, as they will in use. Without it each batch starts from the saved state.
        settings: further arguments of `classify`.

    Returns:
        The passing plan with the fewest bytes in fp32; `proof` says what its run has shown.

    Raises:
        BudgetError: no plan meets the budget; the error names the best plan's result and the edges to blame.
        PlanError, MismatchError, BatchError: as `classify` and `calibrate`.
    """
    if start is not None:
        require_kind(start, PrecisionPlan, "start", "Give a PrecisionPlan, or None.", PlanError)
        start.check(program)
    require_kind(ranges, RangeTable, "ranges", "Give what calibrate returns.", PlanError)
    low_type = low_precision_type or (torch.float16 if start is None else start.low_precision_type)
    measured = ranges.rounding.height > 0
    asked = Settings(**settings, min_sqnr_db=min_sqnr_db if measured else None)
    planning = Planning.of(program, ranges, low_type, asked, weights)
    budget = default_budget(planning.judge.low_type) if min_sqnr_db is None else float(min_sqnr_db)
    proving = Proving(program, dataloader, transform, max_batches, device, carry_state)
    return _Tuning(planning, proving, budget, _kept(start)).run()


def _kept(start: PrecisionPlan | None) -> dict[str, Verdict]:
    names = () if start is None else start.high_precision_nodes
    return {name: Verdict("start", "the plan to start with has it in its exported type") for name in names}


def _has_low_work(plan: PrecisionPlan, least: float = 0.0) -> bool:
    """Whether a plan is worth casting for: more of the work than this share is low, or of the nodes without work."""
    nodes, work = plan.share()
    return (nodes if math.isnan(work) else work) > least


def _is_unforeseen(outcome: Outcome, by_db: float = UNFORESEEN_DB) -> bool:
    """Whether a run of a plan from the table has more noise than the table predicts, by more than this."""
    assert outcome.plan.rounding is not None
    return outcome.plan.rounding.predicted_sqnr_db > outcome.sqnr_db + by_db


@dataclass
class _Tuning:
    """The state of one `tune`: what is raised so far, how much noise is allowed, and what has been run."""

    planning: Planning
    proving: Proving
    budget: float
    raised: dict[str, Verdict]
    tried: list[Outcome] = field(default_factory=list)
    passed: list[Outcome] = field(default_factory=list)
    barely: list[Outcome] = field(default_factory=list)  # these met the budget, but not by as much as was wanted
    failing: float = math.inf  # the least allowance that missed the budget ..
    passing: float = 0.0  # .. and the largest that met it
    looked: set[tuple[int | None, ...]] = field(default_factory=set)  # batch, output and channel
    at_any_cost: bool = False  # raise what the budget takes, also where noise is spread
    was_sure: bool = False  # the last run had all in fp32 that may matter

    def run(self) -> PrecisionPlan:
        allowance: float | None = allowance_of(self.budget)
        for _ in range(MOST_PLANS):
            if allowance is None or len(self.tried) == MOST_RUNS:
                break
            outcome = self._outcome(self.planning.plan(allowance, self.raised, self.at_any_cost))
            allowance = self._next(allowance, outcome)
        if not self._has_plan:
            raise self._refusal()
        worth = [[o for o in found if _has_low_work(o.plan, LITTLE)] for found in (self.passed, self.barely)]
        best = min(
            worth[0] or worth[1] or self.passed or self.barely,
            key=lambda o: (self._bytes_high(o.plan), len(o.plan.high_precision_nodes)),
        )
        best, more = self._with_more_low(best)
        plan = replace(best.plan, proof=best.proof(self.budget, len(self.tried), more))
        if _has_low_work(plan):
            return plan
        _log.warning("%s", told := self._nothing_low())
        return replace(plan, notes=(told, *plan.notes))

    @property
    def _has_plan(self) -> bool:
        """Whether a plan was found that meets the budget."""
        return bool(self.passed or self.barely)

    def _with_more_low(self, best: Outcome) -> tuple[Outcome, int]:
        """The best plan, or one with more in the low type that meets the budget, too; and how many were run for it."""
        raised = self._raised_for_good()
        course = self.planning.course(raised)
        if course is None:
            return best, 0
        tried = [outcome.plan for outcome in self.tried]
        relaxing = Relaxing(self.planning, course, self.budget, best, tried, self.proving.run)
        return relaxing.run(raised, 2 * MOST_TAKEN if self.was_sure else MOST_TAKEN), relaxing.runs

    def _raised_for_good(self) -> dict[str, Verdict]:
        """What stays high: all but nodes that were raised only for want of an edge to blame, where the table has noise
        at them to plan by.
        """
        doubtful = {n: v for n, v in self.raised.items() if v.rule == "rounding" and v.evidence != -math.inf}
        rest = {name: verdict for name, verdict in self.raised.items() if name not in doubtful}
        course = self.planning.course(rest) if doubtful else None
        if course is None:
            return self.raised
        return {n: v for n, v in self.raised.items() if n in rest or course.thresholds.get(n, NEVER) == NEVER}

    def _outcome(self, plan: PrecisionPlan) -> Outcome:
        """The outcome of a run of the plan. Plans with the same nodes high run once."""
        high = plan.high_precision_nodes
        known = next((outcome for outcome in self.tried if outcome.plan.high_precision_nodes == high), None)
        if known is not None:
            return replace(known, plan=plan)
        outcome = self.proving.run(plan)
        self.tried.append(outcome)
        _log.info("run %d: %.1f dB, %d nodes high", len(self.tried), outcome.sqnr_db, len(high))
        return outcome

    def _nothing_low(self) -> str:
        """The message for a budget that leaves all of the work in fp32."""
        others = [o.sqnr_db for o in self.tried if _has_low_work(o.plan) and not o.nonfinite]
        had = f"; the best plan tried that has some gave {max(others):.3g} dB" if others else ""
        return f"within {self.budget:g} dB none of the work can run in {self.planning.low_name}{had}"

    def _next(self, allowance: float, outcome: Outcome) -> float | None:
        """The allowance of the next plan; None ends the search."""
        if outcome.meets(self.budget + (RELAXED_DB if self.passed or self.looked else 0.0)):
            self.passed.append(outcome)
            self.passing = max(self.passing, allowance)
            return self._relaxed(allowance, outcome)
        if outcome.meets(self.budget) and not self.passed:
            self.barely.append(outcome)
        if outcome.plan.rounding is None:
            return None
        if self._look_closer(outcome):
            self.failing = math.inf
            return allowance_of(self.budget)
        return self._mended(allowance, outcome)

    def _mended(self, allowance: float, outcome: Outcome) -> float | None:
        """The allowance after a run that fell short. For NaN or Inf it raises nodes first."""
        last = len(self.tried) == MOST_RUNS - 1 and not self._has_plan
        assert outcome.plan.rounding is not None
        if outcome.plan.rounding.spread and not self.at_any_cost:
            self.at_any_cost = True  # no edge is to blame, but the budget must be met
            return self._all_of_it(outcome) if last else allowance
        if (batch := self._batch_to_look_at(outcome)) is not None and self._raise_for_nonfinite(outcome, batch, last):
            return allowance
        if not (self._has_plan or last) and self._raise_for_steps_seen(outcome):
            return allowance
        self.failing = min(self.failing, allowance)
        wanted = self._all_of_it(outcome) if last else self._reduced(allowance, outcome)
        if self._has_plan or self._raises_more(wanted, outcome):
            return wanted
        return allowance if self._raise_for_steps(outcome, last) else None

    def _all_of_it(self, outcome: Outcome) -> float:
        """The allowance of the plan that is surest to meet the budget, for the last run. Some may go back down."""
        self._raise_for_steps(outcome, last=True)
        self.was_sure = True
        return 0.0

    def _look_closer(self, outcome: Outcome) -> bool:
        """Measure what rounding does to the worst channel of a run, where it has much more noise than the table says:
        that is of all channels together, and another edge may be to blame. False where that was not done.
        """
        place = outcome.worst_place
        key = (place.batch, place.output, place.channel)
        if not _is_unforeseen(outcome) or place.noise < OUTLYING * place.mean or self._has_plan or outcome.nonfinite:
            return False
        if key in self.looked or len(self.looked) == MOST_LOOKS or len(self.tried) == MOST_RUNS - 1:
            return False
        noises = self.proving.noise_at_worst(outcome)
        if noises is None or place.output is None:
            return False
        self.looked.add(key)
        self.planning = self.planning.with_noise(noises, place.output)
        return True

    def _batch_to_look_at(self, outcome: Outcome) -> Batch | None:
        """The batch in which something became non-finite; or, where the run missed by far what the table predicts, the
        worst one: an Inf inside may have given a 0 at the end.
        """
        return outcome.bad or (self.proving.worst_batch(outcome) if _is_unforeseen(outcome, FAR_DB) else None)

    def _raises_more(self, allowance: float | None, outcome: Outcome) -> bool:
        if allowance is None:
            return False
        plan = self.planning.plan(allowance, self.raised, self.at_any_cost)
        return plan.high_precision_nodes != outcome.plan.high_precision_nodes

    def _reduced(self, allowance: float, outcome: Outcome) -> float | None:
        """A lower allowance, by as much as the budget was missed; by a little where it was met, but not by
        `RELAXED_DB`. Integers have no SQNR: their share of changes counts like an amplitude.
        """
        missed = -spare_db(outcome, self.budget)
        if missed <= 0:
            missed = 20 * math.log10(max(outcome.changed / most_changed(self.budget), 1.0))
        factor = MUCH_LESS if missed > FAR_DB else min(LESS, 10 ** ((missed + PAST_DB) / 20))
        return self._changing(allowance, allowance / factor**2, outcome.plan)

    def _relaxed(self, allowance: float, outcome: Outcome) -> float | None:
        spare = spare_db(outcome, self.budget)
        if spare <= SPARE_DB or not any(d.rule == "rounding" for d in outcome.plan.decisions):
            return None
        wanted = allowance * 10 ** (min(spare - 1, 60.0) / 10)
        if wanted >= self.failing:
            wanted = math.sqrt(allowance * self.failing)
        return self._changing(allowance, wanted, outcome.plan)

    def _changing(self, before: float, wanted: float, plan: PrecisionPlan) -> float | None:
        """`wanted`, or where that leaves the plan the same, the next lower allowance that does not; else None."""
        course = self.planning.course(self.raised)
        limits = () if course is None else [step.allowance for step in course.steps]
        if any(min(wanted, before) < limit <= max(wanted, before) for limit in limits):
            return wanted
        further = [limit for limit in limits if 0 < limit <= wanted] if wanted < before else []
        return math.nextafter(max(further), 0.0) if further else None

    def _raise_for_nonfinite(self, outcome: Outcome, batch: Batch, last: bool) -> bool:
        """Raise the nodes that round the inputs of those where NaN or Inf begin, and whatever rounds a value on its way
        that the low type does not hold. The next call goes one ring up, the last all the way. False where nothing is
        left to raise.
        """
        lost = self.proving.nonfinite_nodes(outcome.plan, batch)
        most = torch.finfo(self.planning.judge.low_type).max
        reached, first = nonfinite_paths(self.planning, lost)
        low, before = set(outcome.plan.low_precision_nodes), set(self.raised)
        beyond = reached.intersection(self.proving.nodes_beyond(most, batch))
        run = f"in a run of batch {batch.index}{' with inputs times two' if batch.doubled else ''}"
        for name in sorted(first) or lost[:1]:
            reason = f"in {self.planning.low_name} it made `{name}` NaN or Inf {run}"
            self._raise(nodes_around(self.planning, {name}, low, last), reason, -math.inf)
        for name in sorted(beyond):
            reason = f"it rounds `{name}`, which passed {most:g} {run}"
            self._raise(self.planning.rounding({name}) & low - self.raised.keys(), reason, -math.inf)
        return self.raised.keys() > before

    def _raise_for_steps_seen(self, outcome: Outcome) -> bool:
        """Raise what decides the steps that a run has changed, where it has more noise than the table of edges predicts
        and these make it: each edge alone changed nothing, and all together do. False where that is not so.
        """
        if not _is_unforeseen(outcome) or outcome.nonfinite or not (steps := steps_of(self.planning)):
            return False
        changed = self.proving.steps_to_blame(outcome, steps)
        named = ", ".join(f"`{name}`" for name in changed[:3])
        reason = f"a run missed the budget, and many edges together change a step at {named}"
        return self._raise_around(changed, reason, outcome, whole=False)

    def _raise_for_steps(self, outcome: Outcome, last: bool) -> bool:
        """Raise what decides any step, or makes the program's results. False where nothing is left to raise."""
        reason = "a run missed the budget, and no edge alone is to blame: many together change a step or a result"
        names = set(steps_of(self.planning)) or self.planning.makers({OUTPUT})
        return self._raise_around(names, reason, outcome, last)

    def _raise_around(self, names: Collection[str], reason: str, outcome: Outcome, whole: bool) -> bool:
        before = set(self.raised)
        ring = nodes_around(self.planning, names, outcome.plan.low_precision_nodes, whole)
        self._raise(ring, reason, outcome.sqnr_db)
        return self.raised.keys() > before

    def _raise(self, names: Collection[str], reason: str, sqnr_db: float) -> None:
        self.raised.update(dict.fromkeys(sorted(names), Verdict("rounding", reason, sqnr_db, self.budget)))

    def _bytes_high(self, plan: PrecisionPlan) -> int:
        return sum(self.planning.facts.sizes.get(name, 0) for name in plan.high_precision_nodes)

    def _refusal(self) -> BudgetError:
        best = max(self.tried, key=lambda o: (spare_db(o, self.budget), -o.changed))
        name = self.planning.low_name
        had = {name: best.sqnr_db if not best.nonfinite else -math.inf, **self._others()}
        given = "; ".join(f"{'' if n == name else 'with '}{n} gives {v:.3g} dB" for n, v in had.items())
        edges = () if best.plan.rounding is None else best.plan.rounding.edges
        blame = "".join(f"\n  {edge}" for edge in edges)
        place = best.worst
        where = f" (batch {place.batch}, output {place.output})" if place.batch is not None else ""
        lost = f", and {best.nonfinite} elements are newly NaN or Inf" if best.nonfinite else ""
        remedy = (
            "Lower min_sqnr_db, or use another type." if best.plan.rounding is not None
            else "Calibrate with rounding_batches=4, so that plans can be mended."
        )  # fmt: skip
        return BudgetError(
            f"no plan meets the budget of {self.budget:g} dB in {len(self.tried)} runs: at best {given}{where}{lost}. "
            f"{remedy}{f' What costs most under the best plan:{blame}' if blame else ''}",
            best.proof(self.budget, len(self.tried)), edges,
        )  # fmt: skip

    def _others(self) -> Mapping[str, float]:
        """The SQNR, dB, that a run of the plan in each other type has shown."""
        found: dict[str, float] = {}
        for name, low_type in LOW_TYPES.items():
            if name != self.planning.low_name and low_type in self.planning.facts.rounding:
                outcome = self.proving.run(self.planning.in_type(low_type, self.budget).plan())
                found[name] = outcome.sqnr_db if not outcome.nonfinite else -math.inf
        return found
