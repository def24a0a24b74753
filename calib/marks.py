"""Mark the nodes that calibcast inserts, to recognise them by the mark and not by their names.

The mark is kept under torch's own key for a user's annotations: it survives lowering, and saving as `.pt2`.
"""

from __future__ import annotations

from torch import fx

_CUSTOM, _KEY = "custom", "calibcast_inserted"


def mark_inserted(node: fx.Node) -> None:
    """Mark a node as ours: a cast, or the clamp of a mask before it."""
    node.meta[_CUSTOM] = {**(node.meta.get(_CUSTOM) or {}), _KEY: True}


def is_inserted(node: fx.Node) -> bool:
    """Whether calibcast has inserted the node."""
    return bool((node.meta.get(_CUSTOM) or {}).get(_KEY))


def inserted_nodes(graph: fx.Graph) -> frozenset[str]:
    """The names of the nodes that calibcast has inserted."""
    return frozenset(node.name for node in graph.nodes if is_inserted(node))
