"""What a model calls its outputs: keys of dicts, and fields of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calibcast.calib.errors import MismatchError
from torch.utils import _pytree as pytree


def leaf_names(output: Any) -> list[str | None]:
    """For each flat output the last name on the way to it, with the places behind that; None where it has no name."""
    paths, _ = pytree.tree_flatten_with_path(output)
    return [_name(path) for path, _ in paths]


def _name(path: Sequence[Any]) -> str | None:
    parts: list[str] = []
    for key in path:
        named = getattr(key, "key", None) or getattr(key, "name", None)
        parts = [str(named)] if isinstance(named, str) else [*parts, str(getattr(key, "idx", key))]
    return ".".join(parts) if parts and not parts[0].isdigit() else None


def in_order_of(names: Sequence[str | None], output: Any, leaves: Sequence[Any], place: str) -> list[Any]:
    """Flat outputs in the order of the program's `names`, where both sides name them all.

    Raises MismatchError where an engine gives other names. An engine that gives a tuple, or a program that does, is
    taken by position.
    """
    ours = leaf_names(output)
    if None in ours or None in names or ours == list(names):
        return list(leaves)
    if sorted(map(str, ours)) != sorted(map(str, names)):
        raise MismatchError(
            f"{place}: the engine calls its outputs {', '.join(map(str, ours))}, the program "
            f"{', '.join(map(str, names))}. Give them the program's names, or return a tuple in its order."
        )
    given = dict(zip(ours, leaves, strict=True))
    return [given[name] for name in names]
