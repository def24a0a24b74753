"""Two uses of one value that must share their precision, as in `m >= topk(m)`: rounding only one breaks ties.

Rounding keeps the order of elements. So a node that moves them, or picks some by their order, gives the same whether
they are rounded before or after it, and a comparison of its result with them stays as it was if both are rounded. Edges
are measured that way (`calib.rounding_groups`), and plans are held to it (`passes.ties`).
"""

from __future__ import annotations

import math
from functools import cache
from operator import getitem

import torch
from calibcast.calib.graph import argument_of, base_op, tensor_values
from calibcast.calib.operators import KEEPS_ROUNDED, operator_of
from calibcast.calib.rounding import rounded_number
from calibcast.calib.sentinels import MASK_AT_MOST
from torch import fx

_LOW_TYPES = (torch.float16, torch.bfloat16)


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
    return node.target is getitem or selects(node) or keeps_rounded(node)


def keeps_rounded(node: fx.Node) -> bool:
    """Whether what a node gives needs no rounding where its one input is rounded: it moves, negates or replaces
    elements, and no number that it puts in their place loses more than the last digits of a mask value.
    """
    entry = operator_of(base_op(node.target))
    if entry.moves or entry.name not in KEEPS_ROUNDED:
        return entry.moves
    read = [v.dtype for n in node.all_input_nodes for _, v in tensor_values(n) if v.dtype.is_floating_point]
    numbers = [number for name in entry.literals if (number := argument_of(node, name)) is not None]
    if numbers and len(read) > 1:
        return False  # it chooses between tensors, and each may be rounded apart from what is chosen
    # Without a floating-point input it makes new numbers, as the magnitude of complex ones does.
    return bool(read) and all(_is_held(number) for number in numbers if isinstance(number, (int, float)))


@cache
def _is_held(number: float) -> bool:
    """Whether both low types hold a number, or it is a mask value that they round to another one."""
    made = [rounded_number(number, low) for low in _LOW_TYPES]
    return all(low == number or (number <= MASK_AT_MOST and math.isfinite(low)) for low in made)
