"""The one error of this package, and the names that the owner of a file has allowed."""

from __future__ import annotations

import os

ALLOW = "CALIBCAST_ALLOW"


class RefusedError(Exception):
    """A part of a file is not among the harmless forms. The message says which part, and what it holds."""


def allowed_by_owner() -> frozenset[str]:
    """Classes, as `package.module.Class`, that may be made from a file.

    They come from `torch.serialization.add_safe_globals`, and from the environment variable CALIBCAST_ALLOW, which
    holds names separated by commas.
    """
    import torch

    named = {name.strip() for name in os.environ.get(ALLOW, "").split(",") if name.strip()}
    for entry in torch.serialization.get_safe_globals():
        if isinstance(entry, tuple):
            named.add(str(entry[1]))
        elif isinstance(entry, type):
            named.add(f"{entry.__module__}.{entry.__qualname__}")
    return frozenset(named)


def how_to_allow(name: str) -> str:
    """What the owner of a file does to let a class through."""
    return (
        f"If the file is yours and you trust {name}, allow it by name: {ALLOW}={name} in the environment, or "
        "torch.serialization.add_safe_globals([..]) in Python"
    )


def shown(text: object, most: int = 80) -> str:
    """A piece of a hostile file, fit for a message: one line, printable, and short."""
    line = repr(text)
    return line if len(line) <= most else f"{line[: most - 3]}..."
