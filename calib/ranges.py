"""The range table: what calibration measured, one row per tensor, and what it was measured on."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from calibcast.calib.artifacts import SCHEMA_VERSION, check_header, parsed, save_frame, versions
from calibcast.calib.damage_report import damage_report
from calibcast.calib.errors import ArtifactError, MismatchError, require_kind
from calibcast.calib.file_kinds import told_kind
from calibcast.calib.graph_digests import fingerprint, first_difference
from calibcast.calib.range_checks import check_values
from calibcast.calib.range_scaling import NumberScale, Rescaled, true_table
from calibcast.calib.rounding_table import empty_rounding, rounding_gaps, rounding_metadata, rounding_of
from calibcast.calib.seal import broken_seal, has_parquet_ends
from calibcast.calib.statistic_names import HIDDEN

# A table is read, filtered and compared without torch, which takes seconds to import; methods that deal in programs
# and in arrays import it, or what needs it, themselves.
if TYPE_CHECKING:
    from calibcast.calib.statistics import Statistics
    from torch.export import ExportedProgram

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
    input_hashes: of the batches, at most 4096. versions: of calibcast and torch. rescaled: how the table was
    scaled, see `RangeTable.scaled`; None for what was measured of a network itself.
    """

    digests: dict[str, str]
    weights: str
    batches: int
    skipped: tuple[int, ...] = ()
    input_sizes: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    input_hashes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=versions)
    rescaled: Rescaled | None = None

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
    `rounding` has one row per edge and low type: what rounding there does to the outputs; see `calib.rounding_table`.
    It is empty where that was not measured.
    """

    frame: pl.DataFrame
    calibration: Calibration
    hidden: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=HIDDEN_SCHEMA))
    rounding: pl.DataFrame = field(default_factory=empty_rounding)

    def __len__(self) -> int:
        return len(self.frame)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeTable):
            return NotImplemented
        same = self.calibration == other.calibration and self.frame.equals(other.frame)
        return same and self.hidden.equals(other.hidden) and self.rounding.equals(other.rounding)

    def __str__(self) -> str:
        above = self.frame.filter(pl.col("absmax") > 65504).height
        bad = self.frame.filter(pl.col("nonfinite_batch").is_not_null()).height
        return (
            f"RangeTable: {len(self)} tensors over {self.calibration.batches} batches, "
            f"{above} above 65504, {bad} with NaN or Inf"
            + ("" if self.calibration.rescaled is None else "; of a rescaled program: these are not the true values")
        )

    @property
    def rounding_gaps(self) -> pl.DataFrame:
        """The rows of `rounding` without evidence, with `why_missing`; rules that judge by magnitude decide there."""
        return rounding_gaps(self.rounding)

    @property
    def fingerprint(self) -> str:
        """Digest of the graph that was measured."""
        return self.calibration.fingerprint

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as Parquet, whole or not at all. Raises ArtifactError when it cannot be written."""
        header = {_HEADER_KEY: _KIND, "schema": SCHEMA_VERSION, "calibration": asdict(self.calibration)}
        whole = self.frame.join(self.hidden, on=["node", "output"], how="left", maintain_order="left")
        save_frame(path, whole, {_HEADER_KEY: json.dumps(header), **rounding_metadata(self.rounding)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RangeTable:
        """Read a table. Raises ArtifactError when the file is truncated, foreign, newer, or lacks a column.

        A file that is not byte for byte as it was written is not parsed in this process: see `calib.seal`.
        """
        source = Path(path)
        if not source.is_file():
            raise ArtifactError(f"{source}: no such file; expected a ranges file written by calibcast calibrate")
        try:
            content = source.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{source} cannot be read: {error}") from error
        if not has_parquet_ends(content):
            raise ArtifactError(
                f"{source} is not a readable Parquet file (truncated or foreign): it does not begin and end as one"
                f"{told_kind(source, 'a range table')}"
            )
        broken = broken_seal(content)
        if broken is not None:
            raise ArtifactError(
                damage_report(source)
                or f"{source} is not as calibcast wrote it: {broken}. Another program wrote it anew, it was changed by "
                "hand, or it is damaged: calibrate again, or take a copy that is whole."
            )
        return read_table(content, source)

    @classmethod
    def merge(cls, tables: Sequence[RangeTable]) -> RangeTable:
        """One table from several of the same program: shards, ranks, days.

        Counts, min, max and histograms are exact and in any order, sums are within 1e-12 relative. Batch numbers
        of later tables are counted on from the earlier ones. Raises MismatchError for tables of other graphs or
        weights.
        """
        from calibcast.calib.range_statistics import merged

        return merged(tables)

    def check(self, program: ExportedProgram, weights: str = "warn") -> None:
        """Raise MismatchError unless this table is of `program`; other weights warn, or raise with "refuse"."""
        if weights not in {"warn", "refuse", "ignore"}:
            raise MismatchError(f"weights={weights!r}: known are 'warn', 'refuse' and 'ignore'")
        from calibcast.calib.fingerprint import node_digests, weights_hash

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

    def scaled(
        self,
        exponents: Mapping[tuple[str, int], int],
        program: ExportedProgram,
        added: Mapping[str, str] | None = None,
        numbers: Mapping[tuple[str, str], NumberScale] | None = None,
        weights: str | None = None,
    ) -> RangeTable:
        """The table of `program`, which is this table's program with each tensor stored as 2^-k times its true value.

        It is what calibrating `program` on the same batches would give, and is marked (`calibration.rescaled`), so that
        `true_values` gives this table back. Evidence of rounding is carried over where the low type holds all values in
        full before and after; see `calib.range_scaling`.

        Args:
            exponents: k by (node, output); 0 may be left out.
            added: nodes of `program` that multiply the one that they name here.
            numbers: numbers in calls that were scaled, by (node, argument).
            weights: hash of the weights of `program`, where it is known; None hashes them.

        Raises:
            MismatchError: the table is scaled already, or a value would leave the range of normal fp32 numbers.
        """
        from calibcast.calib.program_scaling import scaled_to

        return scaled_to(self, exponents, program, added or {}, numbers or {}, weights)

    def true_values(self) -> RangeTable:
        """The network's own ranges: of a scaled table, what it was scaled from, without evidence of rounding."""
        return true_table(self)

    def statistics(self) -> Statistics:
        """The rows as arrays that merge. Sums are restored from mean and rms in float64."""
        from calibcast.calib.range_statistics import statistics_of

        return statistics_of(self)


def require_table(value: Any, argument: str = "ranges") -> None:
    """Raise MismatchError for anything but a RangeTable, such as the path of one."""
    remedy = "Give what calibrate returns, or RangeTable.load(path)."
    require_kind(value, RangeTable, argument, remedy, MismatchError)


def hidden_rows(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.select(list(HIDDEN_SCHEMA)).filter(pl.any_horizontal(pl.col(HIDDEN).is_not_null()))


def read_table(content: bytes, source: Path) -> RangeTable:
    """The table in the bytes of a Parquet file. Raises ArtifactError, naming `source`, when it is none.

    To be called with bytes whose checksum is right: others can end the process.
    """
    try:
        metadata = pl.read_parquet_metadata(io.BytesIO(content))
        header = json.loads(metadata.get(_HEADER_KEY, "{}"))
        frame = pl.read_parquet(io.BytesIO(content))
    except (Exception, pl.exceptions.PanicException) as error:  # a panic is no Exception
        raise ArtifactError(f"{source} is not a readable Parquet file (truncated or foreign): {error}") from error
    check_header(header if isinstance(header, dict) else {}, _KIND, source)
    with parsed(source, _KIND):
        fields = header["calibration"]
        fields = {**fields, "digests": {name: str(digest) for name, digest in fields["digests"].items()}}
        fields = {**fields, "rescaled": Rescaled.parsed(fields.get("rescaled"))}
        fields = {**fields, "skipped": tuple(fields["skipped"]), "input_hashes": tuple(fields["input_hashes"])}
        checked = _checked(frame, source)
        rounding = rounding_of(metadata, source)
        return RangeTable(checked.select(list(SCHEMA)), Calibration(**fields), hidden_rows(checked), rounding)


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
