"""A program, a plan made by hand, and what cast insertion made of both: what the laws speak of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.graph import size_hint, tensor_values
from calibcast.calib.graph_digests import fingerprint
from calibcast.calib.program_digests import node_digests, weights_hash
from calibcast.passes import PrecisionPlan, classify, insert_casts
from calibcast.passes.regions import flatten
from calibcast.passes.verdict import HIGH, KEPT, LOW
from torch import fx
from torch.export import ExportedProgram


def plan_by_hand(
    program: ExportedProgram,
    low: Collection[str] | Callable[[int], bool],
    low_type: torch.dtype = torch.float16,
    legal: bool = False,
) -> PrecisionPlan:
    """The plan in which just the nodes in `low` are low, whatever any rule says.

    low: node names, or a function of the position among the nodes that can be decided, so that plans can be drawn.
    legal: but for legality, which custom and fft operators do not meet.
    """
    plan = classify(program, None, low_precision_type=low_type)
    fixed = {KEPT} if not legal else {KEPT, "legality"}
    decided = [d.node for d in plan.decisions if not {d.precision, d.rule} & fixed]
    chosen = {name for i, name in enumerate(decided) if low(i)} if callable(low) else set(low)
    assert chosen <= set(decided), f"{chosen - set(decided)} cannot be planned; there are {decided}"
    by_hand = {n: (LOW, None) if n in chosen else (HIGH, "by_hand") for n in decided}
    decisions = (
        dataclasses.replace(d, precision=by_hand[d.node][0], rule=by_hand[d.node][1], reason="by hand")
        if d.node in by_hand
        else d
        for d in plan.decisions
    )
    return dataclasses.replace(plan, decisions=tuple(decisions))


@dataclass(frozen=True)
class Case:
    """A program, a plan of it, and what insertion made of both.

    source: the flat graph that insertion has read. smooth: no rounding turns into another integer or branch.
    """

    program: ExportedProgram
    plan: PrecisionPlan
    mixed: ExportedProgram
    source: fx.GraphModule
    inputs: tuple[Any, ...]
    smooth: bool
    before: tuple[str, str, str]

    @cached_property
    def outputs(self) -> list[Any]:
        """What the rewritten program gives, held to its metadata."""
        return run_checked(self.mixed, *self.inputs)

    @cached_property
    def reference(self) -> list[Any]:
        """What the program gives."""
        return ProgramRunner(self.program).run(fresh(self.inputs))

    def pairs(self) -> list[tuple[fx.Node, fx.Node]]:
        """Each computed node of the source with its counterpart."""
        made = {node.name: node for node in self.mixed.graph.nodes}
        return [(n, made[n.name]) for n in self.source.graph.nodes if n.op == "call_function" and n.name in made]


def made_case(program: ExportedProgram, plan: PrecisionPlan, inputs: Sequence[Any], smooth: bool = True) -> Case:
    """Insert the casts of `plan` into `program`."""
    before = snapshot(program)
    mixed = insert_casts(program, plan)
    source = flatten(program.graph_module) if plan.low_precision_nodes else program.graph_module
    return Case(program, plan, mixed, source, tuple(inputs), smooth, before)


def snapshot(program: ExportedProgram) -> tuple[str, str, str]:
    """All that a caller may see of a program: its graph as digests and as text, and its weights."""
    return fingerprint(node_digests(program)), str(program.graph), weights_hash(program)


def run_checked(program: ExportedProgram, *inputs: Any) -> list[Any]:
    wrong: list[str] = []

    def watch(name: str, node: fx.Node, result: Any, _: Any) -> None:
        real = result if isinstance(result, (list, tuple)) else [result]
        for position, value in tensor_values(node):
            tensor = real[position]
            if tensor is not None:
                sizes = [_size(size, came) for size, came in zip(value.shape, tensor.shape, strict=True)]
                if tensor.dtype != value.dtype or list(tensor.shape) != sizes:
                    wrong.append(f"{name}: is {tensor.dtype}{list(tensor.shape)}, says {value.dtype}{sizes}")

    outputs = ProgramRunner(program).run(fresh(inputs), watch)
    assert not wrong
    return outputs


def _size(said: Any, came: int) -> int:
    """A size by the metadata, at the sizes of the export; what came, where it depends on data."""
    return came if isinstance(said, torch.SymInt) and said.node.hint is None else size_hint(said)


def fresh(inputs: Sequence[Any]) -> list[Any]:
    return [v.clone() if isinstance(v, torch.Tensor) else v for v in inputs]
