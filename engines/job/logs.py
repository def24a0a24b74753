"""What a job says on stderr: plain lines, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from tqdm import tqdm

LOGGER = logging.getLogger("calibcast")
FORMATS = ("text", "json")


class _Lines(logging.Formatter):
    """`12:03:59 warning calibrate: ...`, with the process's rank where there are several."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self._rank = f" [rank {rank}]" if world > 1 else ""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f" {record.levelname.lower()}:"
        return f"{datetime.fromtimestamp(record.created):%H:%M:%S}{self._rank}{level} {record.getMessage()}"


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
    """Writes to the stderr of the moment, above a bar that may be there."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except OSError:  # a closed pipe must not stop the job
            self.handleError(record)


@contextmanager
def logging_to_stderr(form: str, rank: int = 0, world: int = 1) -> Iterator[None]:
    """Within, calibcast's logger and Python's warnings go to stderr in `form` ("text" or "json")."""
    handler = _Handler()
    handler.setFormatter(_Json(rank) if form == "json" else _Lines(rank, world))
    before = (LOGGER.level, LOGGER.propagate, warnings.showwarning)
    LOGGER.addHandler(handler)
    # Of several processes, the first tells how it goes; the others speak when something is wrong.
    LOGGER.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    LOGGER.propagate = False
    warnings.showwarning = lambda message, *_, **__: LOGGER.warning("%s", message)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.level, LOGGER.propagate = before[0], before[1]
        warnings.showwarning = before[2]


def tell(message: str, level: int = logging.INFO, **event: Any) -> None:
    """Log a message, with fields for those who read JSON."""
    LOGGER.log(level, "%s", message, extra={"event": event})
