"""The range table: what calibration measured, one row per tensor, and what it was measured on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from calibcast.calib.damage_report import damage_report
from calibcast.calib.errors import ArtifactError, MismatchError, require_kind
from calibcast.calib.file_kinds import RANGES, require_file
from calibcast.calib.graph_digests import first_difference
from calibcast.calib.number_text import counted
from calibcast.calib.range_file import read_ranges, save_ranges
from calibcast.calib.range_scaling import true_table
from calibcast.calib.range_schema import RangeData
from calibcast.calib.rounding_table import rounding_gaps
from calibcast.calib.seal import broken_seal

# A table is read, filtered and compared without torch, which takes seconds to import; methods that need programs or
# arrays import torch, or the modules that use it, themselves.
if TYPE_CHECKING:
    from calibcast.calib.rounding_scaling import NumberScale
    from calibcast.calib.statistics import Statistics
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class RangeTable(RangeData):
    """Ranges of every floating-point tensor of a program on the user's data.

    `frame` has the columns of `SCHEMA`, one row per tensor, unique by (node, output), in graph order. `hidden` has the
    rows whose node forms sums inside (`hidden_max`: the largest sum; `hidden_min`: the smallest mean square deviation,
    whose root a norm divides by) or that have mask values (`mask_min`: the lowest finite one). `rounding` has one row
    per edge and low type: what rounding there does to the outputs; see `calib.rounding_table`. It is empty where that
    was not measured.
    """

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
            f"RangeTable: {counted(len(self), 'tensor')} over {counted(self.calibration.batches, 'batch')}, "
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
        save_ranges(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RangeTable:
        """Read a table. Raises ArtifactError when the file is truncated, foreign, newer, or lacks a column.

        A file that is not byte for byte as it was written is not parsed in this process: see `calib.seal`.
        """
        source = Path(path)
        if not source.exists():
            raise ArtifactError(f"{source}: no such file; expected a ranges file written by calibcast calibrate")
        require_file(source, RANGES)
        try:
            content = source.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{source} cannot be read: {error}") from error
        broken = broken_seal(content)
        if broken is not None:
            raise ArtifactError(
                damage_report(source)
                or f"{source} is not as calibcast wrote it: {broken}. Another program rewrote it, it was changed by "
                "hand, or it is damaged: calibrate again, or take a copy that is whole."
            )
        return cls(**vars(read_ranges(content, source)))

    @classmethod
    def merge(cls, tables: Sequence[RangeTable]) -> RangeTable:
        """One table from several of the same program: shards, ranks, days.

        Counts, min, max and histograms are exact, in any order of the tables; sums are within 1e-12 relative. The batch
        numbers of later tables continue those of earlier ones. Raises MismatchError for tables of different graphs or
        weights.
        """
        if not tables:
            raise MismatchError("nothing to merge: give at least one RangeTable")
        for number, table in enumerate(tables):
            require_table(table, f"table {number}")
        if len(tables) == 1:
            return tables[0]
        from calibcast.calib.measured import merge_tables

        return cls(**vars(merge_tables(tables)))

    def check(self, program: ExportedProgram, weights: str = "warn") -> None:
        """Raise MismatchError unless this table is of `program`; other weights warn, or raise with "refuse"."""
        if weights not in {"warn", "refuse", "ignore"}:
            raise MismatchError(f"weights={weights!r}: known are 'warn', 'refuse' and 'ignore'")
        from calibcast.calib.program_digests import node_digests, weights_hash

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
            added: nodes that only `program` has, each with the node that it multiplies.
            numbers: the numbers in calls that were scaled, by (node, argument).
            weights: hash of the weights of `program`, where it is known; None hashes them.

        Raises:
            MismatchError: the table is scaled already, or a value would leave the range of normal fp32 numbers.
        """
        from calibcast.calib.program_scaling import scaled_to

        return scaled_to(self, exponents, program, added or {}, numbers or {}, weights)

    def true_values(self) -> RangeTable:
        """The network's own ranges. For a scaled table: the table it was scaled from, without evidence of rounding."""
        return true_table(self)

    def statistics(self) -> Statistics:
        """The rows as arrays that can be merged. Sums are restored from mean and rms in float64."""
        from calibcast.calib.range_statistics import statistics_of

        return statistics_of(self)


def require_table(value: Any, argument: str = "ranges") -> None:
    """Raise MismatchError for anything but a RangeTable, such as the path of one."""
    remedy = "Give what calibrate returns, or RangeTable.load(path)."
    require_kind(value, RangeTable, argument, remedy, MismatchError)
