"""Where results go: a table, JSON, CSV or Parquet, to a file or down a pipe."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
from calibcast.calib.artifacts import written_whole
from calibcast.engines.usage import UsageError

FORMATS = ("table", "json", "csv", "parquet")


def write_frame(frame: pl.DataFrame, text: Callable[[], str], form: str = "table", output: Path | None = None) -> None:
    """Write `frame` in `form` to `output`, or to stdout: `table` is what `text` gives.

    A reader of the pipe that has seen enough, as `head` does, is no error. Raises UsageError for an unknown form, and
    for Parquet on a terminal; ArtifactError when the file cannot be written.
    """
    check_format(form, output)
    data = encoded(frame, text, form)
    if output is None:
        write_bytes(data)
        return
    with written_whole(output) as temporary:
        temporary.write_bytes(data)


def check_format(form: str, output: Path | None) -> None:
    """Raise UsageError unless `form` is known and can go where it is to go."""
    if form not in FORMATS:
        raise UsageError(f"--format {form}: known are {', '.join(FORMATS)}")
    if form == "parquet" and output is None and sys.stdout.isatty():
        raise UsageError("--format parquet is not for a terminal: give -o FILE, or pipe it")


def encoded(frame: pl.DataFrame, text: Callable[[], str], form: str) -> bytes:
    """`frame` in one of `FORMATS`. In JSON, inf and NaN are text; in CSV, lists are joined by spaces."""
    if form == "table":
        return f"{text()}\n".encode()
    if form == "json":
        rows = [{key: _plain(value) for key, value in row.items()} for row in frame.to_dicts()]
        return f"{json.dumps(rows, indent=1, ensure_ascii=False)}\n".encode()
    if form == "csv":
        flat = [
            pl.col(name).list.eval(pl.element().cast(pl.String)).list.join(" ")
            for name, dtype in frame.schema.items()
            if isinstance(dtype, pl.List)
        ]
        return frame.with_columns(flat).write_csv().encode()
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def write_bytes(data: bytes) -> None:
    """Write to stdout, and end quietly when the reader of a pipe has gone."""
    try:
        stream = getattr(sys.stdout, "buffer", None)
        if stream is None:  # replaced by one that takes text
            sys.stdout.write(data.decode())
        else:
            sys.stdout.flush()
            stream.write(data)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more on exit, which would complain; nobody is there to read it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value
