"""Checks for numbers that no calibration writes: the file was changed by hand, or damaged."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from calibcast.calib.errors import ArtifactError
from calibcast.calib.statistic_names import BINS

KINDS = ("input", "parameter", "buffer", "constant", "activation", "other")
_ALWAYS = (
    "node", "output", "op", "module", "source", "kind", "dtype", "shape", "batches", "elements", "nan", "posinf",
    "neginf", "zeros", "masked",
)  # fmt: skip
_COUNTS = ("output", "batches", "elements", "nan", "posinf", "neginf", "zeros", "masked")
_BATCHES = ("absmax_batch", "nonfinite_batch")
_TEXTS = ("node", "op", "module", "source", "dtype")
MOST_TEXT = 1 << 14
_NUMBERS = ("min", "max", "absmax", "smallest", "mean", "rms")


def check_values(frame: pl.DataFrame, source: Path) -> None:
    """Raise ArtifactError when a row contradicts itself, naming the tensor, the column and the numbers."""
    for name in _ALWAYS:
        _refuse(frame, pl.col(name).is_null(), f"has no {name}", source)
    _refuse(frame, ~pl.col("kind").is_in(KINDS), f"has a kind that is none of {', '.join(KINDS)}", source)
    for name in _COUNTS:
        _refuse(frame, pl.col(name) < 0, f"has a negative {name}", source)
    for name in _NUMBERS:
        _refuse(frame, ~pl.col(name).is_finite(), f"has NaN or Inf as its {name}", source)
    for name in _BATCHES:
        _refuse(frame, pl.col(name) < 0, f"has a negative {name}", source)
    for name in ("hidden_max", "hidden_min"):
        _refuse(frame, (pl.col(name) < 0) | pl.col(name).is_nan(), f"has a negative {name}, or NaN", source)
    for name in _TEXTS:
        _refuse(frame, pl.col(name).str.len_bytes() > MOST_TEXT, f"has a {name} of more than {MOST_TEXT} bytes", source)
    counted = pl.sum_horizontal("nan", "posinf", "neginf", "zeros", "masked")
    _refuse(frame, counted > pl.col("elements"), "counts more than its elements", source)
    _refuse(frame, pl.col("min") > pl.col("max"), "has a min above its max", source)
    peak = pl.max_horizontal(pl.col("min").abs(), pl.col("max").abs())
    _refuse(frame, pl.col("absmax").ne_missing(peak), "has an absmax that is not the larger of |min| and |max|", source)
    _refuse(frame, pl.col("smallest") > pl.col("absmax"), "has a smallest magnitude above its absmax", source)
    bins = pl.col("histogram").list
    _refuse(frame, bins.len() != BINS, f"has a histogram without {BINS} bins", source)
    _refuse(frame, bins.min() < 0, "has a negative count in its histogram", source)
    _refuse(frame, bins.sum() > pl.col("elements"), "counts more in its histogram than its elements", source)


def _refuse(frame: pl.DataFrame, wrong: pl.Expr, what: str, source: Path) -> None:
    found = frame.filter(wrong.fill_null(False))
    if found.is_empty():
        return
    row = found.row(0, named=True)
    numbers = ", ".join(f"{name} {row[name]}" for name in ("min", "max", "absmax", "elements"))
    more = f", and so do {found.height - 1} more" if found.height > 1 else ""
    raise ArtifactError(
        f"{source}: the row of tensor {row['node']} (output {row['output']}; {numbers}) {what}{more}. "
        "The file was changed by hand, or is damaged: calibrate again."
    )
