"""Where results go: a table, JSON, CSV or Parquet, to a file or down a pipe."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import polars as pl
from calibcast.calib.artifacts import written_whole
from calibcast.calib.printable import printable, printable_lines
from calibcast.calib.terminal_text import wrapped
from calibcast.engines.colour import painted
from calibcast.engines.streams import give_up
from calibcast.engines.usage import UsageError

_FORMULA = frozenset("=+-@\uff1d\uff0b\uff0d\uff20")
FORMATS = ("table", "json", "csv", "parquet")


def write_frame(
    frame: pl.DataFrame,
    text: Callable[[], str],
    form: str = "table",
    output: Path | None = None,
    red: Collection[int] = (),
) -> None:
    """Write `frame` in `form` to `output`, or to stdout. For `table`, what `text` returns is written.

    red: numbers of the lines of a table that a terminal with colours shows in red.

    It is no error when the reader of a pipe stops early, as `head` does. Raises UsageError for an unknown form, and
    for Parquet on a terminal; ArtifactError when the file cannot be written.
    """
    check_format(form, output)
    data = encoded(frame, text, form)
    if output is None:
        write_bytes(_in_red(data, red) if form == "table" and red else data)
        return
    with written_whole(output) as temporary:
        temporary.write_bytes(data)


def _in_red(data: bytes, red: Collection[int]) -> bytes:
    lines = data.decode().split("\n")
    return "\n".join(painted(line, "red") if n in red else line for n, line in enumerate(lines)).encode()


def check_format(form: str, output: Path | None) -> None:
    """Raise UsageError unless `form` is known and can be written to `output`."""
    if form not in FORMATS:
        raise UsageError(f"--format {form}: known are {', '.join(FORMATS)}")
    if form == "parquet" and output is None and sys.stdout.isatty():
        raise UsageError("--format parquet is not for a terminal: give -o FILE, or pipe it")


def encoded(frame: pl.DataFrame, text: Callable[[], str], form: str) -> bytes:
    """`frame` in one of `FORMATS`. In JSON, inf and NaN are text; in CSV, lists are joined by spaces.

    In CSV, text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    if form == "table":
        return f"{wrapped(printable_lines(text()))}\n".encode()
    if form == "json":
        rows = [{key: _plain(value) for key, value in row.items()} for row in frame.to_dicts()]
        return f"{_escaped(json.dumps(rows, indent=1, ensure_ascii=False))}\n".encode()
    if form == "csv":
        flat = [
            pl.col(name).list.eval(pl.element().cast(pl.String)).list.join(" ")
            for name, dtype in frame.schema.items()
            if isinstance(dtype, pl.List)
        ]
        flattened = frame.with_columns(flat)
        texts = [pl.col(name).map_elements(spreadsheet_text, pl.String) for name in _texts(flattened)]
        return flattened.with_columns(texts).write_csv().encode()
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def spreadsheet_text(text: str) -> str:
    """Text that a spreadsheet shows and does not run. https://owasp.org/www-community/attacks/CSV_Injection"""
    shown = printable(text)
    return f"'{shown}" if text.lstrip()[:1] in _FORMULA or text[:1] in ("\t", "\r", "\n") else shown


def _texts(frame: pl.DataFrame) -> list[str]:
    return [name for name, dtype in frame.schema.items() if dtype in (pl.String, pl.Categorical)]


def _escaped(text: str) -> str:
    """JSON with terminal control characters escaped; `json` itself leaves some of them as they are."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)


def write_bytes(data: bytes) -> None:
    """Write to stdout, and end quietly when the reader of a pipe has gone."""
    try:
        stream = getattr(sys.stdout, "buffer", None)
        if stream is None:  # stdout was replaced by a stream that takes text
            sys.stdout.write(data.decode())
        else:
            sys.stdout.flush()
            stream.write(data)
        sys.stdout.flush()
    except BrokenPipeError:
        give_up(sys.stdout)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value
