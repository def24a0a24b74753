"""The answers of `what_if`: a frame that prints as a table like all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl
from calibcast.calib.number_text import counted, percent, size
from calibcast.calib.terminal_text import wrapped
from calibcast.calib.text_table import Column, listed, text_table

SCHEMA: dict[str, Any] = {
    "low_precision_type": pl.String,
    "data_max": pl.Float64,
    "range_quantile": pl.Float64,
    "min_sqnr_db": pl.Float64,
    "predicted_sqnr_db": pl.Float64,
    "nodes_low": pl.Int64,
    "nodes_high": pl.Int64,
    "nodes_share": pl.Float64,
    "work_low": pl.Int64,
    "work_share": pl.Float64,
    "activation_bytes_low": pl.Int64,
    "activation_share": pl.Float64,
    "casts": pl.Int64,
    "bytes_cast": pl.Int64,
    "overflow": pl.Float64,
    "overflow_at_least": pl.Float64,
    "underflow": pl.Float64,
    "underflow_at_least": pl.Float64,
    "to_low": pl.List(pl.String),
    "to_high": pl.List(pl.String),
}
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


class Alternatives(pl.DataFrame):
    """A polars frame, one row per setting.

    Only `print` differs: it shows a table as wide as the terminal, and the nodes that flip with their modules. What
    polars makes of the frame, by `filter` for example, is a plain frame.
    """

    # Also for copies, to which polars does not carry attributes over.
    modules: Mapping[str, str] = {}
    base: str = "the base plan"

    @classmethod
    def of(cls, rows: list[dict[str, Any]], modules: Mapping[str, str], base: str) -> Alternatives:
        """The frame of these rows. modules: module path by node. base: what the flips are against, in words."""
        frame = cls(rows, schema=SCHEMA)
        frame.modules, frame.base = modules, base
        return frame

    def __str__(self) -> str:
        return self.table() if self.columns == list(SCHEMA) else super().__str__()

    __repr__ = __str__

    def table(self, base: str | None = None) -> str:
        """A line per setting, then the nodes that flip. base: what the flips are against (None: in general words)."""
        rows = list(self.iter_rows(named=True))
        predicted = any(row["predicted_sqnr_db"] is not None for row in rows)
        hidden = set() if predicted else {"predicted"}
        hidden |= {"range_quantile"} if predicted and len({row["range_quantile"] for row in rows}) == 1 else set()
        lines = text_table([_cells(row) for row in rows], [column for column in _COLUMNS if column.name not in hidden])
        if any(_is_unmet(row) for row in rows):
            lines.append("! below the budget: the noise comes from all over the program, and no few nodes are to blame")
        lines.append(
            f"flips: nodes that become low (+) or stop being low (-), compared with {base or self.base}; "
            "shares are of the nodes that a plan decides on"
        )
        for row in rows:
            lines += self._flips(row)
        return wrapped("\n".join(lines))

    def _flips(self, row: Mapping[str, Any]) -> list[str]:
        quantile = "" if row["range_quantile"] == 1 else f", quantile {row['range_quantile']:g}"
        title = f"{row['low_precision_type']}, {_limit(row, long=True)}{quantile}"
        lines = []
        for names, what in ((row["to_low"], "low now"), (row["to_high"], "no longer low")):
            if names:
                places = listed([self._place(node) for node in names], 6)
                lines.append(f"  {title}: {counted(len(names), 'node')} {what}: {places}")
        return lines

    def _place(self, node: str) -> str:
        module = self.modules.get(node)
        return f"{node} ({module})" if module else node


def _limit(row: Mapping[str, Any], long: bool = False) -> str:
    """The budget, data_max, or both."""
    budget = [] if row["min_sqnr_db"] is None else [f"{'budget ' if long else ''}{row['min_sqnr_db']:g} dB"]
    limit = [] if row["data_max"] is None else [f"{'data_max ' if long else ''}{row['data_max']:g}"]
    return ", ".join(budget + limit)


def _is_unmet(row: Mapping[str, Any]) -> bool:
    """Whether the plan at a setting is predicted to miss its budget."""
    predicted, budget = row["predicted_sqnr_db"], row["min_sqnr_db"]
    return predicted is not None and budget is not None and predicted < budget


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    decided = row["nodes_low"] + row["nodes_high"]
    return {
        **row,
        "limit": _limit(row),
        "predicted": ""
        if row["predicted_sqnr_db"] is None
        else f"{row['predicted_sqnr_db']:.1f}{'!' * _is_unmet(row)}",
        "nodes": f"{row['nodes_low']} of {decided}",
        "work": percent(row["work_share"]),
        "activations": percent(row["activation_share"]),
        "cast": size(row["bytes_cast"]),
        "overflow": _bounds(row["overflow"], row["overflow_at_least"]),
        "underflow": _bounds(row["underflow"], row["underflow_at_least"]),
        "flips": f"+{len(row['to_low'])} -{len(row['to_high'])}",
    }


def _bounds(most: float, least: float) -> str:
    if most != most:
        return "-"
    exact = "" if most == least else "<="
    return f"{exact}{most:.2g}"
