"""Check a `.pt2` and load it: without torch's log messages, and without its fallback to the unsafe unpickler."""

from __future__ import annotations

import importlib
import threading
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from calibcast.calib.process_settings import unlogged
from calibcast.calib.pt2.check import check_program_file
from calibcast.calib.pt2.refusal import ALLOW, RefusedError, allowed_by_owner
from torch import fx

# torch logs the traceback of an error that it also raises, and what it made of a hostile expression.
_LOUD = ("torch",)

# torch's reader keeps what it is reading in a variable of its module, and refuses a second one.
_ONE_AT_A_TIME = threading.Lock()


def load_checked(path: Path, trusted: bool = False) -> torch.export.ExportedProgram:
    """The program at `path`. Raises RefusedError, and whatever torch raises for a damaged file.

    trusted: a process of this user has just written it where nobody else can write; it is not checked.
    """
    if not trusted:
        check_program_file(path)
    with _ONE_AT_A_TIME, warnings.catch_warnings(), unlogged(*_LOUD), torch.serialization.safe_globals(_vouched_for()):
        # torch 2.11 warns about the file that it has mapped, which nobody writes to.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        with mock.patch.object(fx.Node, "_rename", _renamed):
            return torch.export.load(str(path))


_RENAME = fx.Node._rename


def _renamed(node: fx.Node, candidate: str) -> None:
    """Rename a node, but leave nodes that give nothing (`_vmap_increment_nesting`) the names that their file has.

    torch's reader (2.11 to 2.14) renames those to `.._unused`, so that plans and tables of the program would not fit.
    """
    if not candidate.endswith("_unused"):
        _RENAME(node, candidate)


def _vouched_for() -> list[Any]:
    """Classes that this process has registered as containers, and classes that the owner of the file has named.

    torch's safe unpickler accepts these. Otherwise torch would try again with its unsafe unpickler.
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
