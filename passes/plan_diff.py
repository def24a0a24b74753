"""Which decisions differ between two plans, or between the plans that two range tables lead to."""

from __future__ import annotations

from typing import Any

import polars as pl
from calibcast.calib.alignment import aligned
from calibcast.calib.graph_digests import first_difference
from calibcast.calib.range_diff import RangeDiff
from calibcast.passes.classification import classify
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.tensor_diff import SCHEMA
from calibcast.passes.verdict import HIGH, KEPT, LOW
from torch.export import ExportedProgram


def plan_diff(old: PrecisionPlan, new: PrecisionPlan) -> pl.DataFrame:
    """What differs between two plans of one model, one row per node, with the columns of `SCHEMA`.

    change: `to_high` and `to_low` for a node that flips, `rule` for one that is high by another rule, `new` and `gone`
    for one that the other plan lacks; nodes with the same decision have no row. reason: that of the new plan, or of
    the old one for a node that is gone. Plans of different exports of the model are aligned as range tables are.
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
    """`plan_diff` of the plans that the old and the new ranges give for `program`, with `classify`'s settings.

    `program` is the one that the new table was measured on. Old ranges of another export of the model are carried over
    to it first. Nodes that read or give a tensor without old ranges are left out, as their old decision is unknown.
    Raises MismatchError when the new table is of another program.
    """
    new = classify(program, diff.new, **{"weights": "ignore", **settings})
    old = classify(program, diff.old_as_new, **{"weights": "ignore", **settings})
    lately = {d.node for d in old.decisions if any(v.rule == "unmeasured" for v in d.verdicts)}
    return plan_diff(old, new).filter(~pl.col("node").is_in(list(lately)))


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
