"""Which tensors are attention masks: large negative values there mean "not this one", and are no magnitudes.

A mask value is at or below -1e4. It comes from a number in the graph, an input or a buffer, passes through where,
masked_fill, arithmetic and movement, and is read by nothing but softmax and attention. What a model computes itself,
such as attention logits of -1e5, does not come from such a place, and stays a magnitude like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import getitem

from torch import fx
from torch.export import ExportedProgram

from calib.aliasing import operands, storage_roots, written_arguments
from calib.graph import REGION_CHILD, base_op, child_of, input_kinds, is_measurable, tensor_values
from calib.operators import ATTENTION, MASKING, MOVES, SOFTMAX

# -1e4 is what models for half precision have written for "masked" since the first BERT; others take -1e9 or less.
MASK_AT_MOST = -1e4
# Parameters are left out: a learned bias is a magnitude. Inside regions every operand may carry what came from outside.
_SOURCES = frozenset({"input", "buffer", "constant"})
_SETS = frozenset({"full", "full_like", "new_full", "scalar_tensor", "fill"})
_CONVERTS = frozenset({"to", "_to_copy", "type_as"})
_PASSES = MOVES | MASKING | _CONVERTS | _SETS


def mask_tensors(program: ExportedProgram) -> frozenset[str]:
    """Qualified names of the nodes in whose output values at or below -1e4 are mask values."""
    return frozenset(_masks_of(program.graph_module, mask_sources(program), ""))


def mask_sources(program: ExportedProgram) -> set[str]:
    """The placeholders by which a mask may come in."""
    return {name for name, kind in input_kinds(program).items() if kind in _SOURCES}


def mask_nodes(graph_module: fx.GraphModule, sources: set[str]) -> set[fx.Node]:
    """The same of one graph, its regions left out. `sources`: placeholders that a mask may come in by."""
    carriers = _carriers(graph_module, sources)
    return carriers & _read_by_softmax_only(graph_module) if carriers else carriers


def is_mask_argument(node: fx.Node, reader: fx.Node) -> bool:
    """Whether `reader` is a softmax or an attention, and takes `node` where a mask goes."""
    base = base_op(reader.target)
    if base in SOFTMAX:
        return reader.args[0] is node
    if base not in ATTENTION:
        return False
    values = [reader.args[3] if len(reader.args) > 3 else reader.kwargs.get("attn_mask")]
    return node in values and node not in reader.args[:3]


def _masks_of(graph_module: fx.GraphModule, sources: set[str], prefix: str) -> Iterator[str]:
    yield from (prefix + node.name for node in mask_nodes(graph_module, sources))
    for node in graph_module.graph.nodes:
        region = child_of(node)
        if region is not None:
            name, child = region
            holders = {n.name for n in child.graph.nodes if n.op == "placeholder"}
            yield from _masks_of(child, holders, f"{prefix}{name}.")


def _carriers(graph_module: fx.GraphModule, sources: set[str]) -> set[fx.Node]:
    """The nodes that a mask value may have reached, going forward from where such values come from."""
    found: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            carries = node.name in sources and _is_float(node)
        elif node.op != "call_function" or not _is_float(node):
            carries = False
        else:
            passes = node.target is getitem or base_op(node.target) in _PASSES
            carries = passes and (_has_sentinel(node) or any(n in found for n in node.all_input_nodes))
        if carries:
            found.add(node)
            found.update(_written_bases(node))
    return found


def _written_bases(node: fx.Node) -> list[fx.Node]:
    """What an in-place op has put its mask values into, and what that is a view of."""
    bases, waiting = [], list(written_arguments(node))
    while waiting:
        base = waiting.pop()
        bases.append(base)
        if base.op == "call_function" and base_op(base.target) in MOVES:
            waiting.extend(base.all_input_nodes[:1])
    return [base for base in bases if _is_float(base)]


def _has_sentinel(node: fx.Node) -> bool:
    """Whether a number in the call is as large as a sentinel; of either sign, as `scores - 1e9 * padding` has it."""
    numbers = [
        v for v in (*node.args, *node.kwargs.values()) if isinstance(v, (int, float)) and not isinstance(v, bool)
    ]
    return base_op(node.target) not in MOVES and any(abs(number) >= -MASK_AT_MOST for number in numbers)


def _read_by_softmax_only(graph_module: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose values reach nothing but softmax and attention, going backward from these."""
    roots = storage_roots(graph_module)
    # A write into storage shows wherever that storage is read, so all its holders stand or fall together.
    holders: dict[fx.Node, set[fx.Node]] = {}
    for node, its_roots in roots.items():
        for root in its_roots:
            holders.setdefault(root, set()).add(node)
    placed = dict.fromkeys(graph_module.graph.nodes, True)
    changed = True
    while changed:  # again only where a write reaches a holder that was met after it
        changed = False
        for node in reversed(graph_module.graph.nodes):
            if placed[node] and not all(_reads_as_mask(node, user, placed, roots, holders) for user in node.users):
                placed[node], changed = False, True
    return {n for n, holds in placed.items() if holds and (n.users or written_arguments(n)) and _is_float(n)}


def _reads_as_mask(
    node: fx.Node,
    reader: fx.Node,
    placed: Mapping[fx.Node, bool],
    roots: Mapping[fx.Node, frozenset[fx.Node]],
    holders: Mapping[fx.Node, set[fx.Node]],
) -> bool:
    if reader.op != "call_function":
        return False
    if reader.target in REGION_CHILD:
        return node not in operands(reader)
    if is_mask_argument(node, reader):
        return True
    if not tensor_values(reader):
        return True  # it asks for a size, or checks a type
    base = base_op(reader.target)
    if reader.target is not getitem and base not in _PASSES:
        return base.endswith("_like") or base.startswith("new_")  # these look at the type alone
    written = {other for target in written_arguments(reader) for root in roots[target] for other in holders[root]}
    return placed[reader] and all(placed[other] for other in written)


def _is_float(node: fx.Node) -> bool:
    return any(is_measurable(value.dtype) for _, value in tensor_values(node))
