"""Changes settings of the whole process for a while, also where several threads do so at overlapping times."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

# A program's fake tensors share one mode, and that mode stores whether a kernel is running. So only one thread at a
# time may call operators on them. No thread waits long: such calls hold the interpreter lock anyway.
FAKE_TENSORS = threading.RLock()


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


class _OtherThreads(logging.Filter):
    """Lets through what other threads log."""

    def __init__(self) -> None:
        super().__init__()
        self._own = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self._own


@contextmanager
def unlogged(*names: str) -> Iterator[None]:
    """Drop what this thread logs under these names. Other threads still log, and the end restores the loggers."""
    with ExitStack() as stack:
        for name in names:
            logger, others = logging.getLogger(name), _OtherThreads()
            logger.addFilter(others)
            stack.callback(logger.removeFilter, others)
        yield
