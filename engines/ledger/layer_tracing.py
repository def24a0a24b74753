"""Which engine layer did a node go into? All ways to find out, the surest first."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from calibcast.engines.ledger.inspection import EngineLayer

Found = dict[str, list[int]]


def traced(
    made: Sequence[Mapping[str, Any]], layers: Sequence[EngineLayer], readers: Mapping[str, Sequence[str]]
) -> tuple[Found, dict[str, str]]:
    """Which engine layers each node went into, by index, and how that was found: by the first way that finds any.

    made: the networks' layers before fusion. readers: for each node of the program, the nodes that read it.
    """
    ways = (
        ("metadata", _by_metadata(layers)),
        ("layer name", _by_layer_name(made, layers)),
        ("tensor name", _by_tensor_name(made, layers)),
    )
    found: dict[str, list[int]] = {}
    how: dict[str, str] = {}
    for way, places in ways:
        for node, indices in places.items():
            if node and node not in found:
                found[node], how[node] = indices, way
    known = {str(row["node"]) for row in made}
    for node, indices in _by_neighbours(known, layers, found, readers).items():
        found[node], how[node] = indices, "neighbours"
    for node, index in _by_shapes(made, layers, found).items():
        found[node], how[node] = [index], "shapes"
    return found, how


def _by_neighbours(
    known: set[str], layers: Sequence[EngineLayer], found: Found, readers: Mapping[str, Sequence[str]]
) -> Found:
    """Nodes between two layers where one reads directly what the other writes: the nodes must be in these layers. This
    finds, for example, a batch norm folded into a convolution, or its ReLU, of which TensorRT leaves no trace."""
    sources: dict[str, list[str]] = defaultdict(list)
    for node, followers in readers.items():
        for follower in followers:
            sources[follower].append(node)
    placed: Found = {}
    done: set[str] = set()
    for node in readers:
        if node not in known or node in found or node in done:
            continue
        group = _lost_together(node, found, readers, sources)
        done |= group
        before = {i for n in group for source in sources[n] if source not in group for i in found.get(source, ())}
        after = {
            i
            for n in group
            for follower in readers.get(n, ())
            if follower not in group
            for i in found.get(follower, ())
        }
        read = _through_moves({name for i in after for name in layers[i].inputs}, layers)
        at = sorted(i for i in before if i in after or read & set(layers[i].outputs))
        for lost in group & known:
            if at:
                placed[lost] = at
    return placed


# Kernels of TensorRT-RTX that only move data, by the operations in their names, and its copies to another format.
_MOVES = re.compile(r"^(?:__myl_(?:Resh|Move|Tran|Repl|Conc)+(?:_myl\d+_\d+)?$|Reformatting CopyNode)")


def _through_moves(tensors: set[str], layers: Sequence[EngineLayer]) -> set[str]:
    """These tensors, and the tensors that they only rearrange."""
    moves = [layer for layer in layers if not layer.nodes and _MOVES.match(layer.name)]
    found = set(tensors)
    for layer in reversed(moves):  # engines list layers in the order in which they run
        if found & set(layer.outputs):
            found |= set(layer.inputs)
    return found


def _lost_together(
    node: str, found: Found, readers: Mapping[str, Sequence[str]], sources: Mapping[str, Sequence[str]]
) -> set[str]:
    """The nodes that are connected to `node` by edges between nodes that were not found."""
    group, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        for near in (*readers.get(current, ()), *sources.get(current, ())):
            if near not in group and near not in found:
                group.add(near)
                waiting.append(near)
    return group


def _by_metadata(layers: Sequence[EngineLayer]) -> Found:
    places: Found = defaultdict(list)
    for index, layer in enumerate(layers):
        for node in layer.nodes:
            places[node].append(index)
    return places


def _by_layer_name(made: Sequence[Mapping[str, Any]], layers: Sequence[EngineLayer]) -> Found:
    """TensorRT names a fused layer after the layers in it: "conv + relu", "PWN(a, b)"."""
    places: Found = defaultdict(list)
    names = {str(row["name"]): str(row["node"]) for row in made if str(row["name"]).startswith("[")}
    for index, layer in enumerate(layers):
        for name, node in names.items():
            if name in layer.name and not layer.name.startswith("Reformatting CopyNode"):
                places[node].append(index)
    return places


def _by_tensor_name(made: Sequence[Mapping[str, Any]], layers: Sequence[EngineLayer]) -> Found:
    places: Found = defaultdict(list)
    writers: dict[str, int] = {}
    for index, layer in enumerate(layers):
        for tensor in layer.outputs:
            writers.setdefault(tensor, index)
    for row in made:
        for tensor in row["outputs"]:
            if tensor in writers:
                places[str(row["node"])].append(writers[tensor])
    return places


def _by_shapes(
    made: Sequence[Mapping[str, Any]], layers: Sequence[EngineLayer], found: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Pair the remaining nodes and layers where exactly one node and one layer have the same output sizes."""
    used = {index for indices in found.values() for index in indices}
    left = [(i, layer.shapes[0]) for i, layer in enumerate(layers) if i not in used and layer.shapes]
    last = {str(row["node"]): tuple(row["shapes"][-1]) for row in made if row["node"] and row["shapes"]}
    nodes = {node: shape for node, shape in last.items() if node not in found}
    layer_count, node_count = Counter(shape for _, shape in left), Counter(nodes.values())
    where = {shape: index for index, shape in left if layer_count[shape] == 1}
    return {node: where[shape] for node, shape in nodes.items() if node_count[shape] == 1 and shape in where}
