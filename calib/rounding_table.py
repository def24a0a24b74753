"""`ranges.rounding`: what rounding one tensor, where one node reads it, does to the program's outputs.

One row per edge and low type. An edge leads from the node that made a tensor to a node that reads it; nodes between the
two that only move values are transparent. `calib.rounding_edges` finds the edges of a program, and the movers between.
With NSR = sum of `noise` over the edges that are active under a plan, its SQNR is about -10 log10(NSR) dB. An edge is
active where its reader is low, or where the tensor is rounded before: its maker or a mover between is low.

Columns:
    node: the reader's qualified name, or `output` for the program's results.
    input: the name of the node that made the tensor (inputs and weights by their placeholder), or `literal:other` for
        a number in the call, by the name of its argument.
    output: which output of `input`; 0 for a literal.
    low_precision_type: "float16" or "bfloat16".
    noise: noise-to-signal power ratio at the program's outputs, mean over batches. Within one output it is the mean
        over its channels, each held to its own power; over outputs it is the sum. inf where rounding made values that
        are not finite. Null where it could not be measured.
    noise_worst: the same of the worst batch. worst_batch: its index.
    noise_by_output: `noise` of each tensor that the program gives, in their order; of integers and booleans the share
        that changed. Null where there are more than `MOST_OUTPUTS` floating-point outputs (`noise` then has the square
        of that share), or where `noise` is null.
    nonfinite: elements of the reader's results that only rounding made NaN or Inf, summed over batches.
    steps: integer and boolean elements that rounding changed, summed over batches: indices, comparisons.
    local_sqnr_db: signal to noise at the reader's own results, in dB; inf where nothing changed.
    batches: how many batches were measured; 0 where none was.
    method: "gradient": the error at the reader's results was taken through the gradient. "run": in at least one
        batch the program was run with only this edge rounded. "scaled": for a rescaled program, estimated from
        measurements of the original; see `calib.rounding_scaling`. A merged row of which a part is estimated is
        "scaled", too. Null where there is no evidence.
    why_missing: why there is none; null where there is.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
from calibcast.calib.errors import ArtifactError
from calibcast.calib.parquet_size import declared_too_much

LOW_TYPE_NAMES = ("float16", "bfloat16")
OUTPUT = "output"  # the reader of the program's results
LITERAL = "literal:"
# Each output costs a backward pass; beyond this many, only the sum is measured.
MOST_OUTPUTS = 4
METHODS = ("gradient", "run")
SCALED = "scaled"  # a method of its own: estimated, not measured

ROUNDING_SCHEMA: dict[str, Any] = {
    "node": pl.String,
    "input": pl.String,
    "output": pl.Int64,
    "low_precision_type": pl.String,
    "noise": pl.Float64,
    "noise_worst": pl.Float64,
    "worst_batch": pl.Int64,
    "noise_by_output": pl.List(pl.Float64),
    "nonfinite": pl.Int64,
    "steps": pl.Int64,
    "local_sqnr_db": pl.Float64,
    "batches": pl.Int64,
    "method": pl.String,
    "why_missing": pl.String,
}
# These columns identify a row.
ROUNDING_KEY = ("node", "input", "output", "low_precision_type")


def empty_rounding() -> pl.DataFrame:
    """A frame without rows: nothing was measured, as with `rounding_batches=0`."""
    return pl.DataFrame(schema=ROUNDING_SCHEMA)


def rounding_gaps(rounding: pl.DataFrame) -> pl.DataFrame:
    """The rows without evidence, with why: these edges are left to the rules that judge by magnitude."""
    return rounding.filter(pl.col("noise").is_null())


_METADATA = "calibcast.rounding"


def rounding_metadata(rounding: pl.DataFrame) -> dict[str, str]:
    """The frame as metadata for the file of its range table: a Parquet file holds one table, and that is the ranges.

    The checksum of the file covers it there, and other readers of Parquet still see the ranges.
    """
    if not rounding.height:
        return {}
    stream = io.BytesIO()
    rounding.write_parquet(stream)
    return {_METADATA: base64.b64encode(stream.getvalue()).decode()}


def rounding_of(metadata: Mapping[str, str], source: Path) -> pl.DataFrame:
    """The frame in the metadata of a range table's file; an empty one where there is none, as in older files.

    Raises ArtifactError, naming `source`, where it is not what this version writes.
    """
    text = metadata.get(_METADATA)
    if text is None:
        return empty_rounding()
    try:
        content = base64.b64decode(text, validate=True)
        if (wrong := declared_too_much(content)) is not None:
            raise ValueError(wrong)
        frame = pl.read_parquet(io.BytesIO(content))
    except (Exception, pl.exceptions.PanicException) as error:  # a panic is not an Exception
        raise ArtifactError(f"{source}: its evidence of rounding is not readable: {error}") from error
    for name, dtype in ROUNDING_SCHEMA.items():
        if name not in frame.columns or frame.schema[name] != dtype:
            found = frame.schema.get(name, "missing")
            raise ArtifactError(f"{source}: column {name} of its evidence of rounding is {found}, expected {dtype}")
    if frame.select(ROUNDING_KEY).is_duplicated().any():
        raise ArtifactError(f"{source} has two rows of rounding for one edge: it was changed by hand")
    return frame.select(list(ROUNDING_SCHEMA))
