"""Range tables as Parquet files: written with a header and a checksum, checked column by column when read."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict
from pathlib import Path

import polars as pl
from calibcast.calib.artifacts import SCHEMA_VERSION, check_header, parsed, save_frame
from calibcast.calib.errors import ArtifactError
from calibcast.calib.parquet_size import declared_too_much
from calibcast.calib.range_checks import check_values
from calibcast.calib.range_schema import HIDDEN_SCHEMA, SCHEMA, Calibration, RangeData, hidden_rows
from calibcast.calib.rounding_table import rounding_metadata, rounding_of
from calibcast.calib.statistic_names import HIDDEN

_KIND = "ranges"
_HEADER_KEY = "calibcast"


def save_ranges(path: str | os.PathLike[str], data: RangeData) -> None:
    """Write a range table, whole or not at all. Raises ArtifactError when it cannot be written."""
    header = {_HEADER_KEY: _KIND, "schema": SCHEMA_VERSION, "calibration": asdict(data.calibration)}
    whole = data.frame.join(data.hidden, on=["node", "output"], how="left", maintain_order="left")
    save_frame(path, whole, {_HEADER_KEY: json.dumps(header), **rounding_metadata(data.rounding)})


def read_ranges(content: bytes, source: Path) -> RangeData:
    """The range table in the bytes of a Parquet file. Raises ArtifactError, naming `source`, for anything else.

    Call it only with bytes whose checksum is right: damaged bytes can crash the process.
    """
    try:
        if (wrong := declared_too_much(content)) is not None:
            raise ValueError(wrong)
        metadata = pl.read_parquet_metadata(io.BytesIO(content))
        header = json.loads(metadata.get(_HEADER_KEY, "{}"))
        frame = pl.read_parquet(io.BytesIO(content))
    except (Exception, pl.exceptions.PanicException) as error:  # a panic is not an Exception
        raise ArtifactError(f"{source} is not a readable Parquet file (truncated or foreign): {error}") from error
    check_header(header if isinstance(header, dict) else {}, _KIND, source)
    with parsed(source, _KIND):
        calibration = Calibration.parsed(header["calibration"])
        checked = _checked(frame, source)
        rounding = rounding_of(metadata, source)
        return RangeData(checked.select(list(SCHEMA)), calibration, hidden_rows(checked), rounding)


def _checked(frame: pl.DataFrame, source: Path) -> pl.DataFrame:
    missing = [name for name in SCHEMA if name not in frame.columns]
    if missing:
        raise ArtifactError(f"{source} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
    # Without the `HIDDEN` columns, nothing was measured inside nodes; the rules then use bounds from the peaks.
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
