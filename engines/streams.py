"""Handling of the process's stdout and stderr."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

from calibcast.calib.terminal_text import wrapped


def give_up_stdout() -> None:
    """Send stdout to the null device when nobody reads it: Python flushes it on exit, which would fail."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fitted(message: str, stream: TextIO) -> str:
    """A message that fits a terminal. In a file or a pipe it stays on one line, to be searched and parsed."""
    return wrapped(message) if stream.isatty() else message
