"""Follow the numbers that stand for "masked": where they come from, how far they get, and which
comparisons a cast does not change.

A sentinel is at or below -1e4. In the low type it is rounded, and saturated where a cast makes it. So two sentinels may
become one (-1e9 and -inf), and one may become two (-inf from a low `masked_fill`, -32752 from a cast).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import getitem

from calibcast.calib.aliasing import storage_roots, written_arguments
from calibcast.calib.graph import base_op, is_measurable, tensor_values
from calibcast.calib.operators import COMPARES, CONVERTS, FILLS, MASK_CHOICE, MASKING, MOVES, SELECTS
from torch import fx

# Models for half precision have used -1e4 for "masked" since the first BERT; others use -1e9 or less.
MASK_AT_MOST = -1e4
# A number above this is above every mask value in any type, however both are rounded.
_ABOVE_MASKS = MASK_AT_MOST / 2
ANY = math.nan  # in a node's set of sentinels: it may hold unknown ones, too
PASSES = MOVES | MASKING | SELECTS | CONVERTS | FILLS
Sentinels = Mapping[fx.Node, frozenset[float]]


def sentinels_of(graph_module: fx.GraphModule, sources: set[str]) -> Sentinels:
    """The nodes that a mask value may have reached, with its possible values: numbers in the graph, or ANY.

    `sources`: placeholders through which a mask may come in.
    """
    found: dict[fx.Node, frozenset[float]] = {}
    written = _written(graph_module)
    for node in graph_module.graph.nodes:
        if not is_float(node):
            continue
        if node.op == "placeholder":
            carried = frozenset({ANY} if node.name in sources else ())
        else:
            carried = _carried(node, found)
        if carried and node in written:
            carried |= {ANY}  # what a write has put there may show in any view
        if carried:
            found[node] = carried
            for base in _written_bases(node):
                found[base] = found.get(base, frozenset()) | {ANY}
    return found


def reads_order(reader: fx.Node, sentinels: Sentinels) -> bool:
    """Whether `reader` is a comparison whose result stays the same when a mask is saturated and rounded.

    - With a number above all masks: yes. A cast keeps the order, and no rounding crosses the 5000 between them. With a
      number as low as a mask (`x > -inf`, `x > -1e9`) the result could change.
    - Of two tensors that hold the same single sentinel: yes. Equal values stay equal, and the rest is above. Two
      different sentinels, or sums of one with scores, may become equal, which changes strict and other comparisons. The
      nodes from the sentinel to here must be low or high together (`compared_chains`), because a cast on the way would
      saturate it on one side only.
    - Never for `eq`, `ne`, `isinf` and the like, which depend on the value itself.
    """
    if reader.op != "call_function" or base_op(reader.target) not in COMPARES or written_arguments(reader):
        return False
    held: set[float] = set()
    numbers: list[float] = []
    for operand in reader.args[:2]:
        if isinstance(operand, fx.Node) and operand in sentinels:
            held |= sentinels[operand]
        elif isinstance(operand, (int, float)):
            numbers.append(operand)
        else:
            return False  # a tensor whose own values may be as low as a mask
    if numbers:
        return all(number > _ABOVE_MASKS for number in numbers)
    return len(held) == 1 and all(sentinel <= MASK_AT_MOST for sentinel in held)


def compared_chains(graph_module: fx.GraphModule) -> list[set[fx.Node]]:
    """For each comparison of masks with masks: it, and the nodes that their sentinel came through.

    Chains that meet are merged. Either all nodes of a chain run in the low type, or none.
    """
    compares = [
        node
        for node in graph_module.graph.nodes
        if node.op == "call_function" and base_op(node.target) in COMPARES and len(node.all_input_nodes) > 1
    ]
    if not compares:
        return []
    sentinels = sentinels_of(graph_module, set())
    chains: list[set[fx.Node]] = []
    for compare in compares:
        if reads_order(compare, sentinels):
            chain = {compare, *_made_by(compare, sentinels)}
            meeting = [other for other in chains if other & chain]
            chains = [other for other in chains if not other & chain] + [chain.union(*meeting)]
    return chains


def is_float(node: fx.Node) -> bool:
    """Whether one of its tensors is of a floating type."""
    return any(is_measurable(value.dtype) for _, value in tensor_values(node))


def _carried(node: fx.Node, found: Sentinels) -> frozenset[float]:
    """The sentinels in the output of a node, given those of its inputs."""
    if node.op != "call_function":
        return frozenset()
    base = base_op(node.target)
    if node.target is not getitem and base not in PASSES:
        return frozenset()
    own = frozenset() if base in MOVES | SELECTS else frozenset(_large_numbers(node))
    carried = own.union(*(found[n] for n in node.all_input_nodes if n in found))
    return frozenset({ANY}) if carried and base in MASKING - MASK_CHOICE else carried


def _large_numbers(node: fx.Node) -> list[float]:
    """The numbers in a call as large as a sentinel; of either sign, because of `scores - 1e9 * padding`."""
    numbers = [
        v for v in (*node.args, *node.kwargs.values()) if isinstance(v, (int, float)) and not isinstance(v, bool)
    ]
    return [float(number) for number in numbers if abs(number) >= -MASK_AT_MOST]


def _written(graph_module: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose storage an op writes into."""
    targets = [argument for node in graph_module.graph.nodes for argument in written_arguments(node)]
    if not targets:
        return set()
    roots = storage_roots(graph_module)
    written = frozenset().union(*(roots[target] for target in targets))
    return {node for node, its_roots in roots.items() if its_roots & written}


def _made_by(compare: fx.Node, sentinels: Sentinels) -> set[fx.Node]:
    made: set[fx.Node] = set()
    waiting = list(compare.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node in sentinels and node not in made:
            made.add(node)
            waiting.extend(node.all_input_nodes)
    return made


def _written_bases(node: fx.Node) -> list[fx.Node]:
    """The tensors that an in-place op wrote mask values into, and those that these are views of."""
    bases, waiting = [], list(written_arguments(node))
    while waiting:
        base = waiting.pop()
        bases.append(base)
        if base.op == "call_function" and base_op(base.target) in MOVES:
            waiting.extend(base.all_input_nodes[:1])
    return [base for base in bases if is_float(base)]
