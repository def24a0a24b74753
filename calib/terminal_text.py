"""Sentences as text for a terminal: how wide it is, and what to do with text that is wider."""

from __future__ import annotations

import re
import shutil
import unicodedata

# The width where no terminal says one, as for a file or a pipe.
_USUAL_WIDTH = 80
# The indent of a line, with a label and the gap after it where it has one.
_LABEL = re.compile(r"\s*(?:\S+(?: \S+)? {2,})?")

# Where a line may be broken: not between a number and its unit.
_GAP = re.compile(r" +(?!(?:dB|B|[kMGT]B)\b)")


def terminal_width() -> int:
    """Columns of the terminal, or what COLUMNS says; 80 where neither is known."""
    return shutil.get_terminal_size((_USUAL_WIDTH, 24)).columns


def wrapped(text: str, width: int | None = None) -> str:
    """`text` with every line that is longer than `width` columns (None: the terminal's) broken at spaces.

    The rest of such a line is indented, under its text where it begins with a label and a gap (`plan        made`). A
    word is never broken, and one that is longer than a line stays where it is: paths are there to be copied.
    """
    space = terminal_width() if width is None else width
    return "\n".join(part for line in text.split("\n") for part in broken(line, space))


def cut(text: str, width: int, head: bool = False) -> str:
    """Text in at most `width` columns: its end, which says more about a path, or with `head` its beginning."""
    if columns_of(text) <= width:
        return text
    while text and columns_of(text) > width - 2:
        text = text[:-1] if head else text[1:]
    if head and " " in text[len(text) // 2 :]:
        text = text[: text.rindex(" ") + 1]  # half a number would be another number
    return f"{text}.." if head else f"..{text}"


def broken(line: str, space: int, hang: int | None = None) -> list[str]:
    """`line` in pieces of at most `space` columns, all but the first indented by `hang` (None: as `wrapped` says)."""
    found = _LABEL.match(line)
    label = "" if found is None else found.group()
    if hang is None:
        hang = len(label) if label.strip() and len(label) < space // 2 else len(label) - len(label.lstrip()) + 2
    pieces = []
    while columns_of(line) > space:
        end = _break(line, space, hang)
        if end is None:
            break
        pieces.append(line[:end].rstrip())
        line = " " * hang + line[end:].lstrip()
    return [*pieces, line]


def _break(line: str, space: int, hang: int) -> int | None:
    """Where to break a line: the last gap that fits, or the first one after a word that no line can hold."""
    gaps = [found.start() for found in _GAP.finditer(line) if line[: found.start()].strip()]
    fitting = [gap for gap in gaps if columns_of(line[:gap]) <= space]
    later = [gap for gap in gaps if gap not in fitting]
    if fitting:
        word = line[fitting[-1] :].split()
        if word and hang + columns_of(word[0]) <= space:
            return fitting[-1]
    return later[0] if later else None


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
