"""Frames as text for a terminal: aligned, cut to their width, safe to print."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from calibcast.calib.printable import printable

WIDTH = 100


@dataclass(frozen=True)
class Column:
    """A column of a text table: the name of the field, its heading, its width, and whether it is a number."""

    name: str
    heading: str
    width: int
    number: bool = False


def text_table(rows: Iterable[dict[str, Any]], columns: Sequence[Column]) -> list[str]:
    """A heading and a line per row, at most `WIDTH` wide if the columns are."""
    lines = [_line(columns, [column.heading for column in columns])]
    return lines + [_line(columns, [cell(row[column.name], column.width) for column in columns]) for row in rows]


def cell(value: Any, width: int) -> str:
    """A value in at most `width` columns of a terminal; of long text the end, which tells more than the beginning."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = printable(str(value))
    if _columns(text) <= width:
        return text
    while _columns(text) > width - 2:
        text = text[1:]
    return f"..{text}"


def listed(names: Sequence[str], most: int) -> str:
    """`a, b and 3 more`."""
    shown = ", ".join(printable(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _line(columns: Sequence[Column], cells: Sequence[str]) -> str:
    padded = []
    for column, text in zip(columns, cells, strict=True):
        space = " " * (column.width - _columns(text))
        padded.append(space + text if column.number else text + space)
    return " ".join(padded).rstrip()


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
