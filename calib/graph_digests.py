"""Compare graphs by the digests of their nodes: one digest of a whole graph, and the first node that differs."""

from __future__ import annotations

import hashlib


def fingerprint(digests: dict[str, str]) -> str:
    """One digest of the whole graph, from the digests of its nodes."""
    text = "\n".join(f"{name} {digest}" for name, digest in digests.items())
    return hashlib.sha256(text.encode()).hexdigest()


def first_difference(ours: dict[str, str], theirs: dict[str, str]) -> str | None:
    """Name the first node in which two graphs differ; None when they are the same."""
    for name, digest in ours.items():
        if name not in theirs:
            return f"node {name} is only in this program"
        if theirs[name] != digest:
            return f"node {name} has another op, edge, argument, dtype or shape"
    for name in theirs:
        if name not in ours:
            return f"node {name} is not in this program"
    return None if list(ours) == list(theirs) else "the nodes stand in another order"
