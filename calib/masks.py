"""Which tensors are attention masks: large negative values there mean "not this one", and do not count as magnitudes.

A mask value is at or below -1e4. It comes from a number in the graph, an input or a buffer. It may pass through where,
masked_fill, arithmetic, movement and selection (topk). Its only readers are softmax, attention, and comparisons whose
result stays the same once it is saturated. A value that the model computes itself, such as an attention logit of -1e5,
does not come from these places, and counts as a magnitude.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import getitem

from calibcast.calib.aliasing import operands, storage_roots, written_arguments
from calibcast.calib.graph import REGION_CHILD, argument_at, base_op, child_of, input_kinds, tensor_values
from calibcast.calib.operators import operator_of
from calibcast.calib.sentinels import PASSES, Sentinels, is_float, reads_order, sentinels_of
from torch import fx
from torch.export import ExportedProgram

# Parameters are left out: a learned bias is a magnitude. Inside regions every operand may carry a mask from outside.
_SOURCES = frozenset({"input", "buffer", "constant"})


def mask_tensors(program: ExportedProgram) -> frozenset[str]:
    """Qualified names of the nodes in whose output values at or below -1e4 are mask values."""
    return frozenset(_masks_of(program.graph_module, mask_sources(program), ""))


def mask_sources(program: ExportedProgram) -> set[str]:
    """The placeholders through which a mask may come in."""
    return {name for name, kind in input_kinds(program).items() if kind in _SOURCES}


def mask_nodes(graph_module: fx.GraphModule, sources: set[str]) -> set[fx.Node]:
    """The nodes of masks in one graph, without its regions. `sources`: placeholders through which one may come in."""
    sentinels = sentinels_of(graph_module, sources)
    return sentinels.keys() & _read_as_masks_only(graph_module, sentinels) if sentinels else set()


def is_mask_argument(node: fx.Node, reader: fx.Node) -> bool:
    """Whether `reader` is a softmax or an attention, and `node` is the argument in which it reads a mask."""
    place = operator_of(base_op(reader.target)).mask_at
    return place is not None and argument_at(reader, place) is node and node not in reader.args[:place]


def _masks_of(graph_module: fx.GraphModule, sources: set[str], prefix: str) -> Iterator[str]:
    yield from (prefix + node.name for node in mask_nodes(graph_module, sources))
    for node in graph_module.graph.nodes:
        region = child_of(node)
        if region is not None:
            name, child = region
            holders = {n.name for n in child.graph.nodes if n.op == "placeholder"}
            yield from _masks_of(child, holders, f"{prefix}{name}.")


def _read_as_masks_only(graph_module: fx.GraphModule, sentinels: Sentinels) -> set[fx.Node]:
    """The nodes whose values reach nothing but softmax, attention and safe comparisons. It walks the graph backward."""
    roots = storage_roots(graph_module)
    # A write into storage shows wherever that storage is read, so either all its holders are masks or none is.
    holders: dict[fx.Node, set[fx.Node]] = {}
    for node, its_roots in roots.items():
        for root in its_roots:
            holders.setdefault(root, set()).add(node)
    placed = dict.fromkeys(graph_module.graph.nodes, True)
    changed = True
    while changed:  # repeats only where a write reaches a holder that the walk visits after it
        changed = False
        for node in reversed(graph_module.graph.nodes):
            if placed[node] and not all(
                _reads_as_mask(node, user, placed, roots, holders, sentinels) for user in node.users
            ):
                placed[node], changed = False, True
    return {n for n, holds in placed.items() if holds and (n.users or written_arguments(n)) and is_float(n)}


def _reads_as_mask(
    node: fx.Node,
    reader: fx.Node,
    placed: Mapping[fx.Node, bool],
    roots: Mapping[fx.Node, frozenset[fx.Node]],
    holders: Mapping[fx.Node, set[fx.Node]],
    sentinels: Sentinels,
) -> bool:
    if reader.op != "call_function":
        return False
    if reader.target in REGION_CHILD:
        return node not in operands(reader)
    asks_for_size_or_type = not tensor_values(reader)
    if asks_for_size_or_type or is_mask_argument(node, reader) or reads_order(reader, sentinels):
        return True
    if reader.target is getitem and not is_float(reader):
        return not reader.users  # indices: the kernel decides which of several equal values it takes
    base = base_op(reader.target)
    if reader.target is not getitem and base not in PASSES:
        return base.endswith("_like") or base.startswith("new_")  # these read only shape and type
    written = {other for target in written_arguments(reader) for root in roots[target] for other in holders[root]}
    return placed[reader] and all(placed[other] for other in written)
