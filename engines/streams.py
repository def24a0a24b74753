"""Handling of the process's stdout."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def give_up_stdout() -> None:
    """Send stdout to the null device when nobody reads it: Python flushes it on exit, which would fail."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
