"""Which decisions change: between two plans, or between what two range tables would decide."""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from torch.export import ExportedProgram

from calib.alignment import aligned
from calib.fingerprint import first_difference
from calib.range_diff import RangeDiff
from calib.ranges import RangeTable
from passes.classification import classify
from passes.evidence import evidence_of
from passes.facts import NodeFacts, TensorFacts
from passes.plan import HIGH, KEPT, LOW, PrecisionPlan
from passes.rules import DataMax, InitMax, Nonfinite, Rule, Storage, Verdict
from passes.settings import low_type_of

SCHEMA: dict[str, Any] = {
    "node": pl.String,
    "node_old": pl.String,
    "op": pl.String,
    "module": pl.String,
    "change": pl.String,
    "precision_old": pl.String,
    "precision_new": pl.String,
    "rule_old": pl.String,
    "rule_new": pl.String,
    "evidence_old": pl.Float64,
    "evidence_new": pl.Float64,
    "limit": pl.Float64,
    "reason": pl.String,
}


def plan_diff(old: PrecisionPlan, new: PrecisionPlan) -> pl.DataFrame:
    """What differs between two plans of one model, one row per node, with the columns of `SCHEMA`.

    change: `to_high` and `to_low` for a node that flips, `rule` for one that is high by another rule, `new` and `gone`
    for one that the other plan lacks; nodes that are decided alike have no row. reason: the new one, of a node that is
    gone the old. Plans of another export of the model are aligned as range tables are.
    """
    same_graph = first_difference(dict(old.digests), dict(new.digests)) is None
    pairs = aligned(_rows(old), _rows(new), same_graph)
    rows = []
    for before, after in pairs.iter_rows():
        was = None if before is None else old.decisions[before]
        now = None if after is None else new.decisions[after]
        change = _change(was, now)
        place = now or was
        if change is None or place is None:
            continue
        rows.append(
            {
                "node": place.node, "node_old": was and was.node, "op": place.op, "module": place.module,
                "change": change, "precision_old": was and was.precision, "precision_new": now and now.precision,
                "rule_old": was and was.rule, "rule_new": now and now.rule, "evidence_old": was and was.evidence,
                "evidence_new": now and now.evidence, "limit": place.limit, "reason": place.reason,
            }
        )  # fmt: skip
    return pl.DataFrame(rows, schema=SCHEMA)


def decision_diff(diff: RangeDiff, program: ExportedProgram, **settings: Any) -> pl.DataFrame:
    """`plan_diff` of what the old and the new ranges decide for `program`, with `classify`'s settings.

    `program` is the one that the new table was measured on. Ranges of another export of the model are carried over
    to it first; nodes that read or give a tensor without old ranges are left out: nothing is known of what they were.
    Raises MismatchError when the new table is of another program.
    """
    new = classify(program, diff.new, **{"weights": "ignore", **settings})
    old = classify(program, diff.old_as_new, **{"weights": "ignore", **settings})
    lately = {d.node for d in old.decisions if any(v.rule == "unmeasured" for v in d.verdicts)}
    return plan_diff(old, new).filter(~pl.col("node").is_in(list(lately)))


def tensor_decision_diff(
    diff: RangeDiff, low_precision_type: torch.dtype | str = torch.float16, data_max: float = 512.0
) -> pl.DataFrame:
    """As `decision_diff`, without the program: from each tensor alone, by the rules that look at nothing else.

    A node flips here when what it gives crosses a limit. Its readers, which would flip with it, and what the graph
    says (literals, sums inside, ties) take a program to know.
    """
    low_type = low_type_of(low_precision_type)
    rules: tuple[Rule, ...] = (Nonfinite(), DataMax(data_max), InitMax(float(torch.finfo(low_type).max)), Storage())
    sides = [evidence_of(_at(t, diff.pairs[r])) for t, r in ((diff.old, "old_row"), (diff.new, "new_row"))]
    names = diff.frame.select("node_old", "node", "output", "op", "module").filter(diff.frame["change"].is_in(_BOTH))
    rows = []
    for name, node, output, op, module in names.iter_rows():
        before, after = sides[0].get((name, output)), sides[1].get((node, output))
        if before is None or after is None or before == after:
            continue
        was, now = (_first(rules, t, op, module, low_type) for t in (before, after))
        if (was is None) == (now is None):
            continue
        decisive = now or was
        assert decisive is not None
        rows.append(
            {
                "node": node, "node_old": name, "op": op, "module": module,
                "change": "to_low" if now is None else "to_high", "precision_old": LOW if was is None else HIGH,
                "precision_new": LOW if now is None else HIGH, "rule_old": was and was.rule,
                "rule_new": now and now.rule, "evidence_old": was.evidence if was else before.absmax,
                "evidence_new": now.evidence if now else after.absmax, "limit": decisive.limit,
                "reason": now.reason if now else "no rule that looks at tensors alone is met any more",
            }
        )  # fmt: skip
    return pl.DataFrame(rows, schema=SCHEMA).unique(["node", "change"], keep="first", maintain_order=True)


_BOTH = ("grew", "shrank", "same")


def _at(table: RangeTable, rows: pl.Series) -> RangeTable:
    """The table with the rows that have a partner."""
    frame = table.frame.select(pl.all().gather(rows.drop_nulls()))
    return RangeTable(frame, table.calibration, table.hidden)


def _first(rules: tuple[Rule, ...], tensor: TensorFacts, op: str, module: str, low_type: torch.dtype) -> Verdict | None:
    facts = NodeFacts(name=tensor.name, op=op, module=module, outputs=(tensor,), low_type=low_type)
    return next((verdict for rule in rules if (verdict := rule(facts)) is not None), None)


def _rows(plan: PrecisionPlan) -> pl.DataFrame:
    """A plan's nodes as the rows that `aligned` reads."""
    names = {name: [getattr(d, name) for d in plan.decisions] for name in ("node", "op", "module")}
    return pl.DataFrame(names, schema=dict.fromkeys(names, pl.String)).with_columns(
        output=pl.lit(0, pl.Int64), kind=pl.lit("activation"), shape=pl.lit([], pl.List(pl.String))
    )


def _change(was: Any, now: Any) -> str | None:
    if was is None or now is None:
        kept = (now or was).precision == KEPT
        return None if kept else "new" if was is None else "gone"
    if was.precision != now.precision:
        return {LOW: "to_low", HIGH: "to_high"}.get(now.precision, KEPT)
    return "rule" if was.rule != now.rule else None
