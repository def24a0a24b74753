"""The nodes that a plan keeps in their exported type, and why, as text."""

from __future__ import annotations

from calibcast.calib.text_table import Column, and_more, text_table
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.verdict import HIGH

_COLUMNS = (
    Column("node", "node", 24),
    Column("module", "module", 24, drop=1),
    Column("rule", "rule", 16, head=True, drop=2),
    Column("reason", "reason", wrap=True),
)


def high_nodes(plan: PrecisionPlan, rows: int | None = None) -> str:
    """A line for each of the first `rows` (None: all) nodes that stay, in graph order; a sentence where none does."""
    kept = [decision for decision in plan.decisions if decision.precision == HIGH]
    if not kept:
        return "every node that a plan decides on runs in the low type"
    shown = kept if rows is None else kept[:rows]
    table = text_table([vars(decision) for decision in shown], _COLUMNS, indent="  ")
    more = and_more(len(shown), len(kept), "; --rows 0 shows all")
    return "\n".join(["stay in their exported type:", *table, *(f"  {line}" for line in more)])
