"""Counting the casts that `insert_casts` would insert, without making a graph: milliseconds a plan.

It walks the same nodes in the same order. What no plan changes is found once, by the code that inserts: which nodes
can be low and what they then give, ties, aliases, the readers of weights. A law over random programs and plans holds
the count to the casts in the rewritten graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from operator import getitem

import torch
from calibcast.calib.aliasing import shared_arguments, written_arguments
from calibcast.calib.graph import REGION_CHILD, base_op, is_measurable, producer_of, size_hint, tensor_values
from calibcast.passes.low_types import LowTypes, Types, types_of
from calibcast.passes.node_types import able_types, settled, states_type
from calibcast.passes.regions import flatten, qualified_name
from calibcast.passes.ties import Tie, ties_of
from calibcast.passes.weights import WeightReaders, masks_to_saturate
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind


@dataclass(frozen=True)
class CastCount:
    """What a plan costs and gains in casts.

    casts: nodes inserted. bytes_cast: of the tensors that they read, at the exported sizes. low: (node, output) of
    every tensor that exists in the low type. activation_bytes_low: of these, what the nodes themselves write in the
    low type, counted in the exported type, so that a share of `CastCounter.activation_bytes` is one of elements.
    """

    casts: int
    bytes_cast: int
    low: frozenset[tuple[str, int]]
    activation_bytes_low: int


@dataclass(frozen=True, slots=True)
class _Operand:
    """A floating-point argument: the node, its exported type, and its elements at the exported sizes."""

    node: fx.Node
    exported: torch.dtype
    elements: int
    name: tuple[str, int]


@dataclass(frozen=True, slots=True)
class _Call:
    """A node of the flat graph as the count sees it. name: its qualified one. operands: in the order of their casts.

    passes_on: it takes what comes. written, shared: the arguments that it writes into, and those that its output may
    share storage with. undoes: it is a conversion whose input, cast back, is the same bits. bytes: of each output, 0
    where it is a view.
    """

    node: fx.Node
    name: str
    operands: tuple[_Operand, ...]
    exported: Types
    passes_on: bool
    written: tuple[fx.Node, ...]
    shared: tuple[fx.Node, ...]
    undoes: bool
    bytes: tuple[int, ...]


class CastCounter:
    """Counts for one program. Make it once, then ask `count` for each plan."""

    def __init__(
        self, program: ExportedProgram, keep_io_types: bool = True, masks: Collection[str] | None = None
    ) -> None:
        """`masks`: as `PrecisionPlan.masks`."""
        source = flatten(program.graph_module)
        nodes = list(source.graph.nodes)
        self.never_written = not any(written_arguments(node) for node in nodes)
        operand = cache(_operand)
        self.calls = [_call(node, self.never_written, operand) for node in nodes if node.op == "call_function"]
        self.sources = [(n, types_of(n.meta.get("val"))) for n in nodes if n.op in {"placeholder", "get_attr"}]
        self.outputs = list(_outputs(program, nodes, keep_io_types))
        self.activation_bytes = sum(size for call in self.calls for size in call.bytes)
        self._ties: list[Tie] = ties_of(source)
        self._readers = WeightReaders.of(program, source, masks_to_saturate(program, source, masks))
        self._by_name = {call.name: call.node for call in self.calls}
        self._low_types = cache(lambda low_type: LowTypes(source, low_type))
        self._able = cache(lambda node, low_type: able_types(node, self._low_types(low_type)))
        self._fits = cache(self._readers.fits)

    def count(self, low_nodes: Collection[str], low_type: torch.dtype) -> CastCount:
        """The casts of the plan in which just these nodes run in `low_type`."""
        # Only of the nodes that are asked for: what is kept, such as an assertion on a type, may not run low at all.
        nodes = (self._by_name[name] for name in low_nodes if name in self._by_name)
        outputs = {node: types for node in nodes if (types := self._able(node, low_type)) is not None}
        low = settled(set(outputs), self._ties)
        if not low:
            return CastCount(0, 0, frozenset(), 0)
        stored = set(self._readers.stored_low(low, lambda name: self._fits(name, low_type)))
        return _Walk(self, {node: outputs[node] for node in low}, stored, low_type).run()


class _Value:
    """A tensor of the rewritten graph, or the outputs of a node of several. `before`: what it was converted from."""

    __slots__ = ("before", "types")

    def __init__(self, types: Types, before: _Value | None = None) -> None:
        self.types, self.before = types, before


class _Walk:
    """One walk over the graph under one plan."""

    def __init__(
        self, counter: CastCounter, low: Mapping[fx.Node, Types], stored: set[str], low_type: torch.dtype
    ) -> None:
        """`low`: the low nodes, and what they give."""
        self._counter, self._low, self._stored, self._low_type = counter, low, stored, low_type
        self._made: dict[fx.Node, _Value] = {}
        self._casts: dict[tuple[_Value, torch.dtype], _Value] = {}
        self._sharing: dict[_Value, set[_Value]] = {}
        self._names: set[tuple[str, int]] = set()
        self._number = self._bytes = self._activations = 0

    def run(self) -> CastCount:
        for node, types in self._counter.sources:
            self._made[node] = self._value((self._low_type,) if node.name in self._stored else types)
        for call in self._counter.calls:
            self._take(call)
        for operand in self._counter.outputs:
            self._cast(self._made[operand.node], operand.exported, operand)
        return CastCount(self._number, self._bytes, frozenset(self._names), self._activations)

    def _take(self, call: _Call) -> None:
        is_low = call.node in self._low
        given: dict[fx.Node, _Value] = {}
        if not call.passes_on or is_low:
            for operand in call.operands:
                wanted = self._low_type if is_low and operand.exported == torch.float32 else operand.exported
                given[operand.node] = self._cast(self._made[operand.node], wanted, operand)
        types = self._low[call.node] if is_low else self._types_of(call)
        first = call.node.args[0] if call.undoes else None
        before = given.get(first, self._made[first]) if isinstance(first, fx.Node) else None
        made = self._value(types, before)
        self._made[call.node] = made
        if is_low:
            self._note_low(call, types)
        if not self._counter.never_written:
            self._note_aliases(call, made, given)

    def _types_of(self, call: _Call) -> Types:
        if call.node.target is getitem:
            producer, index = call.node.args[:2]
            types = self._made[producer].types  # type: ignore[index]
            return types[index : index + 1] if isinstance(index, int) and index < len(types) else call.exported
        return call.exported

    def _note_low(self, call: _Call, types: Types) -> None:
        for output, (now, then, size) in enumerate(zip(types, call.exported, call.bytes, strict=True)):
            if now == self._low_type and then == torch.float32:
                self._names.add((call.name, output))
                self._activations += size

    def _value(self, types: Types, before: _Value | None = None) -> _Value:
        value = _Value(types, before)
        if not self._counter.never_written:
            self._sharing[value] = {value}
        return value

    def _cast(self, value: _Value, dtype: torch.dtype, operand: _Operand) -> _Value:
        now = value.types[0]
        if now == dtype or now is None:
            return value
        found = self._casts.get((value, dtype)) or _undone(value, dtype)
        if found is None:
            found = self._value((dtype,))
            self._number += 1
            self._bytes += operand.elements * now.itemsize
            if dtype == self._low_type and operand.exported == torch.float32:
                self._names.add(operand.name)
        self._casts[value, dtype] = found
        return found

    def _note_aliases(self, call: _Call, made: _Value, given: dict[fx.Node, _Value]) -> None:
        group = {made}.union(*(self._sharing[given.get(n, self._made[n])] for n in call.shared))
        for member in group:
            self._sharing[member] = group
        written = [self._made[n] for n in call.written]
        if call.node.target not in REGION_CHILD:
            written += [given.get(n, self._made[n]) for n in call.written]  # may be casts
        changed = set[_Value]().union(*(self._sharing[value] for value in written))
        if changed:
            self._casts = {k: cast for k, cast in self._casts.items() if k[0] not in changed and cast not in changed}


def _undone(value: _Value, dtype: torch.dtype) -> _Value | None:
    """What a conversion of the user's has widened, where casting back gives it bit for bit."""
    if value.before is None:
        return None
    narrow, wide = value.before.types[0], value.types[0]
    assert narrow is not None
    assert wide is not None
    lossless = narrow == dtype and torch.promote_types(narrow, wide) != narrow
    return value.before if lossless else None


def _call(node: fx.Node, never_written: bool, operand: Callable[[fx.Node], _Operand | None]) -> _Call:
    passes_on = node.target is getitem or base_op(node.target) == "_assert_tensor_metadata" or states_type(node)
    exported = types_of(node.meta.get("val"))
    shared = tuple(shared_arguments(node))
    is_view = bool(shared) or node.target is getitem or node.target in REGION_CHILD
    return _Call(
        node=node,
        name=qualified_name(node),
        # By args, then kwargs: the order in which casts are made.
        operands=() if passes_on else tuple([found for n in node.all_input_nodes if (found := operand(n)) is not None]),
        exported=exported,
        passes_on=passes_on,
        written=() if never_written else tuple(written_arguments(node)),
        shared=shared,
        undoes=never_written and _undoes(node),
        bytes=(0,) * len(exported) if is_view else _sizes(node, len(exported)),
    )


def _operand(node: fx.Node) -> _Operand | None:
    """`node` as an argument; None where it is no floating-point tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not is_measurable(value.dtype):
        return None
    producer, output = producer_of(node)
    return _Operand(node, value.dtype, _elements(value), (qualified_name(producer), output or 0))


def _outputs(program: ExportedProgram, nodes: list[fx.Node], keep_io_types: bool) -> Iterator[_Operand]:
    """The floating-point results that are given out in their exported types."""
    results = next(node for node in reversed(nodes) if node.op == "output").args[0]
    for result, spec in zip(results, program.graph_signature.output_specs, strict=True):  # type: ignore[arg-type]
        operand = _operand(result) if isinstance(result, fx.Node) else None
        if operand is not None and (keep_io_types or spec.kind != OutputKind.USER_OUTPUT):
            yield operand


def _undoes(node: fx.Node) -> bool:
    """Whether it is a conversion that leaves device and strides as they were."""
    if base_op(node.target) not in {"to", "_to_copy"} or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    same = [size_hint(s) for s in before.stride()] == [size_hint(s) for s in after.stride()]
    return bool(before.device == after.device and same)


def _sizes(node: fx.Node, outputs: int) -> tuple[int, ...]:
    sizes = {i: _elements(v) * v.dtype.itemsize for i, v in tensor_values(node) if is_measurable(v.dtype)}
    return tuple(sizes.get(output, 0) for output in range(outputs))


def _elements(value: torch.Tensor) -> int:
    return math.prod(size_hint(size) for size in value.shape)
