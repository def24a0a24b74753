"""Where error enters a cast graph, and what a plan should do about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import polars as pl
from calibcast.passes.comparison_result import CULPRIT_DB, Comparison
from calibcast.passes.lineage import Row, readings
from calibcast.passes.plan import PrecisionPlan
from torch.export import ExportedProgram


@dataclass(frozen=True)
class ErrorSource:
    """A node where error enters, why, and the nodes to keep in their exported type (none: a plan cannot help)."""

    node: str
    finding: str
    exclude: tuple[str, ...]


def error_sources(program: ExportedProgram, plan: PrecisionPlan, comparison: Comparison) -> tuple[ErrorSource, ...]:
    """One for each culprit of `comparison`, the largest loss first, with what `plan` says about it."""
    reads, low = readings(program.graph_module), frozenset(plan.low_precision_nodes)
    return tuple(
        _of_node(row["node"], plan, reads[row["node"]], low)
        if row["kind"] == "activation"
        else _of_weight(row, [name for name, rows in reads.items() if (row["node"], 0) in rows and name in low])
        for row in comparison.culprits.iter_rows(named=True)
    )


def _of_node(node: str, plan: PrecisionPlan, reads: tuple[Row, ...], low: frozenset[str]) -> ErrorSource:
    if node in low:
        return ErrorSource(node, plan.explain(node), (node,))
    makers = tuple(dict.fromkeys(name for name, _ in reads if name in low))
    if makers:
        return ErrorSource(node, f"{plan.explain(node)} It reads what was rounded before: {', '.join(makers)}.", makers)
    why = "It reads no low node: it amplifies what came before, or the model itself has it in half."
    return ErrorSource(node, f"{plan.explain(node)} {why}", ())


def _of_weight(row: dict[str, Any], readers: list[str]) -> ErrorSource:
    """A weight has no plan of its own: it is stored low because all of its readers are."""
    lost = "overflow" if row["nonfinite_alone"] else "vanish or round away"
    finding = f"{row['node']} ({row['kind']}): its values {lost} in {row['dtype']}, in which it is stored."
    return ErrorSource(row["node"], finding, tuple(readers))


def in_true_values(comparison: Comparison, exponents: Mapping[str, int]) -> Comparison:
    """The comparison of a rescaled program with every magnitude as the network itself has it.

    exponents: k by `node:output` of what is stored as 2^-k times its true value.
    """
    frame = comparison.frame
    k = pl.concat_str("node", pl.lit(":"), "output").replace_strict(dict(exponents), default=0, return_dtype=pl.Float64)
    true = [(pl.col(name) * pl.lit(2.0).pow(k)).alias(name) for name in ("max_abs", "absmax", "absmax_reference")]
    first = comparison.first_nonfinite
    if first is not None:
        scale = 2.0 ** exponents.get(f"{first.node}:{first.output}", 0)
        first = replace(first, absmax_reference=first.absmax_reference * scale)
    return replace(
        comparison, frame=frame.with_columns(true), culprits=comparison.culprits.with_columns(true),
        first_nonfinite=first,
    )  # fmt: skip


def diagnosis_text(program: ExportedProgram, plan: PrecisionPlan, comparison: Comparison, rows: int) -> str:
    """What `calibcast diagnose` prints: the comparison, why the culprits have their types, and what to do.

    rows: of each table, and of the culprits that are explained.
    """
    found = error_sources(program, plan, comparison)
    stored = len(plan.exponents)
    lines = [
        *([f"a rescaled program, in true values: {stored} tensors are stored as powers of two of them"] * bool(stored)),
        in_true_values(comparison, plan.exponents).table(rows),
    ]
    if found:
        lines.append("why, by the plan:")
        lines += [f"  {source.finding}" for source in found[:rows]]
    return "\n".join([*lines, "what to do:", *(f"  {line}" for line in _advice(comparison, found[:rows]))])


def _advice(comparison: Comparison, found: tuple[ErrorSource, ...]) -> list[str]:
    exclude = dict.fromkeys(name for source in found for name in source.exclude)
    if exclude:
        # A command that can be pasted, a line for each option: it must not be broken by a terminal's width.
        options = [f"  --nodes-to-exclude '^{re.escape(name)}$'" for name in exclude]
        command = " \\\n".join(["calibcast plan MODEL RANGES -o PLAN", *options]).split("\n")
        more = ", and diagnose again: what comes after may have its own" if comparison.first_nonfinite else ""
        return [f"keep these in fp32{more}:", *(f"  {line}" for line in command)]
    worst = comparison.frame.filter(pl.col("kind") == "activation", pl.col("sqnr_db").is_finite())
    if (
        comparison.first_nonfinite is None
        and not comparison.culprits.height
        and (not worst.height or worst["sqnr_db"][0] >= CULPRIT_DB)
    ):
        return ["nothing: no node is non-finite and none loses much"]
    return [
        "no node that a plan decides on is to blame alone: error builds up over many. Give more of them fp32 (a lower "
        "--data-max, a --max-depth-of-reduction, a module under --nodes-to-exclude), or try another low type.",
    ]
