"""Converts range tables to arrays that can be merged, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import polars as pl
import torch
from calibcast.calib.graph import TensorSpec
from calibcast.calib.range_schema import HIDDEN_SCHEMA, SCHEMA, RangeData, hidden_rows
from calibcast.calib.statistic_names import BINS, COUNTS, HIDDEN, NO_BATCH, NO_HIDDEN, NOTHING, VALUES
from calibcast.calib.statistics import Statistics

Table = TypeVar("Table", bound=RangeData)


def statistics_of(table: RangeData) -> Statistics:
    """See `RangeTable.statistics`."""
    frame = table.frame
    unmasked = pl.col("elements") - pl.sum_horizontal("nan", "posinf", "neginf", "masked")
    sums = frame.with_columns(
        (pl.col("mean").fill_null(0.0) * unmasked).alias("sum"),
        (pl.col("rms").fill_null(0.0).pow(2) * unmasked).alias("sum_of_squares"),
    )

    def floats(source: pl.DataFrame, names: Sequence[str], nothing: Sequence[float]) -> torch.Tensor:
        columns = [source[name].fill_null(none).to_list() for name, none in zip(names, nothing, strict=True)]
        return torch.tensor(columns, dtype=torch.float64).T.contiguous()

    def integers(name: str) -> torch.Tensor:
        return torch.tensor(frame[name].fill_null(NO_BATCH).to_list(), dtype=torch.int64)

    rows = frame["histogram"].to_list()
    has_histograms = bool(rows) and all(row is not None for row in rows)
    histograms = torch.tensor(rows, dtype=torch.int64).reshape(len(frame), BINS) if has_histograms else None
    beside = frame.select("node", "output").join(table.hidden, on=["node", "output"], how="left", maintain_order="left")
    return Statistics(
        values=floats(sums, VALUES, NOTHING),
        counts=torch.stack([integers(name) for name in COUNTS], 1),
        histograms=histograms,
        batches=integers("batches"),
        absmax_batch=integers("absmax_batch"),
        nonfinite_batch=integers("nonfinite_batch"),
        hidden=floats(beside, HIDDEN, NO_HIDDEN),
    )


def frames_of(specs: Sequence[TensorSpec], statistics: Statistics) -> tuple[pl.DataFrame, pl.DataFrame]:
    """`frame` and `hidden` of a table, from specs and statistics of the same order, which must be on the host."""
    column, finite = statistics.column, statistics.finite().double()
    some, smallest = column("min") <= column("max"), column("smallest")

    def numbers(values: torch.Tensor, present: torch.Tensor) -> list[float | None]:
        return [v if p else None for v, p in zip(values.tolist(), present.tolist(), strict=True)]

    def batch(values: torch.Tensor) -> list[int | None]:
        return [None if v >= NO_BATCH else v for v in values.tolist()]

    data: dict[str, Any] = {
        name: [getattr(spec, name) for spec in specs]
        for name in ("node", "output", "op", "module", "source", "kind", "dtype")
    }
    data |= {
        "shape": [list(spec.shape) for spec in specs],
        "batches": statistics.batches.tolist(),
        "min": numbers(column("min"), some),
        "max": numbers(column("max"), some),
        "absmax": numbers(statistics.absmax().abs(), some),
        "smallest": numbers(smallest, torch.isfinite(smallest)),
        "mean": numbers(column("sum") / finite, some),
        "rms": numbers((column("sum_of_squares") / finite).clamp_min(0).sqrt(), some),
        **{name: column(name).tolist() for name in COUNTS},
        "absmax_batch": batch(torch.where(some, statistics.absmax_batch, NO_BATCH)),
        "nonfinite_batch": batch(statistics.nonfinite_batch),
        "histogram": [None] * len(specs) if statistics.histograms is None else statistics.histograms.tolist(),
    }
    hidden = {
        name: [None if v == nothing else v for v in column(name).tolist()]
        for name, nothing in zip(HIDDEN, NO_HIDDEN, strict=True)
    }
    names = {"node": data["node"], "output": data["output"]}
    beside = pl.DataFrame({**names, **hidden}, schema=HIDDEN_SCHEMA)
    return pl.DataFrame(data, schema=SCHEMA), hidden_rows(beside)


def specs_of(frame: pl.DataFrame) -> list[TensorSpec]:
    """The specs that the rows of a frame were made from."""
    names = ("node", "output", "op", "module", "source", "kind", "dtype", "shape")
    return [TensorSpec(**{**row, "shape": tuple(row["shape"])}) for row in frame.select(names).to_dicts()]
