"""The answers of `what_if` as text."""

from __future__ import annotations

from typing import Any

import polars as pl
from calibcast.calib.number_text import percent
from calibcast.calib.text_table import Column, listed, text_table

_COLUMNS = (
    Column("low_precision_type", "type", 8),
    Column("limit", "limit", 8, number=True),
    Column("range_quantile", "quantile", 8, number=True, drop=2),
    Column("predicted", "pred. dB", 8, number=True),
    Column("nodes", "nodes low", 13, number=True),
    Column("work", "work", 6, number=True),
    Column("activations", "activ.", 6, number=True, drop=5),
    Column("casts", "casts", 5, number=True, drop=4),
    Column("cast", "cast", 8, number=True, drop=3),
    Column("overflow", "overflow", 8, number=True),
    Column("underflow", "underfl.", 8, number=True, drop=1),
    Column("flips", "flips", 9, number=True),
)


def what_if_table(frame: pl.DataFrame, base: str) -> str:
    """One line per setting, then the nodes that flip compared with `base`."""
    rows = list(frame.iter_rows(named=True))
    # Only one of the two columns has something to tell.
    hidden = "range_quantile" if any(row["predicted_sqnr_db"] is not None for row in rows) else "predicted"
    lines = text_table([_cells(row) for row in rows], [column for column in _COLUMNS if column.name != hidden])
    lines.append(f"shares are of all decided nodes; flips (+low, -low) are against {base}")
    for row in rows:
        title = f"{row['low_precision_type']}, {_limit(row, long=True)}, quantile {row['range_quantile']:g}"
        for name, sign in (("to_low", "+"), ("to_high", "-")):
            if row[name]:
                lines.append(f"  {title}: {sign}{len(row[name])} {listed(row[name], 6)}")
    return "\n".join(lines)


def _limit(row: dict[str, Any], long: bool = False) -> str:
    """The budget, data_max, or both."""
    budget = [] if row["min_sqnr_db"] is None else [f"{'budget ' if long else ''}{row['min_sqnr_db']:g} dB"]
    limit = [] if row["data_max"] is None else [f"{'data_max ' if long else ''}{row['data_max']:g}"]
    return ", ".join(budget + limit)


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    decided = row["nodes_low"] + row["nodes_high"]
    return {
        **row,
        "limit": _limit(row),
        "predicted": "" if row["predicted_sqnr_db"] is None else f"{row['predicted_sqnr_db']:.1f}",
        "nodes": f"{row['nodes_low']} of {decided}",
        "work": percent(row["work_share"]),
        "activations": percent(row["activation_share"]),
        "cast": size(row["bytes_cast"]),
        "overflow": _bounds(row["overflow"], row["overflow_at_least"]),
        "underflow": _bounds(row["underflow"], row["underflow_at_least"]),
        "flips": f"+{len(row['to_low'])} -{len(row['to_high'])}",
    }


def size(count: int) -> str:
    """A number of bytes as text: `12.3 MB`."""
    number, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"


def _bounds(most: float, least: float) -> str:
    if most != most:
        return "-"
    exact = "" if most == least else "<="
    return f"{exact}{most:.2g}"
