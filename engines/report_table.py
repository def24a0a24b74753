"""The range report as a plain table: worst first, readable in 100 columns."""

from __future__ import annotations

import polars as pl

from calib.ranges import RangeTable
from passes.plan import PrecisionPlan

_HALF_MAX = 65504.0  # largest finite fp16 value


def report_frame(ranges: RangeTable, plan: PrecisionPlan | None = None) -> pl.DataFrame:
    """Ranges, worst first: non-finite ones, then by magnitude. With a plan, also each node's precision and rule.

    `headroom` is how many times the tensor could grow before fp16 overflows.
    """
    frame = ranges.frame.with_columns(
        headroom=_HALF_MAX / pl.col("absmax"),
        nonfinite=pl.col("nan") + pl.col("posinf") + pl.col("neginf"),
    )
    if plan is not None:
        frame = frame.join(plan.frame.select("node", "precision", "rule"), on="node", how="left", maintain_order="left")
    keys = [pl.col("nonfinite") > 0, pl.col("absmax").fill_null(float("inf"))]
    return frame.sort(keys, descending=True, maintain_order=True)


def report_table(ranges: RangeTable, plan: PrecisionPlan | None = None, rows: int | None = None) -> str:
    """The first `rows` rows (None: all) as text, under a line that says what was measured."""
    frame = report_frame(ranges, plan)
    columns = [("node", 26, "<"), ("out", 3, ">"), ("kind", 10, "<"), ("absmax", 10, ">"), ("smallest", 10, ">"),
               ("headroom", 9, ">"), ("nonfinite", 9, ">")]  # fmt: skip
    if plan is not None:
        columns += [("precision", 9, "<"), ("rule", 12, "<")]
    shown = frame if rows is None else frame.head(rows)
    lines = [str(ranges), " ".join(f"{name:{align}{width}}" for name, width, align in columns).rstrip()]
    for row in shown.iter_rows(named=True):
        row["out"] = row["output"]
        cells = (f"{_cell(row[name], width):{align}{width}}" for name, width, align in columns)
        lines.append(" ".join(cells).rstrip())
    if len(shown) < len(frame):
        lines.append(f"and {len(frame) - len(shown)} more")
    return "\n".join(lines)


def _cell(value: object, width: int) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    # The end of a long name tells more than its beginning.
    return text if len(text) <= width else f"..{text[2 - width :]}"
