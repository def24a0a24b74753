"""Load a `.pt2` that was looked at, quietly, and without torch's way around its own safe unpickler."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from calibcast.calib.pt2.check import check_program_file
from calibcast.calib.pt2.refusal import ALLOW, RefusedError, allowed_by_owner

# They log the traceback of an error that is raised as well.
_LOUD = ("torch.export", "torch.export.pt2_archive._package", "torch._export.serde.serialize")


def load_checked(path: Path) -> torch.export.ExportedProgram:
    """The program at `path`. Raises RefusedError, and whatever torch raises for a damaged file."""
    check_program_file(path)
    with warnings.catch_warnings(), _quiet(), torch.serialization.safe_globals(_vouched_for()):
        # torch 2.11 says so of the file that it has mapped, which nobody writes to.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.export.load(str(path))


def _vouched_for() -> list[Any]:
    """Classes that this process has registered as containers, and those that the owner of the file has named.

    torch's safe unpickler takes them; else torch would try again with its unsafe one.
    """
    registered = [kind for kind in pytree.SUPPORTED_NODES if kind.__module__ != "builtins"]
    return registered + [_imported(name) for name in allowed_by_owner()]


def _imported(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RefusedError(f"{ALLOW} names {name!r}, which cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise RefusedError(f"{ALLOW} names {name!r}, which is no class: only classes can be allowed")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's log of an error out of what the user sees: the error itself is raised, and says more."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
