"""SIGTERM and Ctrl-C, handled where the statistics are consistent: between two batches, never inside one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from calibcast.engines.job.errors import Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Inside the block, SIGINT and SIGTERM raise `Stopped`: at once, or at the end of a `held` block. A second signal
    does not wait.
    """

    def __init__(self) -> None:
        self._held, self._pending, self._seen = 0, 0, False
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A signal that arrives inside the block raises at its end, when the statistics are consistent again."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        self.check()

    def check(self) -> None:
        """Raise `Stopped` for a signal that was held back."""
        if self._pending and not self._held:
            number, self._pending = self._pending, 0
            raise Stopped(number)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a loader's worker inherited the handler and has nothing to save
            os._exit(128 + number)
        if self._held and not self._seen:
            self._pending, self._seen = number, True
            return
        self._seen = True
        raise Stopped(number)
