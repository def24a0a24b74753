"""Settings of the whole process that are another way for a while, however uses of them on several threads overlap."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

# A program's fake tensors share one mode, which notes in itself whether a kernel runs: one thread at a time may call
# operators on them. Nothing waits long for it, as what is done there holds the interpreter anyway.
FAKE_TENSORS = threading.RLock()


class HeldSetting:
    """A setting that is `value` while anyone needs it: the first to come sets it, the last to go restores it.

    Were each to restore what it found, the second of two that overlap would leave the setting of the first for good.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> None:
        self._read, self._write, self._value = read, write, value
        self._lock, self._users, self._before = threading.Lock(), 0, None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the setting is as wanted; after the last use, also after an error, as it was before the first."""
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
    """Without what this thread logs under these names; other threads are heard, and no logger is changed for good."""
    with ExitStack() as stack:
        for name in names:
            logger, others = logging.getLogger(name), _OtherThreads()
            logger.addFilter(others)
            stack.callback(logger.removeFilter, others)
        yield
