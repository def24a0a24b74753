"""Writing exponents into a program: weights and numbers times powers of two, and multiplications where asked."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from calibcast.calib.graph import argument_of, input_kinds, input_targets, state_tensor
from calibcast.passes.program_copies import with_graph
from calibcast.passes.rescaling.equations import implied
from calibcast.passes.rescaling.system import Breaks, Number, Solutions, Tensor
from torch import fx
from torch.export import ExportedProgram

MULTIPLY = torch.ops.aten.mul.Tensor
SUFFIX = "_rescaled"  # of the names of multiplications that are put in


@dataclass(frozen=True)
class Exponents:
    """k of what is stored as 2^-k times itself: tensors by node and output, numbers by node and argument; 0 left out.

    multiplied: k of the factor 2^-k that is put behind a node. readers: the readers of that node that read the product.
    """

    tensors: Mapping[tuple[str, int], int] = field(default_factory=dict)
    numbers: Mapping[tuple[str, str], int] = field(default_factory=dict)
    multiplied: Mapping[str, int] = field(default_factory=dict)
    readers: Breaks = field(default_factory=dict)

    @classmethod
    def of(cls, solutions: Solutions, values: Mapping[int, int]) -> Exponents:
        """The exponents at values of the free variables."""
        tensors: dict[tuple[str, int], int] = {}
        numbers: dict[tuple[str, str], int] = {}
        multiplied: dict[str, int] = {}
        for kind, exponent in zip(solutions.system.kinds, solutions.exponents(values), strict=True):
            if not exponent:
                continue
            if isinstance(kind, Tensor):
                tensors[kind.node, kind.output] = exponent
            elif isinstance(kind, Number) and kind.node in solutions.system.breaks:
                multiplied[solutions.system.breaks[kind.node]] = exponent
            elif isinstance(kind, Number):
                numbers[kind.node, kind.argument] = exponent
        unused = {made for made, behind in solutions.system.breaks.items() if behind not in multiplied}
        readers = {name: solutions.system.readers[name] for name in multiplied}
        return cls({key: k for key, k in tensors.items() if key[0] not in unused}, numbers, multiplied, readers)

    def __bool__(self) -> bool:
        return bool(self.tensors or self.numbers or self.multiplied)

    def negated(self) -> Exponents:
        """The exponents that undo these in the rescaled program; added multiplications stay, by 1."""
        factors = {(f"{node}{SUFFIX}", "other"): -k for node, k in self.multiplied.items()}
        return Exponents(
            {key: -k for key, k in self.tensors.items()},
            {**{key: -k for key, k in self.numbers.items()}, **factors},
        )


def rewritten(program: ExportedProgram, exponents: Exponents, with_state: bool = True) -> ExportedProgram:
    """A program whose tensors are stored by these exponents. The caller's program is not changed; weights that stay the
    same are shared.

    with_state: False leaves the weights as they are, where only the graph is needed.
    """
    graph = _graph(program, exponents)
    state, constants = _state(program, exponents) if with_state else (program.state_dict, program.constants)
    return with_graph(ExportedProgram, program, program.graph_module, graph, state, constants)


def _graph(program: ExportedProgram, exponents: Exponents) -> fx.Graph:
    graph, values, products = fx.Graph(), dict[fx.Node, fx.Node](), dict[fx.Node, fx.Node]()
    numbers: dict[str, dict[str, int]] = {}
    for (node, argument), k in exponents.numbers.items():
        numbers.setdefault(node, {})[argument] = k
    waiting: list[fx.Node] = []  # inputs are multiplied after the last placeholder
    for node in program.graph.nodes:
        if node.op != "placeholder":
            for old in waiting:
                products[old] = _multiplied(graph, old, values[old], exponents.multiplied[old.name])
            waiting = []
        made = graph.node_copy(node, partial(_read_by, node, values, products, exponents.readers))
        made.meta = copy.copy(node.meta)
        made.name, made.target = node.name, node.target  # fx renames copies that look like builtins, such as `input`
        values[node] = made
        if node.name in numbers:
            _rescale_numbers(node, made, numbers[node.name])
        if node.name in exponents.multiplied:
            if node.op == "placeholder":
                waiting.append(node)
            else:
                products[node] = _multiplied(graph, node, made, exponents.multiplied[node.name])
    return graph


def _read_by(
    reader: fx.Node,
    values: Mapping[fx.Node, fx.Node],
    products: Mapping[fx.Node, fx.Node],
    readers: Breaks,
    node: fx.Node,
) -> fx.Node:
    """The new node that `reader` reads in place of `node`."""
    return products[node] if node in products and reader.name in readers[node.name] else values[node]


def _multiplied(graph: fx.Graph, old: fx.Node, made: fx.Node, exponent: int) -> fx.Node:
    found = graph.call_function(MULTIPLY, (made, 2.0**-exponent))
    found.name = f"{old.name}{SUFFIX}"
    kept = ("nn_module_stack", "stack_trace", "val", "tensor_meta")
    found.meta = {key: old.meta[key] for key in kept if key in old.meta}
    return found


def _rescale_numbers(old: fx.Node, made: fx.Node, exponents: Mapping[str, int]) -> None:
    arguments = old.target._schema.arguments  # type: ignore[union-attr]
    for name, k in exponents.items():
        value = argument_of(old, name)
        value = implied(old, name) if value is None else value
        scaled = float(value) * 2.0**-k  # type: ignore[arg-type]
        place = next(i for i, argument in enumerate(arguments) if argument.name == name)
        if place < len(made.args):
            made.update_arg(place, scaled)
        else:
            made.update_kwarg(name, scaled)


def _state(program: ExportedProgram, exponents: Exponents) -> tuple[dict[str, Any], dict[str, Any]]:
    state, constants = dict(program.state_dict), dict(program.constants)
    targets, kinds = input_targets(program), input_kinds(program)
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    for name, target in targets.items():
        k = exponents.tensors.get((name, 0), 0)
        tensor = state_tensor(program, target)
        if not k or kinds[name] == "input" or tensor is None:
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in made:  # tied weights stay tied
            made[key] = _scaled(tensor, k)
        (state if target in program.state_dict else constants)[target] = made[key]
    return state, constants


def _scaled(tensor: torch.Tensor, exponent: int) -> torch.Tensor:
    with torch.no_grad():
        scaled = tensor.detach() * 2.0**-exponent
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(scaled, requires_grad=tensor.requires_grad)
    return scaled
