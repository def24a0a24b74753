"""Tables as text for a terminal: fitted to its width, aligned, cut where necessary, safe to print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibcast.calib.printable import printable
from calibcast.calib.terminal_text import broken, columns_of, cut, terminal_width

# Text is not cut to fewer columns than this.
_LEAST_TEXT = 12
# Of a cell that takes several lines, as many are shown.
_MOST_LINES = 3


@dataclass(frozen=True)
class Column:
    """A column of a text table.

    name: the field of the row. heading: the text above it. width: its largest width; None for text that takes what is
    left. number: align to the right, and never cut: without its head a number is another number. head: of text that is
    cut, show the beginning, not the end. wrap: the last column only: show the text on up to three lines. drop: where
    the table is too wide, the column with the largest number is dropped first; 0 is never dropped.
    """

    name: str
    heading: str
    width: int | None = None
    number: bool = False
    head: bool = False
    wrap: bool = False
    drop: int = 0


def text_table(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[Column], width: int | None = None, indent: str = ""
) -> list[str]:
    """A heading and a line per row, at most `width` wide (None: the terminal's), each after `indent`."""
    found = list(rows)
    space = (terminal_width() if width is None else width) - len(indent)
    texts = {c.name: [_text(row.get(c.name)) for row in found] for c in columns}
    # A column without text in any row is left out.
    shown = [c for c in columns if not found or any(texts[c.name])]
    needs = {c.name: max(map(columns_of, [c.heading, *texts[c.name]])) for c in columns}
    while (widths := _fitted(shown, needs, space)) is None:
        shown.remove(max(reversed(shown), key=lambda column: column.drop))
    lines = [_line(shown, widths, [column.heading for column in shown])]
    for row in range(len(found)):
        lines += _lines(shown, widths, [texts[column.name][row] for column in shown])
    return [f"{indent}{line}" for line in lines]


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
    widths = {
        c.name: needs[c.name] if c.number else min(needs[c.name], c.width) for c in columns if c.width is not None
    }
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
        space = " " * (widths[column.name] - columns_of(shown))
        padded.append(space + shown if column.number else shown + space)
    return " ".join(padded).rstrip()


def _lines(columns: Sequence[Column], widths: Mapping[str, int], cells: Sequence[str]) -> list[str]:
    """A row: one line, or more where its last column wraps."""
    last = columns[-1]
    if not last.wrap:
        return [_line(columns, widths, cells)]
    before = sum(widths[column.name] + 1 for column in columns[:-1])
    first, *more = broken(cells[-1], widths[last.name], hang=0)
    if len(more) >= _MOST_LINES:
        more = [*more[: _MOST_LINES - 2], " ".join(more[_MOST_LINES - 2 :])]
    rest = [" " * before + cut(text, widths[last.name], head=True) for text in more]
    return [_line(columns, widths, [*cells[:-1], first]), *rest]
