"""Which decisions differ between two range tables, judged by tensors alone, without a program or torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl
from calibcast.calib.range_diff import RangeDiff
from calibcast.calib.ranges import RangeTable
from calibcast.passes.evidence import evidence_of
from calibcast.passes.facts import NodeFacts, TensorFacts
from calibcast.passes.number_formats import NumberFormat, format_of
from calibcast.passes.tensor_rules import DataMax, InitMax, Nonfinite, Storage
from calibcast.passes.verdict import HIGH, LOW, Rule, Verdict

if TYPE_CHECKING:
    import torch

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


def tensor_decision_diff(
    diff: RangeDiff, low_precision_type: torch.dtype | str = "float16", data_max: float = 512.0
) -> pl.DataFrame:
    """As `decision_diff`, without the program: each tensor is judged alone, by the rules that need nothing else.

    A node flips here when its output crosses a limit. Its readers, which would flip with it, and what only the graph
    tells (literals, sums inside operators, ties) are not known without a program.
    """
    low = format_of(low_precision_type)
    rules: tuple[Rule, ...] = (Nonfinite(), DataMax(data_max), InitMax(low.max), Storage())
    sides = [evidence_of(_at(t, diff.pairs[r])) for t, r in ((diff.old, "old_row"), (diff.new, "new_row"))]
    names = diff.frame.select("node_old", "node", "output", "op", "module").filter(diff.frame["change"].is_in(_BOTH))
    rows = []
    for name, node, output, op, module in names.iter_rows():
        before, after = sides[0].get((name, output)), sides[1].get((node, output))
        if before is None or after is None or before == after:
            continue
        was, now = (_first(rules, t, op, module, low) for t in (before, after))
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


def _first(rules: tuple[Rule, ...], tensor: TensorFacts, op: str, module: str, low: NumberFormat) -> Verdict | None:
    facts = NodeFacts(name=tensor.name, op=op, module=module, outputs=(tensor,), low_type=low)
    return next((verdict for rule in rules if (verdict := rule(facts)) is not None), None)
