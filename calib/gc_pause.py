"""Python's collector of cycles, out of the way of work that makes many objects and no cycles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No collection meanwhile; afterwards the collector is as it was.

    What is not in a cycle is freed as ever. A full collection visits every object of the process, which of a program of
    5,000 nodes takes 0.3 s, and comes after some 100,000 new ones: deciding on it makes as many in about that time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
