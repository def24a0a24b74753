"""All exponents of a program, and the equations between them: read once, for all settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from operator import getitem
from typing import Any

import torch
from calibcast.calib.aliasing import mutated_inputs, storage_roots, written_arguments
from calibcast.calib.graph import argument_of, as_list, base_op, input_kinds, input_targets, state_tensor, tensor_values
from calibcast.calib.masks import mask_tensors
from calibcast.calib.operators import ASSERTS
from calibcast.calib.operators.exponents import EQUATIONS
from calibcast.calib.plain_tensors import storage_of
from calibcast.passes.rescaling.equations import Expression, equations_of, implied, moved_tensors
from torch import fx
from torch.export import ExportedProgram

Form = tuple[tuple[int, int], ...]  # (free variable, coefficient), sorted
Row = dict[int, int]  # coefficients by variable: their sum is 0
# Nodes behind which a multiplication may be put in, each with those of its readers that read the product.
Breaks = Mapping[str, frozenset[str]]


@dataclass(frozen=True, slots=True)
class Tensor:
    """An fp32 tensor: the node that makes it, and which of its outputs it is."""

    node: str
    output: int = 0


@dataclass(frozen=True, slots=True)
class Number:
    """A number in the call of `node`: its argument's name, and its value there."""

    node: str
    argument: str
    value: float


@dataclass
class System:
    """Unknown exponents and the equations between them.

    kinds: what each variable is the exponent of; None for the unknown `j`. equal: pairs of equal variables. rows: sums
    that are 0. zero: variables that are 0. why_zero: the first reason for each. breaks: by the name of a possible
    multiplication, the node behind which it is put. readers: by the name of that node, the readers of the product.
    solutions: a cache, by the variables that were held at 0 in addition.
    """

    kinds: list[Tensor | Number | None] = field(default_factory=list)
    index: dict[Any, int] = field(default_factory=dict)
    equal: list[tuple[int, int]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    zero: set[int] = field(default_factory=set)
    why_zero: dict[int, str] = field(default_factory=dict)
    breaks: dict[str, str] = field(default_factory=dict)
    readers: Breaks = field(default_factory=dict)
    solutions: dict[frozenset[int], Solutions] = field(default_factory=dict, repr=False)

    def variable(self, kind: Tensor | Number | None) -> int:
        """The variable of a tensor or number; a new one for None."""
        key = (kind.node, kind.argument) if isinstance(kind, Number) else kind
        if key is not None and key in self.index:
            return self.index[key]
        self.kinds.append(kind)
        number = len(self.kinds) - 1
        if key is not None:
            self.index[key] = number
        return number

    def hold(self, variables: Iterable[int], why: str) -> None:
        """Hold these variables at 0."""
        for variable in variables:
            self.zero.add(variable)
            self.why_zero.setdefault(variable, why)


@dataclass(frozen=True)
class Solutions:
    """forms: each variable of the system as a sum of free ones; () where it is 0. free: the free ones, in order."""

    system: System = field(repr=False)
    forms: list[Form] = field(repr=False)
    free: tuple[int, ...]

    def exponents(self, values: Mapping[int, int]) -> list[int]:
        """The exponent of each variable, for values of the free ones; 0 where none is given."""
        return [sum(count * values.get(v, 0) for v, count in form) for form in self.forms]


def system_of(program: ExportedProgram, breaks: Breaks | None = None, table: Mapping[str, str] = EQUATIONS) -> System:
    """The equations of a program; for readers of a break's product, the product has an exponent of its own."""
    return _Reader(program, breaks or {}, table).read()


class _Reader:
    def __init__(self, program: ExportedProgram, breaks: Breaks, table: Mapping[str, str]) -> None:
        self._program, self._breaks, self._table = program, breaks, table
        self._graph_module = program.graph_module
        kinds = input_kinds(program)
        held = {n: t for n, t in input_targets(program).items() if kinds[n] != "input"}
        self._state = {n: t for n, t in held.items() if state_tensor(program, t) is not None}
        self._written = mutated_inputs(program)
        self.system = System(readers=breaks)
        self._made: dict[fx.Node, dict[int, int]] = {}

    def read(self) -> System:
        for node in self._graph_module.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self.system.hold(self._read_by(node), "it leaves the program")
        self._tie_weights()
        self._tie_storage()
        masks = mask_tensors(self._program)
        self.system.hold(
            [v for v, k in enumerate(self.system.kinds) if isinstance(k, Tensor) and k.node in masks], "it is a mask"
        )
        return self.system

    def _placeholder(self, node: fx.Node) -> None:
        self.system.hold([v for v in self._made_by(node) if node.name not in self._state], "it comes into the program")
        self.system.hold([v for v in self._made_by(node) if node.name in self._written], "the program writes into it")

    def _call(self, node: fx.Node) -> None:
        if node.target is getitem:
            return
        base = base_op(node.target)
        if base in ASSERTS or base.startswith("sym_") or not (self._read_by(node) or self._made_by(node)):
            return  # it handles no values of an fp32 tensor
        chains = None if self._has_other_floats(node) else equations_of(node, self._table)
        if chains is None:
            why = f"{base or node.target} has no equation"
            self.system.hold([*self._read_by(node), *self._made_by(node)], why)
            return
        halves: dict[str, int] = {}
        for chain in chains:
            self._equate(node, [self._sum(node, e, halves) for e in self._every(node, chain)])

    def _every(self, node: fx.Node, chain: tuple[Expression, ...]) -> Iterator[Expression]:
        """The expressions of a chain, without those whose arguments the call does not have."""
        for expression in chain:
            if not expression or any(self._has(node, term.name) for term in expression):
                yield expression

    def _has(self, node: fx.Node, name: str) -> bool:
        if name.startswith("out") or name in {"j", "moved"}:
            return True
        value = argument_of(node, name)
        return value is not None or name == "weight" or (name in {"eps", "scale"} and self._takes(node, name))

    @staticmethod
    def _takes(node: fx.Node, name: str) -> bool:
        return any(argument.name == name for argument in node.target._schema.arguments)  # type: ignore[union-attr]

    def _sum(self, node: fx.Node, expression: Expression, halves: dict[str, int]) -> list[Row]:
        """The coefficients of an expression; where its one term names several tensors, those of each."""
        if len(expression) == 1 and not expression[0].every:
            term = expression[0]
            return [{v: term.count} if v is not None else {} for v in self._variables(node, term.name, halves)]
        row: Row = {}
        for term in expression:
            for variable in self._variables(node, term.name, halves):
                if variable is not None:
                    row[variable] = row.get(variable, 0) + term.count
        return [row]

    def _variables(self, node: fx.Node, name: str, halves: dict[str, int]) -> list[int | None]:
        """The variables of an argument or result; None for an exponent of 0."""
        if name == "j":
            if name not in halves:
                halves[name] = self.system.variable(None)
            return [halves[name]]
        if name.startswith("out"):
            made = self._outputs(node)
            if name != "out":
                return [made.get(int(name[3:]))]
            return list(made.values()) or [None]
        if name == "moved":
            return [v for n in moved_tensors(node) for v in self._of(n, node)]
        value = argument_of(node, name)
        if value is None and name in {"eps", "scale"}:
            value = implied(node, name)
        values = as_list(value)
        return [v for one in values for v in self._of_value(node, name, one)] or [None]

    def _of_value(self, node: fx.Node, name: str, value: Any) -> list[int | None]:
        if isinstance(value, fx.Node):
            return list(self._of(value, node)) or [None]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value == 0 or value != value:
            # 0 stays 0 times any power of two, as inf does below. A flag is no number, and NaN is left as it is.
            return [self.system.variable(None)] if not isinstance(value, bool) and value == 0 else [None]
        if abs(value) == float("inf"):
            return [self.system.variable(None)]
        return [self.system.variable(Number(node.name, name, float(value)))]

    def _equate(self, node: fx.Node, sides: list[list[Row]]) -> None:
        every = [row for side in sides for row in side]
        for one, other in pairwise(every):
            row = {v: one.get(v, 0) - other.get(v, 0) for v in one.keys() | other.keys()}
            row = {v: count for v, count in row.items() if count}
            if len(row) == 1:
                self.system.hold(row, f"{base_op(node.target)} takes it as it is")
            elif len(row) == 2 and sorted(row.values()) == [-1, 1]:
                first, second = row
                self.system.equal.append((first, second))
            elif row:
                self.system.rows.append(row)

    def _outputs(self, node: fx.Node) -> dict[int, int]:
        if node not in self._made:
            places = [i for i, v in tensor_values(node) if _is_fp32(v)]
            self._made[node] = {i: self.system.variable(Tensor(node.name, i)) for i in places}
        return self._made[node]

    def _made_by(self, node: fx.Node) -> list[int]:
        return list(self._outputs(node).values())

    def _of(self, node: fx.Node, reader: fx.Node) -> list[int]:
        """The variables of the tensors that a node hands to a reader; a `getitem` picks one of its maker's."""
        if node.target is getitem and isinstance(node.args[0], fx.Node):
            made = self._outputs(node.args[0])
            return [made[node.args[1]]] if node.args[1] in made else []  # type: ignore[index]
        found = self._made_by(node)
        return [self._after(node, found[0])] if reader.name in self._breaks.get(node.name, ()) and found else found

    def _after(self, node: fx.Node, before: int) -> int:
        """The exponent after the multiplication that may stand behind `node`."""
        name = f"{node.name}_rescaled"
        made = self.system.variable(Tensor(name, 0))
        if name not in self.system.breaks:
            self.system.breaks[name] = node.name
            factor = self.system.variable(Number(name, "other", 1.0))
            self.system.rows.append({made: 1, before: -1, factor: -1})
        return made

    def _read_by(self, node: fx.Node) -> list[int]:
        return [v for argument in node.all_input_nodes for v in self._of(argument, node)]

    def _has_other_floats(self, node: fx.Node) -> bool:
        """Whether the node also reads or gives another floating type."""
        return any(
            (v.is_floating_point() or v.is_complex()) and not _is_fp32(v)
            for n in (node, *node.all_input_nodes)
            for _, v in tensor_values(n)
        )

    def _tie_weights(self) -> None:
        """Weights that share memory have one exponent."""
        homes: dict[int, int] = {}
        for name, target in self._state.items():
            tensor = state_tensor(self._program, target)
            variable = self.system.index.get(Tensor(name, 0))
            if tensor is None or variable is None:
                continue
            home = homes.setdefault(storage_of(tensor), variable)
            if home != variable:
                self.system.equal.append((home, variable))

    def _tie_storage(self) -> None:
        """All tensors in storage that is written into have one exponent, before and after the write."""
        graph_module = self._graph_module
        written = [(n, a) for n in graph_module.graph.nodes for a in written_arguments(n)]
        if not written:
            return
        roots = storage_roots(graph_module)
        touched = {root for _, argument in written for root in roots[argument]}
        for root in touched:
            holders = [v for node, its in roots.items() if root in its for v in self._made_by(node)]
            self.system.equal.extend(pairwise(holders))


def _is_fp32(value: torch.Tensor) -> bool:
    return value.dtype == torch.float32
