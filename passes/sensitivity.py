"""Readers that are sensitive to more than a magnitude: they divide by small values, or remove offsets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from operator import getitem

import torch
from calibcast.calib.graph import argument_at, base_op, producer_of
from calibcast.calib.operators import CONVERTS, HANDS_ON, KEEPS_POLES, MOVES, Pole, is_known, operator_of
from calibcast.calib.operators.operator import ATTENTION, RECURRENT
from calibcast.passes.evidence import Evidence
from torch import fx


def offset_free_nodes(names: Mapping[fx.Node, str], weights: Collection[str]) -> frozenset[str]:
    """Nodes whose mean no reader removes, directly or through views: a gate that is multiplied, weights of a mean.

    weights: names of placeholders. Of products, only one with weights can remove an offset, as weights are trained or
    made to do so; what a product of two activations leaves is measured.
    """
    movement = MOVES | CONVERTS

    def takes_offset(reader: fx.Node, node: fx.Node) -> bool:
        entry = operator_of(base_op(reader.target))
        if entry.product and entry.product not in {RECURRENT, ATTENTION}:
            others = [n for n in reader.all_input_nodes if n is not node]
            return entry.takes_offset and any(_moved_from(n).name in weights for n in others)
        known = isinstance(reader.target, torch._ops.OpOverload) and is_known(base_op(reader.target))
        # The caller may do anything with an output, and so may a region, a custom op, or one that the table lacks.
        return entry.takes_offset if known else reader.target is not getitem

    made = [node for node in names if node.op in {"call_function", "placeholder"} and node.target is not getitem]
    return frozenset(names[node] for node in made if not _reaches(node, movement, takes_offset))


def _moved_from(node: fx.Node) -> fx.Node:
    while base_op(node.target) in MOVES and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def magnified_tensors(
    names: Mapping[fx.Node, str], evidence: Evidence, low_type: torch.dtype
) -> frozenset[tuple[str, int]]:
    """Tensors, by node and output, with small values that a division or a logarithm blows up: nonzero, and below the
    smallest normal of the low type.

    Found backward: through roots, sums and views, as long as their results are as small.
    """
    tiny = float(torch.finfo(low_type).smallest_normal)
    if not any(facts.smallest is not None and facts.smallest < tiny for facts in evidence.values()):
        return frozenset()
    found: set[fx.Node] = set()
    calls = [node for node in names if node.op == "call_function"]
    sources = [node for node in names if node.op != "call_function"]
    for node in [*reversed(calls), *sources]:
        producer, output = producer_of(node)
        facts = evidence.get((names.get(producer, producer.name), output or 0))
        if facts is None or facts.smallest is None or not facts.smallest < tiny:
            continue
        if _reaches(node, KEEPS_POLES, _magnifies) or any(user in found and _hands_on(user) for user in node.users):
            found.add(node)
    return frozenset((names.get(node, node.name), output or 0) for node, output in map(producer_of, found))


def _reaches(node: fx.Node, through: frozenset[str], found: Callable[[fx.Node, fx.Node], bool]) -> bool:
    """Whether `found` holds for some reader, directly or behind operators in `through`."""
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop()
        for user in current.users:
            if found(user, current):
                return True
            # Only the first argument: the second of `expand_as` is a pattern.
            moved = base_op(user.target) in through and _is_first(user, current)
            if user not in seen and (moved or user.target is getitem):
                seen.add(user)
                waiting.append(user)
    return False


def _is_first(reader: fx.Node, node: fx.Node) -> bool:
    """Whether `node` is the first argument of `reader`, or one of a list there."""
    first = reader.args[0] if reader.args else None
    return any(argument is node for argument in (first if isinstance(first, (list, tuple)) else [first]))


def _hands_on(reader: fx.Node) -> bool:
    return reader.target is getitem or base_op(reader.target) in HANDS_ON


def _magnifies(reader: fx.Node, node: fx.Node) -> bool:
    return any(_at_pole(reader, node, pole) for pole in operator_of(base_op(reader.target)).poles)


def _at_pole(reader: fx.Node, node: fx.Node, pole: Pole) -> bool:
    if len(reader.args) <= pole.argument or reader.args[pole.argument] is not node:
        return False
    if pole.exponent is None:
        return True
    exponent = argument_at(reader, pole.exponent)
    return isinstance(exponent, (int, float)) and exponent < 0
