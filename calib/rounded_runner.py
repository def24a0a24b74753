"""Runs a program as if some of its nodes ran in a half-precision type, with fp32 kernels only.

A low node rounds its fp32 inputs and the numbers in its call, computes in fp32, and rounds its results. A
half-precision kernel that accumulates in fp32, as GPU kernels do, gives the same. The host's half-precision kernels are
never used: some are wrong and some are missing. What a fused kernel accumulates or keeps in half precision is not
modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from calibcast.calib.aliasing import written_arguments
from calibcast.calib.execution import ProgramRunner, Watch
from calibcast.calib.rounding import fp32_kernels, rounded, rounded_number
from calibcast.calib.rounding_edges import is_mover, literals_of, with_numbers
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree


class RoundedRunner(ProgramRunner):
    """A `ProgramRunner` that rounds at the `low` nodes.

    low: qualified names of the nodes. Nodes that share storage which is written in place must be low together or not at
    all (`passes.node_types` makes a plan so). masks: names of the nodes whose values are saturated before they are
    rounded. Nodes inside autocast regions run as the user wrote them. carry_state: as in `ProgramRunner`. Cost: a
    forward pass, and one pass over memory for each tensor rounded.
    """

    def __init__(
        self,
        program: ExportedProgram,
        low: Collection[str],
        low_type: torch.dtype,
        masks: Collection[str] = (),
        device: torch.device | str | None = None,
        carry_state: bool = False,
    ) -> None:
        super().__init__(program, device, _Rounding(frozenset(low), low_type, frozenset(masks)).run, carry_state)

    def run(self, flat: Sequence[Any], watch: Watch | None = None) -> list[Any]:
        """The flat user outputs; `watch` sees what each node gave, rounded. Raises NodeError where a node raises."""
        with fp32_kernels():
            return super().run(flat, watch)


@dataclass(frozen=True)
class _LowNode:
    """What stays the same at each run of a low node.

    args, kwargs: with its numbers rounded. made_low: arguments that were rounded when they were made.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    written: tuple[fx.Node, ...]
    made_low: frozenset[fx.Node]
    keeps: bool  # its results need no rounding: it only moves elements


class _Rounding:
    """How nodes run under a plan. A `calib.execution.Around`."""

    def __init__(self, low: frozenset[str], low_type: torch.dtype, masks: frozenset[str]) -> None:
        self._low, self._low_type, self._masks = low, low_type, masks
        self._nodes: dict[str, _LowNode] = {}

    def run(self, name: str, node: fx.Node, values: dict[fx.Node, Any], call: Callable[[Any, Any], Any]) -> Any:
        if name not in self._low:
            return call(*fx.map_arg((node.args, node.kwargs), values.__getitem__))
        prefix = name.removesuffix(node.name)
        if (low := self._nodes.get(name)) is None:
            low = self._nodes[name] = self._low_node(name, node, prefix)

        def given(argument: fx.Node) -> Any:
            if argument in low.made_low:
                return values[argument]
            return self._rounded(values[argument], prefix + argument.name, in_place=argument in low.written)

        results = call(*fx.map_arg((low.args, low.kwargs), given))
        for argument in low.written:
            self._rounded(values[argument], name, in_place=True)
        return results if low.keeps else self._rounded(results, name, in_place=bool(low.written))

    def _low_node(self, name: str, node: fx.Node, prefix: str) -> _LowNode:
        args, kwargs = with_numbers(node.target, node.args, node.kwargs, self._numbers(name, node))
        written = tuple(dict.fromkeys(written_arguments(node)))
        made_low = frozenset(
            a for a in node.all_input_nodes if a.op == "call_function" and prefix + a.name in self._low
        )
        return _LowNode(args, kwargs, written, made_low, is_mover(node) and not written)

    def _numbers(self, name: str, node: fx.Node) -> dict[str, float]:
        """The numbers in a call that rounding changes, rounded."""
        saturate, numbers = name in self._masks, literals_of(node)
        made = {key: rounded_number(value, self._low_type, saturate) for key, value in numbers.items()}
        return {key: value for key, value in made.items() if value != numbers[key]}

    def _rounded(self, value: Any, name: str, in_place: bool) -> Any:
        def one(tensor: torch.Tensor) -> torch.Tensor:
            result = rounded(tensor, self._low_type, name in self._masks)
            return tensor.copy_(result) if in_place and result is not tensor else result

        return one(value) if isinstance(value, torch.Tensor) else pytree.tree_map_only(torch.Tensor, one, value)
