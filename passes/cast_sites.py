"""Finds where the casts of a plan go, in one walk over the graph: data for counting or inserting them.

A cast belongs to one version of a tensor and is shared by all its readers until something writes into the storage.
`CallTable` holds what is the same for all plans, so that each further plan costs milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import getitem

import torch
from calibcast.calib.aliasing import shared_arguments, written_arguments
from calibcast.calib.flat_regions import blocks
from calibcast.calib.graph import REGION_CHILD, base_op, is_measurable, producer_of, size_hint, tensor_values
from calibcast.calib.operators import ASSERTS, CONVERTS
from calibcast.passes.low_types import Types, types_of
from calibcast.passes.node_types import states_type
from calibcast.passes.regions import qualified_name
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind


@dataclass(frozen=True, slots=True)
class Operand:
    """A floating-point argument: the node, its exported type, and its elements at the exported sizes."""

    node: fx.Node
    exported: torch.dtype
    elements: int
    name: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Call:
    """A node of the flat graph as the walk sees it. name: qualified. operands: in the order of their casts.

    passes_on: it takes inputs of any type. written, shared: the arguments that it writes into, and those that its
    output may share storage with. undoes: it converts nothing but the type, so that a cast back may take its input.
    bytes: of each output, 0 where it is a view.
    """

    node: fx.Node
    name: str
    operands: tuple[Operand, ...]
    exported: Types
    passes_on: bool
    written: tuple[fx.Node, ...]
    shared: tuple[fx.Node, ...]
    undoes: bool
    bytes: tuple[int, ...]


class CallTable:
    """What no plan changes: the calls of a flat graph, its sources, and outputs that keep their exported types."""

    def __init__(self, program: ExportedProgram, source: fx.GraphModule, keep_io_types: bool = True) -> None:
        """`source`: the graph of `program`, as `regions.flatten` gives it."""
        nodes = list(source.graph.nodes)
        self.never_written = not any(written_arguments(node) for node in nodes)
        operand, read = cache(_operand), _read_ahead(nodes)
        self.calls = [
            _call(node, self.never_written, operand, read.get(node)) for node in nodes if node.op == "call_function"
        ]
        self.sources = [(n, types_of(n.meta.get("val"))) for n in nodes if n.op in {"placeholder", "get_attr"}]
        self.outputs = list(_outputs(program, nodes, keep_io_types))
        self.activation_bytes = sum(size for call in self.calls for size in call.bytes)


class Value:
    """A tensor of the rewritten graph, or all outputs of a node with several. `before`: what it was converted from.

    Compared by identity: it is one version of one tensor.
    """

    __slots__ = ("before", "types")

    def __init__(self, types: Types, before: Value | None = None) -> None:
        self.types, self.before = types, before


@dataclass(frozen=True, slots=True)
class Cast:
    """One cast to insert, from the value `of` to the value `made`. operand: the tensor of the program that is cast."""

    of: Value
    made: Value
    operand: Operand


@dataclass(frozen=True, slots=True)
class CallSite:
    """A call and the casts that stand right before it.

    given: the value to pass for each floating-point argument. made: the call's result.
    """

    call: Call
    casts: tuple[Cast, ...]
    given: Mapping[fx.Node, Value]
    made: Value


@dataclass(frozen=True, slots=True)
class CastSites:
    """All casts of a plan, in the order in which they run.

    values: the value of each node of the graph. outputs: the casts before the graph's results; results: the value to
    return for each result that keeps its exported type.
    """

    values: Mapping[fx.Node, Value]
    calls: tuple[CallSite, ...]
    outputs: tuple[Cast, ...]
    results: Mapping[fx.Node, Value]

    @property
    def casts(self) -> Iterator[Cast]:
        for site in self.calls:
            yield from site.casts
        yield from self.outputs


def cast_sites(
    table: CallTable, low: Mapping[fx.Node, Types], stored: frozenset[str], low_type: torch.dtype
) -> CastSites:
    """Where the casts go when only the nodes in `low` read their fp32 inputs in `low_type`.

    low: each low node, with the types of its outputs. stored: the placeholders whose weights are stored low.
    """
    return _Walk(table, low, stored, low_type).run()


class _Walk:
    """One walk over the graph under one plan."""

    def __init__(
        self, table: CallTable, low: Mapping[fx.Node, Types], stored: frozenset[str], low_type: torch.dtype
    ) -> None:
        self._table, self._low, self._stored, self._low_type = table, low, stored, low_type
        self._made: dict[fx.Node, Value] = {}
        self._new: list[Cast] = []  # the casts since the last call
        self._casts: dict[tuple[Value, torch.dtype], Value] = {}
        self._sharing: dict[Value, set[Value]] = {}

    def run(self) -> CastSites:
        for node, types in self._table.sources:
            self._made[node] = self._value((self._low_type,) if node.name in self._stored else types)
        calls = tuple([self._take(call) for call in self._table.calls])
        results = {o.node: self._cast(self._made[o.node], o.exported, o) for o in self._table.outputs}
        return CastSites(self._made, calls, self._taken(), results)

    def _take(self, call: Call) -> CallSite:
        is_low = call.node in self._low
        given: dict[fx.Node, Value] = {}
        if not call.passes_on or is_low:
            for operand in call.operands:
                wanted = self._low_type if is_low and operand.exported == torch.float32 else operand.exported
                given[operand.node] = self._cast(self._made[operand.node], wanted, operand)
        types = self._low[call.node] if is_low else self._types_of(call)
        first = call.node.args[0] if call.undoes else None
        before = given.get(first, self._made[first]) if isinstance(first, fx.Node) else None
        made = self._value(types, before)
        self._made[call.node] = made
        if not self._table.never_written:
            self._note_aliases(call, made, given)
        return CallSite(call, self._taken(), given, made)

    def _taken(self) -> tuple[Cast, ...]:
        taken, self._new = tuple(self._new), []
        return taken

    def _types_of(self, call: Call) -> Types:
        if call.node.target is getitem:
            producer, index = call.node.args
            types = self._made[producer].types  # type: ignore[index]
            return types[index : index + 1] if isinstance(index, int) and index < len(types) else call.exported
        return call.exported

    def _value(self, types: Types, before: Value | None = None) -> Value:
        value = Value(types, before)
        if not self._table.never_written:
            self._sharing[value] = {value}
        return value

    def _cast(self, value: Value, dtype: torch.dtype, operand: Operand) -> Value:
        """`value` in `dtype`: itself, a cast that is there already, or a new one."""
        now = value.types[0]
        if now == dtype or now is None:
            return value
        found = self._casts.get((value, dtype)) or _undone(value, dtype)
        if found is None:
            found = self._value((dtype,))
            self._new.append(Cast(value, found, operand))
        self._casts[value, dtype] = found
        return found

    def _note_aliases(self, call: Call, made: Value, given: Mapping[fx.Node, Value]) -> None:
        """Track shared storage, and forget the casts of what `call` has written into: a cast is for one version."""
        group = {made}.union(*(self._sharing[given.get(n, self._made[n])] for n in call.shared))
        for member in group:
            self._sharing[member] = group
        written = [self._made[n] for n in call.written]
        if call.node.target not in REGION_CHILD:
            written += [given.get(n, self._made[n]) for n in call.written]  # may be casts
        changed = set[Value]().union(*(self._sharing[value] for value in written))
        if changed:
            self._casts = {k: cast for k, cast in self._casts.items() if k[0] not in changed and cast not in changed}


def _undone(value: Value, dtype: torch.dtype) -> Value | None:
    """The input of the user's own widening conversion (fp16 -> fp32), where casting back gives the same bits.

    Never the other way: fp32 -> fp16 -> fp32 rounds.
    """
    if value.before is None:
        return None
    narrow, wide = value.before.types[0], value.types[0]
    assert narrow is not None
    assert wide is not None
    # Of fp16 and bf16 neither holds the other: both promote to fp32.
    lossless = narrow == dtype != wide and torch.promote_types(narrow, wide) == wide
    return value.before if lossless else None


def _read_ahead(nodes: Iterable[fx.Node]) -> dict[fx.Node, Sequence[fx.Node]]:
    """What each flat region reads from outside, by the marker that begins it. Casts go before the marker: nodes made
    inside belong to the region."""
    read: dict[fx.Node, Sequence[fx.Node]] = {}
    for block in blocks(nodes):
        if block.region:
            inside = set(block.nodes)
            read[block.nodes[0]] = [n for node in block.nodes for n in node.all_input_nodes if n not in inside]
    return read


def _call(
    node: fx.Node,
    never_written: bool,
    operand: Callable[[fx.Node], Operand | None],
    read: Sequence[fx.Node] | None = None,
) -> Call:
    """`read`: the nodes whose values are cast before the call; None for those that the node itself reads."""
    reads = node.all_input_nodes if read is None else read
    passes_on = node.target is getitem or base_op(node.target) in ASSERTS or states_type(node)
    exported = types_of(node.meta.get("val"))
    shared = tuple(shared_arguments(node))
    is_view = bool(shared) or node.target is getitem or node.target in REGION_CHILD
    return Call(
        node=node,
        name=qualified_name(node),
        # By args, then kwargs: the order in which casts are made.
        operands=() if passes_on else tuple([found for n in reads if (found := operand(n)) is not None]),
        exported=exported,
        passes_on=passes_on,
        written=() if never_written else tuple(written_arguments(node)),
        shared=shared,
        undoes=never_written and _undoes(node),
        bytes=(0,) * len(exported) if is_view else _sizes(node, len(exported)),
    )


def _operand(node: fx.Node) -> Operand | None:
    """`node` as an argument; None where it is not a floating-point tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not is_measurable(value.dtype):
        return None
    producer, output = producer_of(node)
    return Operand(node, value.dtype, _elements(value), (qualified_name(producer), output or 0))


def _outputs(program: ExportedProgram, nodes: list[fx.Node], keep_io_types: bool) -> Iterator[Operand]:
    """The floating-point results that are returned in their exported types."""
    results = next(node for node in reversed(nodes) if node.op == "output").args[0]
    for result, spec in zip(results, program.graph_signature.output_specs, strict=True):  # type: ignore[arg-type]
        operand = _operand(result) if isinstance(result, fx.Node) else None
        if operand is not None and (keep_io_types or spec.kind != OutputKind.USER_OUTPUT):
            yield operand


def _undoes(node: fx.Node) -> bool:
    """Whether it is a conversion that leaves device and strides as they were."""
    if base_op(node.target) not in CONVERTS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    same = [size_hint(s) for s in before.stride()] == [size_hint(s) for s in after.stride()]
    return bool(before.device == after.device and same)


def _sizes(node: fx.Node, outputs: int) -> tuple[int, ...]:
    sizes = {i: _elements(v) * v.dtype.itemsize for i, v in tensor_values(node) if is_measurable(v.dtype)}
    return tuple(sizes.get(output, 0) for output in range(outputs))


def _elements(value: torch.Tensor) -> int:
    return math.prod(size_hint(size) for size in value.shape)
