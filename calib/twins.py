"""Two uses of one value that must share their precision, as in `m >= topk(m)`: rounding only one breaks ties.

Rounding keeps the order of elements. So a node that moves them, or picks some by their order, gives the same whether
they are rounded before or after it, and a comparison of its result with them stays as it was if both are rounded. Edges
are measured that way (`calib.rounding_groups`), and plans are held to it (`passes.ties`).
"""

from __future__ import annotations

from operator import getitem

from calibcast.calib.graph import base_op
from calibcast.calib.operators import KEEPS_ROUNDED, operator_of
from torch import fx


def compares(node: fx.Node | None) -> bool:
    """Whether a node asks of two values which is larger, or whether they are equal."""
    if node is None or node.op != "call_function":
        return False
    entry = operator_of(base_op(node.target))
    return entry.compares or entry.equates


def selects(node: fx.Node | None) -> bool:
    """Whether a node gives elements of its input that are picked by their order."""
    return node is not None and node.op == "call_function" and operator_of(base_op(node.target)).selects


def commutes_with_rounding(node: fx.Node) -> bool:
    """Whether it is the same to round what a node reads and what it gives: it moves, selects or negates elements."""
    if node.op != "call_function":
        return False
    return node.target is getitem or selects(node) or operator_of(base_op(node.target)).name in KEEPS_ROUNDED
