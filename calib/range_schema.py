"""What a range table consists of: its columns, and what it was measured on. Files and statistics are made of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl
from calibcast.calib.artifacts import versions
from calibcast.calib.graph_digests import fingerprint
from calibcast.calib.json_types import fields_of, require_types
from calibcast.calib.rounding_table import empty_rounding
from calibcast.calib.statistic_names import HIDDEN

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
# How many hashes of batches are kept: enough to notice that data were used before.
MAX_HASHES = 4096


@dataclass(frozen=True)
class Rescaled:
    """How a table differs from that of the network itself: each tensor is stored as 2^-k times its true value.

    exponents: k by `node:output`; 0 is left out. hidden: by node, the k of the sums that it forms inside, and of its
    mean squares. added: nodes that the network does not have, each with the node that it multiplies. digests, weights:
    those of the network, as in `Calibration`. renamed: the network's names of nodes that have another name here.
    """

    exponents: dict[str, int]
    hidden: dict[str, tuple[int, int]]
    added: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    weights: str = ""
    renamed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parsed(cls, fields: Mapping[str, Any] | None) -> Rescaled | None:
        """From the header of a file; None where the table is the network's own."""
        if fields is None:
            return None
        hidden = {name: (int(one), int(other)) for name, (one, other) in fields["hidden"].items()}
        exponents = {name: int(k) for name, k in fields["exponents"].items()}
        renamed = dict(fields.get("renamed", {}))
        return cls(exponents, hidden, dict(fields["added"]), dict(fields["digests"]), str(fields["weights"]), renamed)


@dataclass(frozen=True)
class Calibration:
    """What a table was measured on.

    digests: of each node, by name. weights: hash of the weights. batches: how many were measured. skipped:
    indices of batches left out as non-finite. input_sizes: per input and dimension, how often each size came.
    input_hashes: of the batches, at most 4096. versions: of calibcast and torch. rescaled: how the table was
    scaled, see `RangeTable.scaled`; None for the network's own ranges. ends_only: whether the table has only inputs and
    outputs, as the table of an engine in service does.
    """

    digests: dict[str, str]
    weights: str
    batches: int
    skipped: tuple[int, ...] = ()
    input_sizes: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    input_hashes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=versions)
    rescaled: Rescaled | None = None
    ends_only: bool = False

    @classmethod
    def parsed(cls, row: Mapping[str, Any]) -> Calibration:
        """From the header of a file. Raises KeyError, TypeError or ValueError for what no calibration writes."""
        require_types(row, fields_of(cls) | {"rescaled": dict[str, Any] | None}, "calibration.")
        if min((row["batches"], *row["skipped"])) < 0:
            raise ValueError("calibration counts fewer than 0 batches")
        tuples = {name: tuple(row[name]) for name in ("skipped", "input_hashes")}
        return cls(**{**row, **tuples, "rescaled": Rescaled.parsed(row.get("rescaled"))})

    @property
    def fingerprint(self) -> str:
        """One digest of the whole graph."""
        return fingerprint(self.digests)


@dataclass(frozen=True, eq=False)
class RangeData:
    """The parts of a range table. `RangeTable` adds the methods, and says what is in each part."""

    frame: pl.DataFrame
    calibration: Calibration
    hidden: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=HIDDEN_SCHEMA))
    rounding: pl.DataFrame = field(default_factory=empty_rounding)


def hidden_rows(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.select(list(HIDDEN_SCHEMA)).filter(pl.any_horizontal(pl.col(HIDDEN).is_not_null()))
