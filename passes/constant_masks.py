"""Masks whose values the program itself fixes, such as a causal one: can a whole row of them be masked?

Where every row keeps a value, a softmax never sees the scores of masked elements alone, so it does not matter how they
are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from calibcast.calib.aliasing import mutated_inputs
from calibcast.calib.graph import base_op, input_kinds, input_targets, state_tensor
from calibcast.calib.operators import operator_of
from calibcast.calib.sentinels import MASK_AT_MOST
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

# Larger masks are not computed: the rule then keeps the node.
_MOST_ELEMENTS = 1 << 24


class ConstantMasks:
    """Evaluates the parts of a program that no input reaches, at the exported sizes."""

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self._values: dict[fx.Node, Any] = {}

    def masks_a_row(self, node: fx.Node) -> bool:
        """Whether what `node` gives may have nothing but mask values along its last dimension.

        True as well where its values depend on an input, or cannot be computed here.
        """
        value = self._value(node) if node in self._fixed else None
        return value is None or not value.ndim or bool((value <= MASK_AT_MOST).all(-1).any())

    @cached_property
    def _constants(self) -> Mapping[str, str]:
        kinds, written = input_kinds(self._program), mutated_inputs(self._program)
        return {
            name: target
            for name, target in input_targets(self._program).items()
            if kinds.get(name) in {"buffer", "constant"} and name not in written
        }

    @cached_property
    def _fixed(self) -> set[fx.Node]:
        """The nodes that no input reaches."""
        found: set[fx.Node] = set()
        for node in self._program.graph_module.graph.nodes:
            held = node.op == "placeholder" and node.name in self._constants
            if held or (_computes(node) and found.issuperset(node.all_input_nodes) and _is_small(node)):
                found.add(node)
        return found

    def _value(self, node: fx.Node) -> torch.Tensor | None:
        """What a fixed node gives; None where it cannot be computed."""
        if node not in self._values:
            self._values[node] = self._computed(node)
        value = self._values[node]
        return value if isinstance(value, torch.Tensor) else None

    def _computed(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            held = state_tensor(self._program, self._constants[node.name])
            return None if held is None else held.detach().clone()
        given = {n: self._value(n) for n in node.all_input_nodes}
        if any(value is None for value in given.values()):
            return None
        args, kwargs = pytree.tree_map_only(fx.Node, given.__getitem__, (node.args, dict(node.kwargs)))
        try:
            with torch.no_grad():
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # whatever the operator refuses: the mask is then unknown
            return None


def _computes(node: fx.Node) -> bool:
    """Whether a node can be run alone: it is an operator of torch without chance, and writes into nothing."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    writes = node.target._schema.is_mutable and not operator_of(base_op(node.target)).writes_nothing
    chance = torch.Tag.nondeterministic_seeded in node.target.tags
    return base_op(node.target) != "" and not writes and not chance


def _is_small(node: fx.Node) -> bool:
    value = node.meta.get("val")
    sizes = list(value.shape) if isinstance(value, torch.Tensor) else []
    known = isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in sizes)
    return known and math.prod(sizes) <= _MOST_ELEMENTS
