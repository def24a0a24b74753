"""The range table of a program whose tensors are stored as powers of two times themselves: no second calibration.

Without torch: a scaled table is read, and turned back, where two tables are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import polars as pl
from calibcast.calib.errors import MismatchError
from calibcast.calib.range_schema import RangeData, Rescaled
from calibcast.calib.rounding_table import LITERAL
from calibcast.calib.statistic_names import BINS

Table = TypeVar("Table", bound=RangeData)
_LINEAR = ("min", "max", "absmax", "smallest", "mean", "rms")
# Largest and smallest normal value of each low type.
_NORMAL = {"float16": (65504.0, 2.0**-14), "bfloat16": (3.3895313892515355e38, 2.0**-126)}
_KEY_SEPARATOR = ":"


@dataclass(frozen=True)
class NumberScale:
    """A number in a call: its value before, and its exponent."""

    value: float
    exponent: int


def tensor_key(node: str, output: int) -> str:
    """How `Rescaled.exponents` names a tensor."""
    return f"{node}{_KEY_SEPARATOR}{output}"


def scaled_table(
    table: Table, record: Rescaled, identity: pl.DataFrame | None, numbers: Mapping[tuple[str, str], NumberScale]
) -> Table:
    """Every statistic as calibration would have found it in the rescaled program.

    identity: rows of the nodes that were added, in the columns that say what a tensor is, with `after`: the row of the
    table behind which each stands, or -1.
    """
    frame = table.frame if identity is None else _with_added(table.frame, record, identity)
    k = [record.exponents.get(tensor_key(n, o), 0) for n, o in frame.select("node", "output").iter_rows()]
    hidden = _hidden(table.hidden, record.hidden)
    return replace(table, frame=_scaled(frame, k), hidden=hidden, rounding=_rounding(table, record, numbers))


def true_table(table: Table) -> Table:
    """The table of the network itself, out of a scaled one: every number as it was. Rounding evidence is left out."""
    record = table.calibration.rescaled
    if record is None:
        return table
    frame = table.frame.filter(~pl.col("node").is_in(list(record.added)))
    k = [record.exponents.get(tensor_key(n, o), 0) for n, o in frame.select("node", "output").iter_rows()]
    back = {node: (-one, -other) for node, (one, other) in record.hidden.items()}
    calibration = replace(table.calibration, digests=record.digests, weights=record.weights, rescaled=None)
    hidden = _hidden(table.hidden.filter(~pl.col("node").is_in(list(record.added))), back)
    return replace(
        table,
        frame=_scaled(frame, [-exponent for exponent in k]),
        hidden=hidden,
        calibration=calibration,
        rounding=table.rounding.clear(),
    )


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
    """A histogram of exponents, k bins lower. What is 0, and what is not finite, stays."""
    if bins is None:
        return None
    inner = bins[1 : BINS - 1]
    lost = inner[:k] if k > 0 else inner[k:]
    if any(lost):
        raise MismatchError(f"values would leave the range of fp32 normal numbers when scaled by 2^{-k}")
    zeros = [0] * min(abs(k), len(inner))
    inner = [*inner[k:], *zeros] if k > 0 else [*zeros, *inner[: len(inner) + k]]
    return [bins[0], *inner, bins[BINS - 1]]


def _hidden(hidden: pl.DataFrame, exponents: Mapping[str, tuple[int, int]]) -> pl.DataFrame:
    nodes = hidden["node"].to_list()
    largest, least = (pl.Series([2.0 ** -exponents.get(n, (0, 0))[i] for n in nodes], dtype=pl.Float64) for i in (0, 1))
    return hidden.with_columns(hidden_max=pl.col("hidden_max") * largest, hidden_min=pl.col("hidden_min") * least)


def _with_added(frame: pl.DataFrame, record: Rescaled, identity: pl.DataFrame) -> pl.DataFrame:
    """The rows of added nodes: the numbers of the tensor that each multiplies."""
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


def _rounding(table: RangeData, record: Rescaled, numbers: Mapping[tuple[str, str], NumberScale]) -> pl.DataFrame:
    """Evidence of rounding. A relative error is the same at any power of two, as long as the low type holds all values
    in full, before and after; where it does not, there is no evidence until rounding is measured anew."""
    if not table.rounding.height:
        return table.rounding
    reach = {(n, o): (most, least) for n, o, most, least in
             table.frame.select("node", "output", "absmax", "smallest").iter_rows()}  # fmt: skip
    behind = {was: made for made, was in record.added.items()}
    kept, inputs = [], []
    for node, maker, output, low in table.rounding.select("node", "input", "output", "low_precision_type").iter_rows():
        made = behind.get(maker, maker)
        inputs.append(made)
        if maker.startswith(LITERAL):
            number = numbers.get((node, maker.removeprefix(LITERAL)))
            kept.append(number is None or _holds(abs(number.value), abs(number.value), number.exponent, low))
            continue
        k = record.exponents.get(tensor_key(made, output), 0)
        most, least = reach.get((maker, output), (None, None))
        kept.append(k == 0 or _holds(most or 0.0, least or 0.0, k, low))
    valid = pl.Series(kept, dtype=pl.Boolean)
    unknown = (
        "noise",
        "noise_worst",
        "worst_batch",
        "noise_by_output",
        "nonfinite",
        "steps",
        "local_sqnr_db",
        "method",
    )
    why = pl.lit("rescaled, and the low type does not hold all values in full before and after: calibrate again")
    return table.rounding.with_columns(
        pl.Series("input", inputs),
        *(pl.when(valid).then(pl.col(name)).otherwise(None).alias(name) for name in unknown),
        batches=pl.when(valid).then(pl.col("batches")).otherwise(0),
        why_missing=pl.when(valid).then(pl.col("why_missing")).otherwise(why),
    )  # fmt: skip


def _holds(most: float, least: float, k: int, low: str) -> bool:
    largest, smallest = _NORMAL[low]
    scale = 2.0**-k
    return most == 0.0 or (max(most, most * scale) <= largest and min(least, least * scale) >= smallest)
