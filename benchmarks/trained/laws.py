"""Whether tuned plans are what they should be, over all rows of the benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from calibcast.calib.errors import BudgetError
from calibcast.calib.ranges import RangeTable
from calibcast.passes.judge import default_budget
from calibcast.passes.tuning import tune

from benchmarks.trained.judgement import Judge, Judged

GRACE_DB = 2.0  # of the budget, on data that the plan was not tuned on
_SAME_DB = 0.5  # what is not better than this is equal
_PLANS = ("rules", "tune", "whole-half", "data_max=inf")


def at_equal_sqnr(tuned: Judged, rules: Judged, judge: Judge, ranges: RangeTable, low_type: torch.dtype) -> Judged:
    """`tuned`; where rules have fewer bytes in fp32, with what it takes to be as good as they are and no better."""
    if tuned.refused or tuned.bytes_high <= rules.bytes_high or not rules.calibration.worst > 0:
        return tuned
    budget = min(rules.calibration.worst, default_budget(low_type))
    try:
        plan = tune(judge.program, ranges, judge.subject.calibration, budget, low_precision_type=low_type)
    except BudgetError:
        return replace(tuned, equal_bytes=tuned.bytes_high)  # what rules give, `tune` does not find
    counted = judge.counter.count(plan.low_precision_nodes, plan.low_precision_type)
    return replace(tuned, equal_bytes=judge.counter.activation_bytes - counted.activation_bytes_low)


def laws(found: Iterable[Judged]) -> Iterator[str]:
    """Lines of Markdown: totals; then each law, in how many cases it holds, and where it does not."""
    groups: dict[tuple[str, str], dict[str, Judged]] = {}
    for row in found:
        groups.setdefault((row.network, row.type_name), {})[row.plan] = row
    yield "\n## In all\n"
    both = [rows for rows in groups.values() if _within(rows["rules"]) and _within(rows["tune"])]
    for plan in (plan for plan in _PLANS if all(plan in rows for rows in groups.values())):
        yield _total(plan, [rows[plan] for rows in groups.values()], sum(rows[plan].high for rows in both))
    yield f"\nNodes are counted in the {len(both)} cases in which both rules and `tune` are within the budget."
    asked = {key: rows for key, rows in groups.items() if any(_within(row) for row in rows.values())}
    missed = [f"{_name(key)}: {_why(rows)}" for key, rows in asked.items() if not _within(rows["tune"])]
    yield "\n## Laws\n"
    yield from _law("`tune` is within the budget on held-out data (2 dB of grace) wherever any plan is", asked, missed)
    tuned = {key: rows for key, rows in groups.items() if not rows["tune"].refused}
    wasted = [
        f"{_name(key)}: {rows['tune'].bytes_high} bytes in fp32, by rules {rows['rules'].bytes_high}"
        for key, rows in tuned.items()
        if _wastes(rows["tune"], rows["rules"])
    ]
    yield from _law("at equal SQNR `tune` has no more bytes in fp32 than the rules", tuned, wasted)


def _total(plan: str, rows: list[Judged], nodes: int) -> str:
    """How often a plan is within the budget, and what it costs."""
    within, refused = sum(map(_within, rows)), sum(bool(row.refused) for row in rows)
    said = f", {refused} refused" if refused else ""
    held = f"within the budget on held-out data (2 dB of grace) in {within} of {len(rows)}{said}"
    return f"- {plan}: {held}; {nodes} fp32 nodes"


def _law(text: str, cases: Mapping[tuple[str, str], object], failures: list[str]) -> Iterator[str]:
    yield f"- {text}: holds in {len(cases) - len(failures)} of {len(cases)}{':' if failures else '.'}"
    yield from (f"    - not in {failure}" for failure in failures)


def _name(key: tuple[str, str]) -> str:
    return f"{key[0]}, {key[1]}"


def _within(row: Judged) -> bool:
    """Within the budget on held-out data; a plan that has all work in fp32 shows nothing."""
    if row.refused or not row.work_low > 0.001:
        return False
    budget = default_budget({"fp16": torch.float16, "bf16": torch.bfloat16}[row.type_name])
    return row.held_out.worst >= budget - GRACE_DB


def _why(rows: Mapping[str, Judged]) -> str:
    others = ", ".join(name for name, row in rows.items() if _within(row))
    tuned = rows["tune"]
    seen = "refused" if tuned.refused else f"{tuned.held_out.worst:.1f} dB"
    return f"{seen}, but within it are {others}"


def _wastes(tuned: Judged, rules: Judged) -> bool:
    """Whether `tune` keeps more than the rules, and not for what it gains by it."""
    if tuned.bytes_high <= rules.bytes_high:
        return False
    if tuned.held_out.worst <= rules.held_out.worst + _SAME_DB:
        return True
    return tuned.equal_bytes is not None and tuned.equal_bytes > rules.bytes_high
