"""A job's messages on stderr: plain lines, or one JSON object a line."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from typing import Any, TextIO

from calibcast.calib.printable import printable_lines
from calibcast.engines.streams import fitted
from tqdm import tqdm

# Takes a job's results line by line, for stdout; messages on how it goes are logged.
Say = Callable[[str], None]
LOGGER = logging.getLogger("calibcast")
FORMATS = ("text", "json")


class _Lines(logging.Formatter):
    """`12:03:59 warning calibrate: ...`, with the process's rank where there are several."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self._rank = f" [rank {rank}]" if world > 1 else ""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f" {record.levelname.lower()}:"
        # Messages contain names of modules, which can contain anything, also control characters of a terminal.
        message = printable_lines(record.getMessage())
        return fitted(f"{datetime.fromtimestamp(record.created):%H:%M:%S}{self._rank}{level} {message}", sys.stderr)


class _Json(logging.Formatter):
    """One object: time (UTC), level, rank, message, and the fields of the event."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = getattr(record, "event", {})
        line = {"time": time, "level": record.levelname.lower(), "rank": self._rank, "message": record.getMessage()}
        return json.dumps({**line, **fields}, default=str)


class _Handler(logging.Handler):
    """Writes to `stream`, or to the current stderr, above a progress bar if there is one."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        stream = self._stream or sys.stderr
        try:
            tqdm.write(self.format(record), file=stream)
            stream.flush()
        except OSError:  # a closed pipe must not stop the job
            self.handleError(record)


class _Wrapped(io.TextIOBase):
    """A stderr for code that knows nothing of JSON: each line written to it is logged as one message."""

    def __init__(self, logger: logging.Logger, stream: TextIO) -> None:
        self._logger, self._stream, self._line = logger, stream, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if line.strip():
                self._logger.info("%s", line.rstrip("\r"), extra={"event": {"event": "output"}})
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def finish(self) -> None:
        """Log the last line, if it has no newline yet."""
        if self._line:
            self.write("\n")


@contextmanager
def logging_to_stderr(form: str, rank: int = 0, world: int = 1) -> Iterator[None]:
    """Inside the block, everything that calibcast, other libraries and Python's warnings log goes to stderr in `form`
    ("text" or "json").

    Whatever is printed goes to stderr, too. Stdout is for results, which are written to the stdout from before the
    block.
    """
    stderr = sys.stderr
    handler = _Handler(stderr if form == "json" else None)
    handler.setFormatter(_Json(rank) if form == "json" else _Lines(rank, world))
    before = (LOGGER.level, LOGGER.propagate, warnings.showwarning)
    LOGGER.addHandler(handler)
    # Of several processes, the first one reports progress; the others only report problems.
    LOGGER.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    LOGGER.propagate = False
    warnings.showwarning = lambda message, *_, **__: LOGGER.warning("%s", message)
    try:
        with _others(handler), ExitStack() as stack:
            if form == "json":
                printed = logging.Logger("printed")  # not in the logger tree, so no other logger's level applies
                printed.addHandler(handler)
                wrapped = _Wrapped(printed, stderr)
                stack.callback(wrapped.finish)
                stack.enter_context(redirect_stderr(wrapped))
                stack.enter_context(_turned(stderr, wrapped))
            stack.enter_context(redirect_stdout(sys.stderr))
            yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.level, LOGGER.propagate = before[0], before[1]
        warnings.showwarning = before[2]


@contextmanager
def _others(handler: logging.Handler) -> Iterator[None]:
    """Inside the block, `handler` replaces the root logger's handlers that write to a stream."""
    root = logging.getLogger()
    before = list(root.handlers)
    root.handlers = [handler, *(other for other in before if type(other) is not logging.StreamHandler)]
    try:
        yield
    finally:
        root.handlers = before


@contextmanager
def _turned(stderr: TextIO, wrapped: _Wrapped) -> Iterator[None]:
    """Inside the block, handlers that libraries such as torch gave their own loggers write to `wrapped` in place of
    stderr."""
    loggers = [log for log in logging.root.manager.loggerDict.values() if isinstance(log, logging.Logger)]
    handlers = [handler for log in loggers for handler in log.handlers if isinstance(handler, logging.StreamHandler)]
    turned = [(handler, handler.stream) for handler in handlers if handler.stream in (stderr, sys.__stderr__)]
    for handler, _ in turned:
        handler.setStream(wrapped)
    try:
        yield
    finally:
        for handler, before in turned:
            handler.setStream(before)


def tell(message: str, level: int = logging.INFO, **event: Any) -> None:
    """Log a message; `event` holds fields for the JSON format."""
    LOGGER.log(level, "%s", message, extra={"event": event})
