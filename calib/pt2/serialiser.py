"""torch's serialiser of programs without the work that it throws away: a third of the time to save, half to load."""

from __future__ import annotations

import importlib
import threading
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

# torch.export.save and torch.compile register fake tensors with pickle while they run, and fail if another thread does
# the same. Hold this lock around such calls, so that several threads can build engines.
SERIALISING = threading.RLock()


@contextmanager
def serialising() -> Iterator[None]:
    """Save or load programs in this block.

    `torch._export.serde.serialize` (2.11 to 2.14) brings the whole file into a canonical order and drops the result,
    and asks `get_type_hints` of a class for each of its objects.
    """
    module = importlib.import_module("torch._export.serde.serialize")
    typed = mock.patch.object(module, "typing", _Hints())
    with SERIALISING, typed, mock.patch.object(module, "canonicalize", lambda program, *_: program):
        yield


class _Hints:
    """The module `typing`, which remembers the hints of a class."""

    def __getattr__(self, name: str) -> Any:
        return getattr(typing, name)

    def get_type_hints(self, kind: Any, globalns: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        if more or not isinstance(kind, type):
            return typing.get_type_hints(kind, globalns=globalns, **more)
        return _hints(kind, _Names(globalns))


class _Names:
    """The names of a module, of which there is one for all its classes."""

    def __init__(self, names: dict[str, Any] | None) -> None:
        self.names = names

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Names) and self.names is other.names

    def __hash__(self) -> int:
        return id(self.names)


@cache
def _hints(kind: type, names: _Names) -> dict[str, Any]:
    return typing.get_type_hints(kind, globalns=names.names)
