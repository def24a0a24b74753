"""The range table of a program whose tensors are stored times powers of two, made without a second calibration.

It does not import torch: comparing two tables also reads scaled ones and undoes the scaling.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import polars as pl
from calibcast.calib.errors import MismatchError
from calibcast.calib.range_schema import RangeData, Rescaled
from calibcast.calib.statistic_names import BINS

# That module needs numpy, which reading a table does not.
if TYPE_CHECKING:
    from calibcast.calib.rounding_scaling import Key, NumberScale

Table = TypeVar("Table", bound=RangeData)
_LINEAR = ("min", "max", "absmax", "smallest", "mean", "rms")
_KEY_SEPARATOR = ":"


def tensor_key(node: str, output: int) -> str:
    """How `Rescaled.exponents` names a tensor."""
    return f"{node}{_KEY_SEPARATOR}{output}"


def scaled_table(
    table: Table,
    record: Rescaled,
    identity: pl.DataFrame | None,
    numbers: Mapping[tuple[str, str], NumberScale],
    edges: Iterable[Key],
) -> Table:
    """Every statistic as calibration would have found it in the rescaled program.

    identity: the rows of added nodes, with the columns that say what a tensor is, and `after`: the row of the table
    that each one follows. edges: those of the rescaled program, where rounding was measured.
    """
    from calibcast.calib.rounding_scaling import scaled_rounding

    frame = table.frame if identity is None else _with_added(table.frame, record, identity)
    k = [record.exponents.get(tensor_key(n, o), 0) for n, o in frame.select("node", "output").iter_rows()]
    hidden = _hidden(table.hidden, record.hidden)
    return replace(
        table, frame=_scaled(frame, k), hidden=hidden, rounding=scaled_rounding(table, record, numbers, edges)
    )


def true_table(table: Table) -> Table:
    """The network's own table, from a scaled one: every number as it was before. Rounding evidence is left out."""
    record = table.calibration.rescaled
    if record is None:
        return table
    frame = table.frame.filter(~pl.col("node").is_in(list(record.added)))
    k = [record.exponents.get(tensor_key(n, o), 0) for n, o in frame.select("node", "output").iter_rows()]
    back = {node: (-one, -other) for node, (one, other) in record.hidden.items()}
    calibration = replace(table.calibration, digests=record.digests, weights=record.weights, rescaled=None)
    hidden = _hidden(table.hidden.filter(~pl.col("node").is_in(list(record.added))), back)
    own = pl.col("node").replace(record.renamed)
    return replace(
        table,
        frame=_scaled(frame, [-exponent for exponent in k]).with_columns(own),
        hidden=hidden.with_columns(own),
        calibration=calibration,
        rounding=table.rounding.clear(),
    )


def exponents_of(table: RangeData) -> list[int]:
    """k of each row: the row holds 2^-k times the true values of its tensor."""
    record = table.calibration.rescaled
    places = table.frame.select("node", "output").iter_rows()
    return [0 if record is None else record.exponents.get(tensor_key(n, o), 0) for n, o in places]


def true_frame(table: RangeData) -> pl.DataFrame:
    """The rows of a table, for display: every number at its true value, and how its tensor is stored.

    Two columns are added: `exponent`, the k of a tensor that is stored as 2^-k times its true value, and
    `stored_absmax`. The result of an added multiplication has the true values of the tensor that it multiplies.
    """
    k = exponents_of(table)
    true = _scaled(table.frame, [-exponent for exponent in k])
    return true.with_columns(exponent=pl.Series(k, dtype=pl.Int64), stored_absmax=table.frame["absmax"])


def _scaled(frame: pl.DataFrame, k: Sequence[int]) -> pl.DataFrame:
    rows = [row for row, exponent in enumerate(k) if exponent]
    if not rows:
        return frame
    factor = pl.Series([2.0**-exponent for exponent in k], dtype=pl.Float64)
    changed = frame.with_columns((pl.col(name) * factor).alias(name) for name in _LINEAR)
    if frame["histogram"].null_count() == frame.height:
        return changed
    bins = frame["histogram"][rows].to_list()
    moved = pl.Series([_moved(row, k[i]) for row, i in zip(bins, rows, strict=True)], dtype=pl.List(pl.Int64))
    histograms = frame["histogram"].to_frame().with_row_index("row")
    found = pl.DataFrame({"row": pl.Series(rows, dtype=pl.UInt32), "moved": moved})
    joined = histograms.join(found, on="row", how="left", maintain_order="left")
    return changed.with_columns(joined.select(pl.coalesce("moved", "histogram").alias("histogram")).to_series())


def _moved(bins: list[int] | None, k: int) -> list[int] | None:
    """A histogram of exponents, moved down by k bins. The bins of zeros and of values that are not finite stay."""
    if bins is None:
        return None
    inner = bins[1 : BINS - 1]
    lost = inner[:k] if k >= 0 else inner[k:]
    if any(lost):
        raise MismatchError(f"values would leave the range of fp32 normal numbers when scaled by 2^{-k}")
    zeros = [0] * min(abs(k), len(inner))
    inner = [*inner[k:], *zeros] if k >= 0 else [*zeros, *inner[: len(inner) - len(zeros)]]
    return [bins[0], *inner, bins[BINS - 1]]


def _hidden(hidden: pl.DataFrame, exponents: Mapping[str, tuple[int, int]]) -> pl.DataFrame:
    nodes = hidden["node"].to_list()
    largest, least = (pl.Series([2.0 ** -exponents.get(n, (0, 0))[i] for n in nodes], dtype=pl.Float64) for i in (0, 1))
    return hidden.with_columns(hidden_max=pl.col("hidden_max") * largest, hidden_min=pl.col("hidden_min") * least)


def _with_added(frame: pl.DataFrame, record: Rescaled, identity: pl.DataFrame) -> pl.DataFrame:
    """`frame` with rows for added nodes. Each has the numbers of the tensor that it multiplies."""
    numbers = frame.drop([name for name in identity.columns if name in frame.columns and name != "node"])
    behind = pl.DataFrame({"node": list(record.added), "was": list(record.added.values())})
    rows = identity.join(behind, on="node", how="left", maintain_order="left").join(
        numbers.rename({"node": "was"}), on="was", how="left", maintain_order="left"
    )
    placed = pl.concat(
        [
            frame.with_row_index("place").with_columns(second=pl.lit(0)),
            rows.rename({"after": "place"}).with_columns(pl.col("place").cast(pl.UInt32), second=pl.lit(1))
            .select(["place", *frame.columns, "second"]),
        ]
    )  # fmt: skip
    return placed.sort("place", "second", maintain_order=True).select(frame.columns)
