"""Colour on a terminal only: https://no-color.org."""

from __future__ import annotations

import os
import sys
from typing import TextIO

_CODES = {"red": "31", "green": "32", "yellow": "33", "bold": "1"}


def has_colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that shows colours, and the user has not set NO_COLOR."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def painted(text: str, colour: str, stream: TextIO | None = None) -> str:
    """`text` in a colour where `stream` (None: stdout) shows colours. Remove unprintable characters before, not
    after."""
    shown = has_colour(sys.stdout if stream is None else stream)
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if shown and text else text
