"""`what_if`: what other thresholds and types would decide and cost, from the statistics that were measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from calibcast.calib.errors import SettingError
from calibcast.calib.execution import require_program
from calibcast.calib.gc_pause import paused
from calibcast.calib.graph import dtype_name, module_path
from calibcast.calib.ranges import RangeTable, require_table
from calibcast.passes.cast_count import CastCounter
from calibcast.passes.classification import masked_nodes
from calibcast.passes.decisions import decide
from calibcast.passes.flips import Flips, flips_of
from calibcast.passes.judge import Judge
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.program_facts import ProgramFacts
from calibcast.passes.rounding_course import Course
from calibcast.passes.rounding_planning import course_for, low_nodes, with_rounding
from calibcast.passes.settings import Settings, check_limits, low_type_of
from calibcast.passes.shares import LossTable
from calibcast.passes.verdict import LOW
from calibcast.passes.what_if_table import Alternatives
from calibcast.passes.work import WorkCounter
from torch.export import ExportedProgram


@dataclass(frozen=True)
class Setting:
    """One combination to decide: low type, `data_max`, quantile and budget; None as in `classify`."""

    low_type: torch.dtype
    data_max: float | None = None
    quantile: float = 1.0
    budget: float | None = None


def what_if(  # noqa: PLR0913 - `classify`'s arguments
    program: ExportedProgram,
    ranges: RangeTable,
    data_max: float | Sequence[float | None] | None = None,
    low_precision_type: torch.dtype | str | Sequence[torch.dtype | str] = (torch.float16,),
    range_quantile: float | Sequence[float] = (1.0,),
    min_sqnr_db: float | Sequence[float | None] | None = None,
    base: PrecisionPlan | None = None,
    keep_io_types: bool = True,
    weights: str = "warn",
    **settings: Any,
) -> Alternatives:
    """Decide again for every combination of these settings, with all rules and without calibrating again.

    Each of `data_max`, `low_precision_type`, `range_quantile` and `min_sqnr_db` is one value or several; `settings` are
    further arguments of `classify`, the same for all rows. The frame, of polars, has one row per combination, with the
    columns of `what_if_table.SCHEMA`; its numbers are those of `classify` and `insert_casts` with the same arguments:

    data_max, min_sqnr_db: as they were applied; null where there was none.
    predicted_sqnr_db: the SQNR at the worst output, predicted from the table of edges; null where rounding was not
    measured.

    nodes_low, nodes_high, work_low (FLOPs); the shares are of all decided nodes and their work.
    activation_bytes_low: what nodes write in the low type, without views, in bytes of the exported type, so that its
    share is a share of elements. casts, bytes_cast: how many casts, and the bytes that they read at the exported sizes.
    overflow, underflow: the share of elements that would round to inf, or are nonzero below the smallest normal value,
    among the inputs and activations that exist in the low type. These are upper bounds; `.._at_least` are the lower
    ones. Both are equal, and so exact, where the limit is a power of two.
    to_low, to_high: nodes that differ from `base`; without one, from the plan of `classify` in fp16 with `settings` and
    defaults otherwise.

    Raises:
        PlanError: as `classify`; or `base` is of another program.
        MismatchError: the ranges are of another program.
    """
    require_table(ranges)
    asked = [
        Setting(low_type_of(low_type), limit, quantile, budget)
        for low_type, limit, quantile, budget in product(
            _several(low_precision_type), _several(data_max), _several(range_quantile), _several(min_sqnr_db)
        )
    ]
    if not asked:
        raise SettingError(
            "nothing to ask: give at least one data_max, low_precision_type, range_quantile and min_sqnr_db"
        )
    for setting in asked:
        check_limits(setting.data_max, None, None, setting.quantile, ranges)
    require_program(program)
    ranges.check(program, weights)
    if base is not None:
        base.check(program)
    with paused():
        decider = _Decider(program, ranges, Settings(**settings))
        counter = CastCounter(program, keep_io_types, masked_nodes(ranges))
        before = set(decider.low_nodes(Setting(torch.float16)) if base is None else base.low_precision_nodes)
        losses = {low_type: LossTable(ranges.frame, low_type) for low_type in {setting.low_type for setting in asked}}
        rows = [_row(setting, decider, counter, losses[setting.low_type], before) for setting in asked]
        modules = {candidate.name: module_path(candidate.node) for candidate in decider.nodes}
        return Alternatives.of(rows, modules, "the defaults, fp16" if base is None else "the plan `base`")


class _Decider:
    """Says which nodes are low at a setting. The program is read once; rules are asked once per type and quantile."""

    def __init__(self, program: ExportedProgram, ranges: RangeTable, settings: Settings) -> None:
        self._facts, self._ranges, self._settings = ProgramFacts.of(program, ranges), ranges, settings
        self.nodes = self._facts.nodes
        self._flips: dict[tuple[torch.dtype, float, float | None], Flips] = {}
        self._courses: dict[tuple[torch.dtype, float], Course | None] = {}
        count = WorkCounter()
        self._all_work = {candidate.name: count(candidate.node) for candidate in self._facts.nodes}
        self.work = {name: self._all_work[name] for name in self._facts.outlines}

    def low_nodes(self, setting: Setting) -> list[str]:
        """The low nodes in graph order, as in `PrecisionPlan.low_precision_nodes`."""
        judge = self.judge(setting)
        if self._settings.rules:  # a rule of the user's own may look at how the inputs were decided
            decisions = decide(self._facts, judge, self._all_work)
            return [decision.node for decision in decisions if decision.precision == LOW]
        budget = None if judge.rounding is None else judge.rounding.min_sqnr_db
        key = (setting.low_type, setting.quantile, budget)
        if key not in self._flips:
            self._flips[key] = flips_of(self._facts, judge)
        return low_nodes(self._facts, judge, self._flips[key])

    def judge(self, setting: Setting) -> Judge:
        """The judge of a setting, with what its budget keeps high. All budgets share one order of raising."""
        settings = replace(
            self._settings, data_max=setting.data_max, range_quantile=setting.quantile, min_sqnr_db=setting.budget
        )
        judge = settings.judge(self._facts.nodes, self._ranges, setting.low_type)
        key = (setting.low_type, setting.quantile)
        if key not in self._courses:
            self._courses[key] = course_for(self._facts, judge)
        return with_rounding(self._facts, judge, course=self._courses[key])


def _row(
    setting: Setting, decider: _Decider, counter: CastCounter, losses: LossTable, before: set[str]
) -> dict[str, Any]:
    low, judge = decider.low_nodes(setting), decider.judge(setting)
    is_low, work = set(low), decider.work
    counted = counter.count(low, setting.low_type)
    work_low = sum(work[name] for name in low)
    return {
        "low_precision_type": dtype_name(setting.low_type),
        "data_max": judge.data_max,
        "range_quantile": setting.quantile,
        "min_sqnr_db": None if judge.rounding is None else judge.budget,
        "predicted_sqnr_db": None if judge.rounding is None else judge.rounding.predicted_db,
        "nodes_low": len(low),
        "nodes_high": len(work) - len(low),
        "nodes_share": _share(len(low), len(work)),
        "work_low": work_low,
        "work_share": _share(work_low, sum(work.values())),
        "activation_bytes_low": counted.activation_bytes_low,
        "activation_share": _share(counted.activation_bytes_low, counter.activation_bytes),
        "casts": counted.casts,
        "bytes_cast": counted.bytes_cast,
        **vars(losses.of(counted.low)),
        "to_low": [name for name in low if name not in before],
        "to_high": [name for name in work if name in before and name not in is_low],
    }


def _several(value: Any) -> Iterator[Any]:
    yield from (value if isinstance(value, Iterable) and not isinstance(value, str) else [value])


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
