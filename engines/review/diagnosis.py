"""From where error enters a cast graph to what a plan should do about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import polars as pl
from calibcast.passes.comparison import CULPRIT_DB, Comparison
from calibcast.passes.lineage import Row, readings
from calibcast.passes.plan import PrecisionPlan
from torch.export import ExportedProgram


@dataclass(frozen=True)
class Remedy:
    """A node where error enters, why, and the nodes to keep in their exported type (none: nothing that a plan does)."""

    node: str
    finding: str
    exclude: tuple[str, ...]


def remedies(program: ExportedProgram, plan: PrecisionPlan, comparison: Comparison) -> tuple[Remedy, ...]:
    """One for each culprit of `comparison`, the largest loss first, with what `plan` says of it."""
    reads, low = readings(program.graph_module), frozenset(plan.low_precision_nodes)
    return tuple(
        _of_node(row["node"], plan, reads[row["node"]], low)
        if row["kind"] == "activation"
        else _of_weight(row, [name for name, rows in reads.items() if (row["node"], 0) in rows and name in low])
        for row in comparison.culprits.iter_rows(named=True)
    )


def _of_node(node: str, plan: PrecisionPlan, reads: tuple[Row, ...], low: frozenset[str]) -> Remedy:
    if node in low:
        return Remedy(node, plan.explain(node), (node,))
    makers = tuple(dict.fromkeys(name for name, _ in reads if name in low))
    if makers:
        return Remedy(node, f"{plan.explain(node)} It reads what was rounded before: {', '.join(makers)}.", makers)
    why = "It reads no low node: it amplifies what came before, or the model itself has it in half."
    return Remedy(node, f"{plan.explain(node)} {why}", ())


def _of_weight(row: dict[str, Any], readers: list[str]) -> Remedy:
    """A weight has no plan of its own: it is stored low because all of its readers are."""
    lost = "overflow" if row["nonfinite_alone"] else "vanish or round away"
    finding = f"{row['node']} ({row['kind']}): its values {lost} in {row['dtype']}, in which it is stored."
    return Remedy(row["node"], finding, tuple(readers))


def report(program: ExportedProgram, plan: PrecisionPlan, comparison: Comparison, rows: int) -> str:
    """What `calibcast diagnose` prints: the comparison, why the culprits have their types, and what to do.

    rows: of each table, and of the culprits that are explained.
    """
    found = remedies(program, plan, comparison)
    lines = [comparison.table(rows)]
    if found:
        lines.append("why, by the plan:")
        lines += [f"  {remedy.finding}" for remedy in found[:rows]]
    return "\n".join([*lines, "what to do:", *(f"  {line}" for line in _advice(comparison, found[:rows]))])


def _advice(comparison: Comparison, found: tuple[Remedy, ...]) -> list[str]:
    exclude = dict.fromkeys(name for remedy in found for name in remedy.exclude)
    if exclude:
        # A row of patterns that the command line takes as they stand.
        options = " ".join(f"--nodes-to-exclude '^{re.escape(name)}$'" for name in exclude)
        more = ", and diagnose again: what comes after may have its own" if comparison.first_nonfinite else ""
        return [f"keep these in fp32{more}: calibcast plan MODEL RANGES -o PLAN {options}"]
    worst = comparison.frame.filter(pl.col("kind") == "activation", pl.col("sqnr_db").is_finite())
    if (
        comparison.first_nonfinite is None
        and not comparison.culprits.height
        and (not worst.height or worst["sqnr_db"][0] >= CULPRIT_DB)
    ):
        return ["nothing: no node is non-finite and none loses much"]
    return [
        "no node that a plan decides on is to blame alone: error builds up over many. Give more of them fp32 (a lower",
        "--data-max, a --max-depth-of-reduction, a module under --nodes-to-exclude), or try another low type.",
    ]
