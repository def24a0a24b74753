"""Range tables as arrays that merge, and back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import polars as pl
import torch
from calibcast.calib.errors import MismatchError
from calibcast.calib.graph import TensorSpec
from calibcast.calib.graph_digests import first_difference
from calibcast.calib.input_sizes import merge_sizes
from calibcast.calib.range_schema import HIDDEN_SCHEMA, MAX_HASHES, SCHEMA, RangeData, hidden_rows
from calibcast.calib.rounding_statistics import merged_rounding
from calibcast.calib.statistic_names import BINS, HIDDEN, NO_BATCH, NO_HIDDEN
from calibcast.calib.statistics import Statistics

Table = TypeVar("Table", bound=RangeData)


def merged(tables: Sequence[Table]) -> Table:
    """See `RangeTable.merge`."""
    first = total = tables[0]
    for number, table in enumerate(tables[1:], 1):
        difference = first_difference(first.calibration.digests, table.calibration.digests)
        if difference is not None:
            raise MismatchError(f"table {number} is of another program than table 0: {difference}")
        if table.calibration.weights != first.calibration.weights:
            raise MismatchError(f"table {number} was measured with other weights than table 0")
        total = _merge_two(total, table)
    return total


def statistics_of(table: RangeData) -> Statistics:
    """See `RangeTable.statistics`."""
    frame = table.frame
    counts = torch.tensor(
        frame.select("elements", "nan", "posinf", "neginf", "zeros", "masked").rows(), dtype=torch.int64
    ).reshape(len(frame), 6)
    finite = (counts[:, 0] - counts[:, 1:4].sum(1) - counts[:, 5]).double()

    def column(name: str, empty: float) -> torch.Tensor:
        return torch.tensor(frame[name].fill_null(empty).to_list(), dtype=torch.float64)

    def batch(name: str) -> torch.Tensor:
        return torch.tensor(frame[name].fill_null(NO_BATCH).to_list(), dtype=torch.int64)

    rms = column("rms", 0.0)
    values = torch.stack(
        [
            column("min", float("inf")),
            column("max", float("-inf")),
            column("smallest", float("inf")),
            column("mean", 0.0) * finite,
            rms * rms * finite,
        ],
        1,
    )
    rows = frame["histogram"].to_list()
    has_histograms = bool(rows) and all(row is not None for row in rows)
    histograms = torch.tensor(rows, dtype=torch.int64).reshape(len(frame), BINS) if has_histograms else None
    batches = torch.tensor(frame["batches"].to_list(), dtype=torch.int64)
    beside = frame.select("node", "output").join(table.hidden, on=["node", "output"], how="left", maintain_order="left")
    hidden = torch.tensor(
        [beside[name].fill_null(none).to_list() for name, none in zip(HIDDEN, NO_HIDDEN, strict=True)],
        dtype=torch.float64,
    ).T.contiguous()
    return Statistics(values, counts, histograms, batches, batch("absmax_batch"), batch("nonfinite_batch"), hidden)


def frames_of(specs: Sequence[TensorSpec], statistics: Statistics) -> tuple[pl.DataFrame, pl.DataFrame]:
    """`frame` and `hidden` of a table, from specs and statistics of the same order, which must be on the host."""
    finite = statistics.finite().double()
    some = statistics.values[:, 0] <= statistics.values[:, 1]

    def numbers(values: torch.Tensor, present: torch.Tensor) -> list[float | None]:
        return [v if p else None for v, p in zip(values.tolist(), present.tolist(), strict=True)]

    def batch(values: torch.Tensor) -> list[int | None]:
        return [None if v >= NO_BATCH else v for v in values.tolist()]

    smallest = statistics.values[:, 2]
    data: dict[str, Any] = {
        name: [getattr(spec, name) for spec in specs]
        for name in ("node", "output", "op", "module", "source", "kind", "dtype")
    }
    data |= {
        "shape": [list(spec.shape) for spec in specs],
        "batches": statistics.batches.tolist(),
        "elements": statistics.counts[:, 0].tolist(),
        "min": numbers(statistics.values[:, 0], some),
        "max": numbers(statistics.values[:, 1], some),
        "absmax": numbers(statistics.absmax().abs(), some),
        "smallest": numbers(smallest, torch.isfinite(smallest)),
        "mean": numbers(statistics.values[:, 3] / finite, some),
        "rms": numbers((statistics.values[:, 4] / finite).clamp_min(0).sqrt(), some),
        **{name: statistics.counts[:, i].tolist() for i, name in enumerate(("nan", "posinf", "neginf"), 1)},
        "zeros": statistics.counts[:, 4].tolist(),
        "masked": statistics.counts[:, 5].tolist(),
        "absmax_batch": batch(torch.where(some, statistics.absmax_batch, NO_BATCH)),
        "nonfinite_batch": batch(statistics.nonfinite_batch),
        "histogram": [None] * len(specs) if statistics.histograms is None else statistics.histograms.tolist(),
    }
    hidden = {
        name: [None if v == nothing else v for v in statistics.hidden[:, column].tolist()]
        for column, (name, nothing) in enumerate(zip(HIDDEN, NO_HIDDEN, strict=True))
    }
    names = {"node": data["node"], "output": data["output"]}
    beside = pl.DataFrame({**names, **hidden}, schema=HIDDEN_SCHEMA)
    return pl.DataFrame(data, schema=SCHEMA), hidden_rows(beside)


def specs_of(frame: pl.DataFrame) -> list[TensorSpec]:
    """The specs that the rows of a frame were made from."""
    names = ("node", "output", "op", "module", "source", "kind", "dtype", "shape")
    return [TensorSpec(**{**row, "shape": tuple(row["shape"])}) for row in frame.select(names).to_dicts()]


def _merge_two(first: Table, second: Table) -> Table:
    if not first.frame.select("node", "output").equals(second.frame.select("node", "output")):
        raise MismatchError("the tables have other rows: one was filtered or changed by hand")
    total, other = statistics_of(first), statistics_of(second)
    if (total.histograms is None) != (other.histograms is None):
        total, other = replace(total, histograms=None), replace(other, histograms=None)
        warnings.warn("one table has no histograms, so the merged table has none", stacklevel=4)
    offset = first.calibration.batches + len(first.calibration.skipped)
    for indices in (other.absmax_batch, other.nonfinite_batch):
        indices += torch.where(indices < NO_BATCH, offset, 0)
    # Weights are the same in both: measured once, they count once.
    moving = torch.tensor([kind in {"input", "activation"} for kind in first.frame["kind"]])
    part = total.at(moving)
    part.merge(other.at(moving))
    for whole, changed in zip(vars(total).values(), vars(part).values(), strict=True):
        if whole is not None:
            whole[moving] = changed
    mine, theirs = first.calibration, second.calibration
    calibration = replace(
        mine,
        batches=mine.batches + theirs.batches,
        skipped=mine.skipped + tuple(index + offset for index in theirs.skipped),
        input_sizes=merge_sizes(mine.input_sizes, theirs.input_sizes),
        input_hashes=tuple(dict.fromkeys(mine.input_hashes + theirs.input_hashes))[:MAX_HASHES],
    )
    rounding = merged_rounding(first.rounding, second.rounding, offset)
    frame, hidden = frames_of(specs_of(first.frame), total)
    return replace(first, frame=frame, calibration=calibration, hidden=hidden, rounding=rounding)
