"""Putting chosen nodes of a cast graph back to fp32: casts around each node, nothing else changed."""

from __future__ import annotations

from collections.abc import Collection
from operator import getitem
from typing import Any

import torch
from calibcast.calib.aliasing import storage_roots, written_arguments
from calibcast.calib.errors import BuildError
from calibcast.calib.graph import base_op, dtype_name, producer_of, tensor_values
from calibcast.calib.marks import mark_inserted
from calibcast.calib.operators import MOVES
from calibcast.engines.tensorrt.program_device import copied
from calibcast.engines.tensorrt.quirks import WIDE_BAGS, WIDE_SUMS
from calibcast.passes.cast_insertion import CAST, place_of
from torch import fx
from torch.export import ExportedProgram

_LOW = {torch.float16, torch.bfloat16}


def widened(program: ExportedProgram, names: Collection[str]) -> ExportedProgram:
    """A copy of `program` in which the nodes `names` compute in fp32, while other nodes read the results in the types
    that these had.

    Weights stay as they are stored. Between two of the nodes nothing is rounded, unless the program writes something in
    place. Raises BuildError for a node that states a type itself.
    """
    result = copied(program)
    _Widening(result, names).run()
    result.graph.lint()
    result.graph_module.recompile()
    return result


def with_movement(program: ExportedProgram, names: Collection[str]) -> tuple[str, ...]:
    """`names`, and the low nodes that only move the results of these: a cast after such a node does as well as one
    before it."""
    found, able = set(names), widenable(program)
    for node in program.graph.nodes:
        low = [source for source in node.all_input_nodes if _is_low(source)]
        moved = node in able and base_op(node.target) in MOVES and low
        if moved and all(producer_of(source)[0].name in found for source in low):
            found.add(node.name)
    return tuple(node.name for node in program.graph.nodes if node.name in found)


def widenable(program: ExportedProgram) -> frozenset[fx.Node]:
    """The nodes that can be kept in fp32: they make low tensors of others, and do not state their type.

    A view of memory that is written in place anywhere is not one of them: in fp32 it would no longer share that memory.
    """
    nodes, roots = program.graph.nodes, storage_roots(program.graph_module)
    written = frozenset[fx.Node]().union(*(roots[n] for node in nodes for n in written_arguments(node)))
    return frozenset(node for node in nodes if _makes_low(node) and (node in roots[node] or not roots[node] & written))


def _makes_low(node: fx.Node) -> bool:
    """Whether the node is an aten or prims operator that makes low tensors, states no type and writes nothing in place.
    Regions and users' own operators are excluded, since we do not know what they do with another type."""
    aten = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in {"aten", "prims"}
    if not aten or _states_type(node) or written_arguments(node):
        return False
    several = isinstance(node.meta.get("val"), (list, tuple))
    return _is_low(node) and (not several or all(user.target is getitem for user in node.users))


def _states_type(node: fx.Node) -> bool:
    return any(isinstance(a, torch.dtype) for a in [*node.args, *node.kwargs.values()])


def _is_low(node: fx.Node) -> bool:
    return any(value.dtype in _LOW for _, value in tensor_values(node))


class _Widening:
    """One walk over a graph. `_wide` maps each cast back to the low type, which other nodes read, to the fp32 node that
    it casts."""

    def __init__(self, program: ExportedProgram, names: Collection[str]) -> None:
        self._graph, self._signature, self._names = program.graph, program.graph_signature, names
        self._wide: dict[fx.Node, fx.Node] = {}
        self._casts: dict[fx.Node, fx.Node] = {}
        self._bypassed: set[fx.Node] = set()  # casts of the program that some reader no longer needs
        # If anything is written in place, no reader may go around a cast: all must see the same value.
        self._written = any(written_arguments(node) for node in program.graph.nodes)

    def run(self) -> None:
        for node in list(self._graph.nodes):
            if node.op == "call_function" and node.name in self._names:
                self._widen(node)
            elif (before := self._undone(node)) is not None:
                self._read_instead(node, before, list(node.users))
                self._graph.erase_node(node)
        for cast in self._bypassed.union(self._wide):
            if not cast.users:
                self._graph.erase_node(cast)

    def _widen(self, node: fx.Node) -> None:
        if _states_type(node):
            raise BuildError(f"node {node.name} cannot be kept in fp32 afterwards: leave it out of the plan instead")
        for source in list(node.all_input_nodes):
            if _is_low(source):
                node.replace_input_with(source, self._in_fp32(source, node))
        made = node.meta["val"]
        if isinstance(made, torch.Tensor):
            self._give_back(node)
            return
        node.meta = {**node.meta, "val": type(made)([_fp32(value) for value in made])}
        for picked in list(node.users):
            self._give_back(picked)

    def _in_fp32(self, source: fx.Node, reader: fx.Node) -> fx.Node:
        if self._written:
            with self._graph.inserting_before(reader):
                return _cast(self._graph, source, torch.float32)
        if source in self._wide:
            return self._wide[source]
        before = source.args[0] if source.target is CAST else None
        if isinstance(before, fx.Node) and before.meta["val"].dtype == torch.float32 and _same_but_type(source, before):
            self._bypassed.add(source)
            return before
        if source not in self._casts:
            with self._graph.inserting_before(reader):
                self._casts[source] = _cast(self._graph, source, torch.float32)
        return self._casts[source]

    def _give_back(self, node: fx.Node) -> None:
        """Make `node` fp32, and give its readers a cast of it to the type that it had."""
        before = node.meta["val"].dtype
        if before not in _LOW:
            return
        node.meta = {**node.meta, "val": _fp32(node.meta["val"])}
        readers = list(node.users)
        with self._graph.inserting_after(node):
            back = _cast(self._graph, node, before)
        self._read_instead(node, back, readers)
        self._wide[back] = node

    def _undone(self, node: fx.Node) -> fx.Node | None:
        """The fp32 node behind `node`, where `node` only widens a cast back to the low type again; else None."""
        if self._written or node.target is not CAST or node.meta["val"].dtype != torch.float32:
            return None
        before = self._wide.get(node.args[0])  # type: ignore[arg-type]
        return before if before is not None and _same_but_type(node, before) else None

    def _read_instead(self, before: fx.Node, after: fx.Node, readers: Collection[fx.Node]) -> None:
        for reader in readers:
            reader.replace_input_with(before, after)
            if reader.op == "output":
                self._signature.replace_all_uses(before.name, after.name)


def _same_but_type(cast: fx.Node, before: fx.Node) -> bool:
    """Whether a cast changes neither device nor strides, as a `to` that the user wrote may."""
    return set(cast.kwargs) == {"dtype"} and place_of(cast.meta["val"]) == place_of(before.meta["val"])


def _fp32(value: Any) -> Any:
    """A recorded value in fp32 with its strides kept: `to` would make an expanded tensor dense."""
    if not isinstance(value, torch.Tensor) or value.dtype not in _LOW:
        return value
    return value.new_empty_strided(value.size(), value.stride(), dtype=torch.float32)


def _cast(graph: fx.Graph, source: fx.Node, dtype: torch.dtype) -> fx.Node:
    cast = graph.call_function(CAST, (source,), {"dtype": dtype}, name=f"{source.name}_as_{dtype_name(dtype)}")
    kept: dict[str, Any] = {key: source.meta[key] for key in ("nn_module_stack", "stack_trace") if key in source.meta}
    cast.meta = {**kept, "val": source.meta["val"].to(dtype)}
    mark_inserted(cast)
    return cast


def restated(program: ExportedProgram) -> ExportedProgram:
    """`program` with casts after each node that its converter would widen; `program` itself if there is no such node.

    Torch-TensorRT's converters return fp32 for an embedding bag with a half table, and for a cumsum that states a half
    type (seen in 2.14). The graph says half, so the next layer fails. A cast to fp32 and back changes no value, and
    makes the type half in TensorRT too.
    """
    names = [node.name for node in program.graph.nodes if _mistyped(node)]
    if not names:
        return program
    result = copied(program)
    for node in [node for node in result.graph.nodes if node.name in names]:
        for picked in _mistyped(node):
            readers = list(picked.users)
            with result.graph.inserting_after(picked):
                wide = _cast(result.graph, picked, torch.float32)
            with result.graph.inserting_after(wide):
                back = _cast(result.graph, wide, picked.meta["val"].dtype)
            for reader in readers:
                reader.replace_input_with(picked, back)
    result.graph.lint()
    result.graph_module.recompile()
    return result


def _mistyped(node: fx.Node) -> list[fx.Node]:
    """The low outputs of an embedding bag or a cumsum; empty for other nodes."""
    base = base_op(node.target) if node.op == "call_function" else ""
    if base in WIDE_SUMS:
        outputs = [node]
    elif base in WIDE_BAGS:
        outputs = [user for user in node.users if user.target is getitem]
    else:
        return []
    return [output for output in outputs if any(value.dtype in _LOW for _, value in tensor_values(output))]
