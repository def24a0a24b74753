"""An independent account of what cast insertion should give: an interpreter that casts around each node."""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from calibcast.calib.graph import base_op, is_measurable, state_tensor
from calibcast.calib.host_kernels import call_anywhere
from calibcast.passes import PrecisionPlan
from calibcast.passes.dtype_arguments import dtype_position, needs_dtype
from calibcast.passes.node_types import refused_number, states_type
from calibcast.passes.regions import qualified_name
from calibcast.passes.ties import ties_of
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from benchmarks.fuzz.case import fresh


class CastingInterpreter(fx.Interpreter):
    """A plan carried out without rewriting anything: an independent account of what insertion should give."""

    def __init__(self, graph_module: fx.GraphModule, plan: PrecisionPlan) -> None:
        super().__init__(graph_module)
        self._low_type = plan.low_precision_type
        planned = set(plan.low_precision_nodes)
        nodes = [node for node in graph_module.graph.nodes if node.op == "call_function"]
        self._low = {n for n in nodes if qualified_name(n) in planned and refused_number(n, self._low_type) is None}
        for tie in ties_of(graph_module):  # without writes, of comparisons of masks
            if not {node for node in tie.nodes if node.target is not getitem} <= self._low:
                self._low -= tie.nodes

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or n.target is getitem or states_type(n):
            return super().run_node(n)
        if base_op(n.target) == "_assert_tensor_metadata":
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n not in self._low:
            args, kwargs = self._as_exported(n)
        else:
            if needs_dtype(n) and dtype_position(n) is not None:
                kwargs = {"dtype": self._low_type, **kwargs}
            args, kwargs = pytree.tree_map(self._lowered, (args, kwargs))
        with torch.no_grad():
            return call_anywhere(n.target, args, kwargs)  # some half kernels of the host are wrong or missing

    def _lowered(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            return value.to(self._low_type)
        return self._low_type if value is torch.float32 else value

    def _as_exported(self, node: fx.Node) -> Any:
        def value(argument: Any) -> Any:
            if not isinstance(argument, fx.Node):
                return argument
            came, said = self.env[argument], argument.meta.get("val")
            is_float = isinstance(came, torch.Tensor) and is_measurable(came.dtype)
            return came.to(said.dtype) if is_float else came

        return pytree.tree_map(value, (tuple(node.args), dict(node.kwargs)))

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        node = next(n for n in self.module.graph.nodes if n.op == "output")
        return self._as_exported(node)[0][0]


def placeholder_values(program: ExportedProgram, inputs: Sequence[Any]) -> list[Any]:
    """The values of the placeholders, the program's own state and not a copy of it among them."""
    flat = iter(fresh(inputs))
    return [
        next(flat) if spec.kind == InputKind.USER_INPUT else _state(program, spec.target)
        for spec in program.graph_signature.input_specs
    ]


def _state(program: ExportedProgram, target: str) -> Any:
    tensor = state_tensor(program, target)
    return program.constants.get(target) if tensor is None else tensor.detach()
