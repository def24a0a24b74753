"""The ledger as text, and the gate on it."""

from __future__ import annotations

from collections import Counter

import polars as pl
from calibcast.calib.errors import GateError
from calibcast.calib.text_table import Column, and_more, text_table
from calibcast.engines.ledger.ledger import EXACT, FUSED, UNKNOWN

_SHOWN = 10
_COLUMNS = (
    Column("mark", "", 1),
    Column("node", "node"),
    Column("planned_type", "planned", 9),
    Column("actual", "actual", 19),
    Column("match", "match", 7),
    Column("found_by", "found by", 12, drop=1),
    Column("layer", "layers", head=True),
)


def unknown_share(ledger: pl.DataFrame) -> float:
    """Share of the planned nodes that nothing in the engine could be traced to; 0 for an empty ledger."""
    return float((ledger["match"] == UNKNOWN).mean() or 0.0) if ledger.height else 0.0  # type: ignore[arg-type]


def contradictions(ledger: pl.DataFrame) -> pl.DataFrame:
    """The rows whose layer runs in other types than planned."""
    return ledger.filter(pl.col("agrees").eq(False))


def require_precision(ledger: pl.DataFrame, allow_unknown: bool) -> None:
    """The gate of `strict_precision`: raises GateError with the rows that contradict the plan, or are unknown."""
    wrong = contradictions(ledger)
    lost = ledger.filter(pl.col("match") == UNKNOWN)
    problems = []
    if wrong.height:
        problems.append(f"{wrong.height} nodes do not run in their planned type: {_listed(wrong)}")
    if lost.height and not allow_unknown:
        problems.append(
            f"{lost.height} of {ledger.height} nodes could not be found in the engine: {_listed(lost)} "
            "(allow_unknown=True lets these pass)"
        )
    if problems:
        raise GateError("strict_precision says no: " + "; ".join(problems), pl.concat([wrong, lost]))


def _listed(rows: pl.DataFrame) -> str:
    texts = [
        f"{row['node']} planned {row['planned_type']}"
        + (f", found {'/'.join(row['actual_types'])} in {row['layers'][0]}" if row["layers"] else "")
        for row in rows.head(_SHOWN).iter_rows(named=True)
    ]
    return ", ".join(texts) + (f" and {rows.height - _SHOWN} more" if rows.height > _SHOWN else "")


def summary(ledger: pl.DataFrame) -> str:
    """The ledger in a line."""
    counts = Counter(ledger["match"].to_list())
    shares = ", ".join(f"{counts.get(kind, 0)} {kind}" for kind in (EXACT, FUSED, UNKNOWN))
    return (
        f"ledger: {ledger.height} planned nodes, {shares}; {contradictions(ledger).height} contradict the plan; "
        f"{100 * unknown_share(ledger):.1f}% unknown"
    )


def ledger_text(ledger: pl.DataFrame, rows: int | None = None) -> str:
    """The ledger as text: a summary, then a line per node: first those that disagree, then those that are unknown."""
    order = pl.when(pl.col("agrees").eq(False)).then(0).when(pl.col("match") == UNKNOWN).then(1).otherwise(2)
    shown = ledger.with_columns(order.alias("_order")).sort("_order", maintain_order=True).head(rows or ledger.height)
    cells = [
        {
            **row,
            "mark": "!" if row["agrees"] is False else "",
            "actual": "/".join(row["actual_types"]),
            "layer": " + ".join(row["layers"]),
        }
        for row in shown.iter_rows(named=True)
    ]
    table = text_table(cells, _COLUMNS)
    return "\n".join([summary(ledger), *table, *and_more(shown.height, ledger.height, "; --rows 0 shows all")])
