"""Tables as text for a terminal: fitted to its width, aligned, cut where necessary, safe to print."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibcast.calib.printable import printable

# The width where no terminal says one, as for a file or a pipe.
_USUAL_WIDTH = 80
# Text is not cut to fewer columns than this.
_LEAST_TEXT = 12


@dataclass(frozen=True)
class Column:
    """A column of a text table.

    name: the field of the row. heading: the text above it. width: its largest width; None for text that takes what is
    left. number: align to the right. head: of text that is cut, show the beginning, not the end. drop: where the table
    is too wide, the column with the largest number is dropped first; 0 is never dropped.
    """

    name: str
    heading: str
    width: int | None = None
    number: bool = False
    head: bool = False
    drop: int = 0


def terminal_width() -> int:
    """Columns of the terminal, or what COLUMNS says; 80 where neither is known."""
    return shutil.get_terminal_size((_USUAL_WIDTH, 24)).columns


def text_table(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[Column], width: int | None = None, indent: str = ""
) -> list[str]:
    """A heading and a line per row, at most `width` wide (None: the terminal's), each after `indent`."""
    found = list(rows)
    space = (terminal_width() if width is None else width) - len(indent)
    texts = {c.name: [_text(row.get(c.name)) for row in found] for c in columns}
    # A column without text in any row is left out.
    shown = [c for c in columns if not found or any(texts[c.name])]
    needs = {c.name: max(map(_columns, [c.heading, *texts[c.name]])) for c in columns}
    while (widths := _fitted(shown, needs, space)) is None:
        shown.remove(max(reversed(shown), key=lambda column: column.drop))
    lines = [_line(shown, widths, [column.heading for column in shown])]
    lines += [_line(shown, widths, [texts[column.name][row] for column in shown]) for row in range(len(found))]
    return [f"{indent}{line}" for line in lines]


def cut(text: str, width: int, head: bool = False) -> str:
    """Text in at most `width` columns: its end, which says more about a path, or with `head` its beginning."""
    if _columns(text) <= width:
        return text
    while text and _columns(text) > width - 2:
        text = text[:-1] if head else text[1:]
    return f"{text}.." if head else f"..{text}"


def listed(names: Sequence[str], most: int) -> str:
    """The first `most` names, as in `a, b and 3 more`."""
    shown = ", ".join(printable(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def and_more(shown: int, total: int, how: str = "") -> list[str]:
    """The line under a table that was cut; none under a whole one. how: how to see the rest."""
    return [f"and {total - shown} more{how}"] if shown < total else []


def place(node: str, output: int) -> str:
    """How a tensor is named: `linear`, or `split[1]` for one of several outputs."""
    return f"{node}[{output}]" if output else node


def _fitted(columns: Sequence[Column], needs: Mapping[str, int], space: int) -> dict[str, int] | None:
    """A width for each column; None where they do not fit, and one of them can be dropped."""
    widths = {c.name: min(needs[c.name], c.width) for c in columns if c.width is not None}
    texts = [c.name for c in columns if c.width is None]
    left = space - sum(widths.values()) - max(0, len(columns) - 1)
    least = sum(min(needs[name], 2 * _LEAST_TEXT) for name in texts)
    if left < least and any(column.drop for column in columns):
        return None
    # The shorter ones get all that they need, the longer ones share the rest.
    for number, name in enumerate(sorted(texts, key=lambda name: needs[name])):
        widths[name] = min(needs[name], max(_LEAST_TEXT, left // (len(texts) - number)))
        left -= widths[name]
    return widths


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def _line(columns: Sequence[Column], widths: Mapping[str, int], cells: Sequence[str]) -> str:
    padded = []
    for column, text in zip(columns, cells, strict=True):
        shown = cut(text, widths[column.name], column.head)
        space = " " * (widths[column.name] - _columns(shown))
        padded.append(space + shown if column.number else shown + space)
    return " ".join(padded).rstrip()


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
