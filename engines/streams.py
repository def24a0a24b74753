"""The process's own output."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def give_up_stdout() -> None:
    """Python flushes stdout once more on exit, which would complain; nobody is there to read it."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
