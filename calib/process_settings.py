"""Changes settings of the whole process for a while, also where several threads do so at overlapping times."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# A program's fake tensors share one mode, and that mode stores whether a kernel is running. So only one thread at a
# time may call operators on them. No thread waits long: such calls hold the interpreter lock anyway.
FAKE_TENSORS = threading.RLock()
_FILTERS = threading.Lock()


class HeldSetting:
    """A setting that is `value` while anyone needs it: the first to come sets it, the last to go restores it.

    If each user restored what it found, the second of two that overlap would leave the first one's value in place.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> None:
        self._read, self._write, self._value = read, write, value
        self._lock, self._users, self._before = threading.Lock(), 0, None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the setting is `value`. After the last user, or an error, it is what it was before the first."""
        with self._lock:
            if not self._users:
                self._before = self._read()
                try:
                    self._write(self._value)
                except BaseException:
                    self._write(self._before)
                    raise
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._write(self._before)


class _Dropped(logging.Filter):
    """Drops what one thread logs under some names, or under names below them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self._own, self._names = threading.get_ident(), names

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self._own or not _is_below(record.name, self._names)


@contextmanager
def unlogged(*names: str) -> Iterator[None]:
    """Drop what this thread logs under these names and below. Other threads still log, and the end restores all.

    The filter is on the handlers: a logger does not ask the filters of its parents.
    """
    dropped = _Dropped(names)
    handlers = _handlers_of(names)
    with _FILTERS:
        for handler in handlers:
            handler.filters = [*handler.filters, dropped]  # a new list: another thread may be reading the old one
    try:
        yield
    finally:
        with _FILTERS:
            for handler in handlers:
                handler.filters = [one for one in handler.filters if one is not dropped]


def _handlers_of(names: tuple[str, ...]) -> list[logging.Handler]:
    """All handlers that a record under one of the names, or below it, may reach."""
    found: dict[int, logging.Handler] = {}
    for name in (*names, *(known for known in list(logging.root.manager.loggerDict) if _is_below(known, names))):
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            found |= {id(handler): handler for handler in logger.handlers}
            logger = logger.parent
    last = [logging.lastResort] if logging.lastResort is not None else []
    return [*found.values(), *last]


def _is_below(name: str, names: tuple[str, ...]) -> bool:
    return f"{name}.".startswith(tuple(f"{one}." for one in names))


# The last stand-ins that were taken out. `print` of Python before 3.13 keeps no reference to sys.stdout between its
# text and its line end, so one that another thread takes out must live on until that line is done.
_ENDED: deque[io.TextIOBase] = deque(maxlen=1000)


class _OwnText(io.TextIOBase):
    """Stands for a stream: keeps what one thread writes, and hands on what others write."""

    def __init__(self, stream: TextIO, kept: io.StringIO) -> None:
        self.stream, self.ended = stream, False
        self._kept, self._own = kept, threading.get_ident()

    def write(self, text: str) -> int:
        mine = not self.ended and threading.get_ident() == self._own
        return (self._kept if mine else self.stream).write(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding


@contextmanager
def own_output_kept() -> Iterator[io.StringIO]:
    """Keep what this thread prints, to stdout and stderr. What other threads print goes where it went."""
    kept = io.StringIO()
    out, err = _OwnText(sys.stdout, kept), _OwnText(sys.stderr, kept)
    sys.stdout, sys.stderr = out, err
    try:
        yield kept
    finally:
        sys.stdout, sys.stderr = _without(sys.stdout, out), _without(sys.stderr, err)


def _without(stream: Any, ended: _OwnText) -> Any:
    """`stream` with one stand-in taken out of those that stand before the real stream."""
    ended.ended = True  # a handler that was made meanwhile may still write to it
    _ENDED.append(ended)
    if stream is ended:
        return ended.stream
    if isinstance(stream, _OwnText):
        stream.stream = _without(stream.stream, ended)
    return stream
