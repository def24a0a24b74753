"""Handling of the process's stdout and stderr."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from calibcast.calib.terminal_text import wrapped


class Messages(io.TextIOBase):
    """A stderr whose failures stop nobody: on a full disk or a closed pipe, messages are lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            give_up(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            give_up(self._stream)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_streams() -> None:
    """Give the process the streams that it was started without, as the null device, and a stderr that never fails.

    A closed stream is None in Python, and its number goes to the next file that is opened: what a library prints would
    then land in that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open as long as the process
    sys.stderr = Messages(sys.stderr)


def give_up(stream: TextIO) -> None:
    """Send a stream to the null device when nobody can read it: Python flushes it on exit, which would fail."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fitted(message: str, stream: TextIO) -> str:
    """A message that fits a terminal. In a file or a pipe it stays on one line, to be searched and parsed."""
    return wrapped(message) if stream.isatty() else message
