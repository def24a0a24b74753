"""Where a program can be rounded: its edges, from the node that made a tensor to each node that reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from calibcast.calib.aliasing import storage_roots, written_arguments
from calibcast.calib.flattening import flatten, qualified_name
from calibcast.calib.graph import REGION_CHILD, argument_of, base_op, is_bitcast, tensor_values
from calibcast.calib.operators import CONVERTS
from calibcast.calib.rounding import rounded_number
from calibcast.calib.rounding_table import LITERAL, OUTPUT
from calibcast.calib.twins import keeps_rounded
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

Source = tuple[str, int]  # qualified name of the node that made a tensor, and which of its outputs it is


@dataclass(frozen=True)
class Edge:
    """A tensor that `input` made, or a number in the call (`literal:other`), as `node` reads it.

    movers: the nodes between the two, in graph order, that only move, negate or select its elements. Names are
    qualified, as in `ranges.frame`.
    """

    node: str
    input: str
    output: int
    movers: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, int]:
        """What identifies the edge."""
        return self.node, self.input, self.output

    @property
    def is_literal(self) -> bool:
        return self.input.startswith(LITERAL)


def rounding_edges(program: ExportedProgram) -> tuple[Edge, ...]:
    """All edges of `program` where an fp32 value can be rounded, in graph order; those into its results come last.

    A number that both half-precision types hold exactly makes no edge. Edges inside `torch.autocast` regions are left
    out; what goes into such a region is read by the region node.
    """
    graph_module = flatten(program.graph_module)
    flow = _Flow(graph_module)
    given = {node.name for node in graph_module.graph.nodes if node.op == "placeholder"}
    found: list[Edge] = []
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            flow.follow(node)
            if reads_values(node):
                read = flow.read_by(node)
                if node.target in REGION_CHILD:  # a region is never low, and weights are only rounded for low readers
                    read = {source: movers for source, movers in read.items() if source[0] not in given}
                found.extend(_edges_into(node, qualified_name(node), read))
            elif is_mover(node):
                found.extend(_edges_into(node, qualified_name(node), {}))  # such as a mask value that it fills in
        elif node.op == "placeholder":
            flow.make(node)
        elif node.op == "output":
            found.extend(_edges_out(program, node, flow))
    return tuple(found)


def output_types(program: ExportedProgram, graph_module: fx.GraphModule) -> list[torch.dtype]:
    """The types of the tensors that the program returns, in order. graph_module: the program's, or its flat copy."""
    output = next(iter(reversed(graph_module.graph.nodes)))
    given = zip(output.args[0], program.graph_signature.output_specs, strict=True)
    nodes = [node for node, spec in given if spec.kind == OutputKind.USER_OUTPUT and isinstance(node, fx.Node)]
    return [value.dtype for node in nodes for _, value in tensor_values(node)]


def is_mover(node: fx.Node) -> bool:
    """Whether a node passes rounded elements on unchanged, so that an edge goes through it."""
    if node.op != "call_function":
        return False
    if node.target is getitem:
        return True
    if is_bitcast(node.target):
        return False
    base = base_op(node.target)
    if base in CONVERTS:
        return all(
            value.dtype == torch.float32 for n in (node, *node.all_input_nodes[:1]) for _, value in tensor_values(n)
        )
    return keeps_rounded(node)


def reads_values(node: fx.Node) -> bool:
    """Whether a node computes something from the values of its inputs, not only moves them or asks for a shape."""
    if node.op != "call_function" or is_mover(node):
        return False
    if node.target in REGION_CHILD:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and not base_op(node.target).startswith(("_assert", "sym_"))


def literals_of(node: fx.Node) -> dict[str, float]:
    """The numbers in a call that take part in its arithmetic, by argument: of type `Scalar` or `Tensor` in the schema.

    Attributes, such as a scale or the eps of a norm, are of type `float` in the schema, and stay inside the kernel.
    Factories have no such numbers: their result is rounded, not the number that they are filled with.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or not _has_fp32(node.all_input_nodes):
        return {}
    found: dict[str, float] = {}
    for argument in node.target._schema.arguments:
        value = argument_of(node, argument.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and _is_scalar(argument):
            found[argument.name] = float(value)
    return found


def with_numbers(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], numbers: Mapping[str, float]) -> Any:
    """The arguments of a call with some numbers replaced. numbers: by the argument's name in the operator's schema."""
    if not numbers:
        return args, kwargs
    names = [argument.name for argument in target._schema.arguments]
    changed = tuple(numbers.get(name, value) for name, value in zip(names, args, strict=False))
    rest = {name: value for name, value in numbers.items() if name in names[len(changed) :]}
    return changed, {**kwargs, **rest}


def _is_scalar(argument: Any) -> bool:
    kind = argument.real_type
    if isinstance(kind, torch.OptionalType):
        kind = kind.getElementType()
    return isinstance(kind, (torch.NumberType, torch.TensorType))


def _has_fp32(nodes: list[fx.Node]) -> bool:
    return any(value.dtype == torch.float32 for n in nodes for _, value in tensor_values(n))


class _Flow:
    """Follows each tensor from the node that made it, through movers and writes, to where it is read."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._roots = storage_roots(graph_module)
        self._order = {qualified_name(node): i for i, node in enumerate(graph_module.graph.nodes)}
        self._made: dict[fx.Node, dict[int, dict[Source, frozenset[str]]]] = {}
        self._written: dict[fx.Node, dict[Source, frozenset[str]]] = {}

    def make(self, node: fx.Node) -> None:
        name = qualified_name(node)
        self._made[node] = {i: {(name, i): frozenset()} for i, v in tensor_values(node) if v.dtype == torch.float32}

    def follow(self, node: fx.Node) -> None:
        if node.target is getitem and isinstance(node.args[0], fx.Node):
            position = node.args[1]
            assert isinstance(position, int)
            self._made[node] = {0: self._made.get(node.args[0], {}).get(position, {})}
        elif is_mover(node):
            name = qualified_name(node)
            through = {s: path | {name} for s, path in self._merged(node.all_input_nodes).items()}
            self._made[node] = {i: through for i, v in tensor_values(node) if v.dtype == torch.float32}
        else:
            self.make(node)
        for root in {root for argument in written_arguments(node) for root in self._roots[argument]}:
            self._written.setdefault(root, {}).update(self._all(node))

    def read_by(self, node: fx.Node) -> dict[Source, tuple[str, ...]]:
        """The sources that `node` reads, each with the movers on the way."""
        return self.read(node.all_input_nodes)

    def read(self, nodes: list[fx.Node]) -> dict[Source, tuple[str, ...]]:
        found = self._merged(nodes)
        return {source: tuple(sorted(path, key=self._order.__getitem__)) for source, path in found.items()}

    def _merged(self, nodes: list[fx.Node]) -> dict[Source, frozenset[str]]:
        found: dict[Source, frozenset[str]] = {}
        for node in nodes:
            written = [self._written.get(root, {}) for root in self._roots[node]]
            for paths in [self._all(node), *written]:
                for source, path in paths.items():
                    found[source] = found.get(source, frozenset()) | path
        return found

    def _all(self, node: fx.Node) -> dict[Source, frozenset[str]]:
        found: dict[Source, frozenset[str]] = {}
        for paths in self._made.get(node, {}).values():
            found.update(paths)
        return found


def _edges_into(node: fx.Node, name: str, read: Mapping[Source, tuple[str, ...]]) -> Iterator[Edge]:
    for (maker, output), movers in read.items():
        yield Edge(name, maker, output, movers)
    for argument, number in literals_of(node).items():
        if any(rounded_number(number, low) != number for low in (torch.float16, torch.bfloat16)):
            yield Edge(name, LITERAL + argument, 0)


def _edges_out(program: ExportedProgram, node: fx.Node, flow: _Flow) -> Iterator[Edge]:
    specs = program.graph_signature.output_specs
    results = node.args[0]
    assert isinstance(results, (tuple, list))
    given = [
        result
        for result, spec in zip(results, specs, strict=True)
        if spec.kind == OutputKind.USER_OUTPUT and isinstance(result, fx.Node)
    ]
    for (maker, output), movers in flow.read(list(dict.fromkeys(given))).items():
        yield Edge(OUTPUT, maker, output, movers)
