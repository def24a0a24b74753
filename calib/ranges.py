"""The range table: what calibration measured, one row per tensor, and what it was measured on."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch.export import ExportedProgram

from calib.artifacts import SCHEMA_VERSION, check_header, parsed, save_frame, versions
from calib.errors import ArtifactError, MismatchError
from calib.fingerprint import fingerprint, first_difference, node_digests, weights_hash
from calib.graph import TensorSpec
from calib.kernel import BINS
from calib.range_checks import check_values
from calib.statistics import HIDDEN, NO_BATCH, NO_HIDDEN, Statistics

SCHEMA: dict[str, Any] = {
    "node": pl.String,
    "output": pl.Int64,
    "op": pl.String,
    "module": pl.String,
    "source": pl.String,
    "kind": pl.String,
    "dtype": pl.String,
    "shape": pl.List(pl.String),
    "batches": pl.Int64,
    "elements": pl.Int64,
    "min": pl.Float64,
    "max": pl.Float64,
    "absmax": pl.Float64,
    "smallest": pl.Float64,
    "mean": pl.Float64,
    "rms": pl.Float64,
    "nan": pl.Int64,
    "posinf": pl.Int64,
    "neginf": pl.Int64,
    "zeros": pl.Int64,
    "masked": pl.Int64,
    "absmax_batch": pl.Int64,
    "nonfinite_batch": pl.Int64,
    "histogram": pl.List(pl.Int64),
}
# Beside the frame, for those rows that have them: see `calib.hidden` and `calib.masks`.
HIDDEN_SCHEMA: dict[str, Any] = {"node": pl.String, "output": pl.Int64, **dict.fromkeys(HIDDEN, pl.Float64)}
_KIND = "ranges"
_HEADER_KEY = "calibcast"
# Sizes kept per dimension of an input, and hashes of batches: enough to choose profiles and to notice reuse.
MAX_SIZES = 64
MAX_HASHES = 4096


@dataclass(frozen=True)
class Calibration:
    """What a table was measured on.

    digests: of each node, by name. weights: hash of the weights. batches: how many were measured. skipped:
    indices of batches left out as non-finite. input_sizes: per input and dimension, how often each size came.
    input_hashes: of the batches, at most 4096. versions: of calibcast and torch.
    """

    digests: dict[str, str]
    weights: str
    batches: int
    skipped: tuple[int, ...] = ()
    input_sizes: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    input_hashes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def fingerprint(self) -> str:
        """One digest of the whole graph."""
        return fingerprint(self.digests)


@dataclass(frozen=True)
class RangeTable:
    """Ranges of every floating-point tensor of a program on the user's data.

    `frame` has the columns of `SCHEMA`, one row per tensor, unique by (node, output), in graph order. `hidden` has
    those rows whose node forms sums inside (`hidden_max`: the largest; `hidden_min`: the least mean square deviation
    that a norm divides by the root of) or that have mask values (`mask_min`: the lowest finite one).
    """

    frame: pl.DataFrame
    calibration: Calibration
    hidden: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=HIDDEN_SCHEMA))

    def __len__(self) -> int:
        return len(self.frame)

    def __str__(self) -> str:
        above = self.frame.filter(pl.col("absmax") > 65504).height
        bad = self.frame.filter(pl.col("nonfinite_batch").is_not_null()).height
        return (
            f"RangeTable: {len(self)} tensors over {self.calibration.batches} batches, "
            f"{above} above 65504, {bad} with NaN or Inf"
        )

    @property
    def fingerprint(self) -> str:
        """Digest of the graph that was measured."""
        return self.calibration.fingerprint

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as Parquet, whole or not at all. Raises ArtifactError when it cannot be written."""
        header = {_HEADER_KEY: _KIND, "schema": SCHEMA_VERSION, "calibration": asdict(self.calibration)}
        whole = self.frame.join(self.hidden, on=["node", "output"], how="left", maintain_order="left")
        save_frame(path, whole, {_HEADER_KEY: json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RangeTable:
        """Read a table. Raises ArtifactError when the file is truncated, foreign, newer, or lacks a column."""
        source = Path(path)
        if not source.is_file():
            raise ArtifactError(f"{source}: no such file; expected a ranges file written by calibcast calibrate")
        try:
            header = json.loads(pl.read_parquet_metadata(source).get(_HEADER_KEY, "{}"))
            frame = pl.read_parquet(source)
        except (Exception, pl.exceptions.PanicException) as error:  # a panic is no Exception
            raise ArtifactError(f"{source} is not a readable Parquet file (truncated or foreign): {error}") from error
        check_header(header if isinstance(header, dict) else {}, _KIND, source)
        with parsed(source, _KIND):
            fields = header["calibration"]
            fields = {**fields, "digests": {name: str(digest) for name, digest in fields["digests"].items()}}
            fields = {**fields, "skipped": tuple(fields["skipped"]), "input_hashes": tuple(fields["input_hashes"])}
            checked = _checked(frame, source)
            return cls(checked.select(list(SCHEMA)), Calibration(**fields), _hidden_rows(checked))

    @classmethod
    def merge(cls, tables: Sequence[RangeTable]) -> RangeTable:
        """One table from several of the same program: shards, ranks, days.

        Counts, min, max and histograms are exact and in any order, sums are within 1e-12 relative. Batch numbers
        of later tables are counted on from the earlier ones. Raises MismatchError for tables of other graphs or
        weights.
        """
        if not tables:
            raise MismatchError("nothing to merge: give at least one RangeTable")
        first = tables[0]
        merged = first
        for number, table in enumerate(tables[1:], 1):
            difference = first_difference(first.calibration.digests, table.calibration.digests)
            if difference is not None:
                raise MismatchError(f"table {number} is of another program than table 0: {difference}")
            if table.calibration.weights != first.calibration.weights:
                raise MismatchError(f"table {number} was measured with other weights than table 0")
            merged = _merge_two(merged, table)
        return merged

    def check(self, program: ExportedProgram, weights: str = "warn") -> None:
        """Raise MismatchError unless this table is of `program`; other weights warn, or raise with "refuse"."""
        if weights not in {"warn", "refuse", "ignore"}:
            raise MismatchError(f"weights={weights!r}: known are 'warn', 'refuse' and 'ignore'")
        difference = first_difference(node_digests(program), self.calibration.digests)
        if difference is not None:
            raise MismatchError(
                f"these ranges belong to another program: {difference}. Calibrate this program, or load its ranges."
            )
        if weights != "ignore" and weights_hash(program) != self.calibration.weights:
            message = "these ranges were measured with other weights than the program has now: calibrate again"
            if weights == "refuse":
                raise MismatchError(message)
            warnings.warn(message, stacklevel=3)

    def statistics(self) -> Statistics:
        """The rows as arrays that merge. Sums are restored from mean and rms in float64."""
        frame = self.frame
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
        beside = frame.select("node", "output").join(
            self.hidden, on=["node", "output"], how="left", maintain_order="left"
        )
        hidden = torch.tensor(
            [beside[name].fill_null(none).to_list() for name, none in zip(HIDDEN, NO_HIDDEN, strict=True)],
            dtype=torch.float64,
        ).T.contiguous()
        return Statistics(values, counts, histograms, batches, batch("absmax_batch"), batch("nonfinite_batch"), hidden)


def table_of(specs: Sequence[TensorSpec], statistics: Statistics, calibration: Calibration) -> RangeTable:
    """A table from specs and statistics of the same order. `statistics` must be on the host."""
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
    return RangeTable(pl.DataFrame(data, schema=SCHEMA), calibration, _hidden_rows(beside))


def _hidden_rows(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.select(list(HIDDEN_SCHEMA)).filter(pl.any_horizontal(pl.col(HIDDEN).is_not_null()))


def specs_of(frame: pl.DataFrame) -> list[TensorSpec]:
    """The specs that the rows of a frame were made from."""
    names = ("node", "output", "op", "module", "source", "kind", "dtype", "shape")
    return [TensorSpec(**{**row, "shape": tuple(row["shape"])}) for row in frame.select(names).to_dicts()]


def _merge_two(first: RangeTable, second: RangeTable) -> RangeTable:
    if not first.frame.select("node", "output").equals(second.frame.select("node", "output")):
        raise MismatchError("the tables have other rows: one was filtered or changed by hand")
    total, other = first.statistics(), second.statistics()
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
    return table_of(specs_of(first.frame), total, calibration)


Sizes = dict[str, list[dict[str, int]]]


def merge_sizes(first: Sizes, second: Sizes) -> Sizes:
    """Add up how often each size came, per input and dimension."""
    merged: Sizes = {name: [dict(counts) for counts in dimensions] for name, dimensions in first.items()}
    for name, dimensions in second.items():
        mine = merged.setdefault(name, [{} for _ in dimensions])
        for counts, more in zip(mine, dimensions, strict=True):
            for size, count in more.items():
                count_size(counts, size, count)
    return merged


def count_size(counts: dict[str, int], size: str, count: int = 1) -> None:
    """Count a size. Of more than 64, the smallest and largest stay and the rarest other goes."""
    counts[size] = counts.get(size, 0) + count
    if len(counts) > MAX_SIZES:
        ends = {min(counts, key=int), max(counts, key=int)}
        del counts[min((key for key in counts if key not in ends), key=lambda key: counts[key])]


def _checked(frame: pl.DataFrame, source: Path) -> pl.DataFrame:
    missing = [name for name in SCHEMA if name not in frame.columns]
    if missing:
        raise ArtifactError(f"{source} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
    # Without the columns of `hidden` nothing was measured inside; rules then bound it from the peaks.
    frame = frame.with_columns(pl.lit(None, pl.Float64).alias(name) for name in HIDDEN if name not in frame.columns)
    expected = SCHEMA | HIDDEN_SCHEMA
    wrong = [name for name, dtype in expected.items() if frame.schema[name] != dtype]
    if wrong:
        name = wrong[0]
        raise ArtifactError(f"{source}: column {name} is {frame.schema[name]}, expected {expected[name]}")
    check_values(frame, source)
    if frame.select("node", "output").is_duplicated().any():
        raise ArtifactError(f"{source} has two rows for one tensor: it was changed by hand or merged by another tool")
    return frame
