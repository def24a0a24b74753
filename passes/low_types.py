"""The output types of an operator when its fp32 inputs are given in the low type. It is run on fake tensors."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from calibcast.calib.errors import PlanError, first_line
from calibcast.calib.graph import size_hint
from calibcast.calib.process_settings import FAKE_TENSORS, unlogged
from calibcast.passes.dtype_arguments import with_low_dtype
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

# This logger prints a stack trace when a fake kernel raises. Here that is expected, and the call is tried again.
FAKE_KERNELS = "torch._subclasses.fake_tensor"
LOW_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
Types = tuple[torch.dtype | None, ...]  # of the outputs of a node; None for an output that is not a tensor
# AssertionError comes from a program's own check of a type. Such a node is tried like any other.
_REFUSALS = (RuntimeError, TypeError, NotImplementedError, ValueError, AssertionError)


class LowTypes:
    """Finds the types of low nodes. Deep networks repeat the same kinds of nodes, so each kind runs once."""

    def __init__(self, graph_module: fx.GraphModule, low_type: torch.dtype) -> None:
        """Raises PlanError where the nodes carry no fake tensors."""
        self.mode, self.low_type = fake_mode_of(graph_module), low_type
        self._kinds: dict[str, Types | str] = {}
        self._said: dict[fx.Node, str] = {}

    def of(self, node: fx.Node) -> Types | None:
        """The output types of `node` when all its fp32 inputs are low; None where the operator refuses."""
        found = self._found(node)
        return None if isinstance(found, str) else found

    def refusal(self, node: fx.Node) -> str | None:
        """The operator's error message where it refuses the low type, or None."""
        found = self._found(node)
        return found if isinstance(found, str) else None

    def _found(self, node: fx.Node) -> Types | str:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._kind)
        kind = f"{node.target} {args} {kwargs}"
        if kind not in self._kinds:
            self._kinds[kind] = self._run(node)
        return self._kinds[kind]

    def _kind(self, node: fx.Node) -> str:
        """The types and shapes of `node`: all that the output types of its readers depend on."""
        if node not in self._said:
            value = node.meta.get("val")
            leaves = [value] if isinstance(value, torch.Tensor) else pytree.tree_leaves(value)
            self._said[node] = str([(v.dtype, v.shape) if isinstance(v, torch.Tensor) else type(v) for v in leaves])
        return self._said[node]

    def _run(self, node: fx.Node) -> Types | str:
        args, kwargs = with_low_dtype(node, node.args, node.kwargs, self.low_type)
        if args == node.args and kwargs == node.kwargs and not any(map(_is_fp32, node.all_input_nodes)):
            return types_of(node.meta.get("val"))  # no input changes its type
        try:
            return types_of(self._run_symbolic(node, args, kwargs))
        except _REFUSALS:
            pass
        try:
            return types_of(self._run_concrete(node, args, kwargs))
        except _REFUSALS as error:
            return first_line(error)

    def _run_symbolic(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        with FAKE_TENSORS, self.mode, torch.no_grad(), _quiet(self.mode.shape_env), unlogged(FAKE_KERNELS):
            # Copies, as an in-place op would change a fake tensor that nodes share.
            args, kwargs = fx.map_arg((args, kwargs), lambda n: pytree.tree_map(self._lowered, n.meta["val"]))
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _run_concrete(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Run at the sizes of the export: some half-precision kernels, such as lstm's, take no symbolic sizes."""
        with FakeTensorMode(), torch.no_grad(), unlogged(FAKE_KERNELS):
            args, kwargs = fx.map_arg((args, kwargs), lambda n: pytree.tree_map(self._stand_in, n.meta["val"]))
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _lowered(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.low_type) if value.dtype == torch.float32 else value.clone()

    def _stand_in(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            dtype = self.low_type if value.dtype == torch.float32 else value.dtype
            return torch.empty([size_hint(size) for size in value.shape], dtype=dtype, device=value.device)
        return size_hint(value) if isinstance(value, torch.SymInt) else value


def fake_mode_of(graph_module: fx.GraphModule) -> FakeTensorMode:
    """The mode that the graph's fake tensors share. Raises PlanError where the graph has none."""
    for node in graph_module.graph.nodes:
        mode = detect_fake_mode(node.meta.get("val"))
        if mode is not None:
            return mode
    raise PlanError("the program's nodes carry no fake tensors; export it with torch.export.export")


def types_of(value: Any) -> Types:
    """The types of a node's outputs, from their values as recorded at export or found by running the node."""
    if isinstance(value, torch.Tensor):
        return (value.dtype,)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(v.dtype if isinstance(v, torch.Tensor) else None for v in values)


def retyped(value: Any, types: Types) -> Any:
    """`value`, as recorded at export, cast to other types. Call this under the fake mode of `value`.

    Sizes stay as exported: a cast changes none, and the symbols of data-dependent sizes must be kept.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(_retyped(v, dtype) for v, dtype in zip(value, types, strict=True))
    return _retyped(value, types[0])


def _retyped(value: Any, dtype: torch.dtype | None) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and dtype not in {None, value.dtype} else value


def _is_fp32(node: fx.Node) -> bool:
    return any(
        isinstance(v, torch.Tensor) and v.dtype == torch.float32 for v in pytree.tree_leaves(node.meta.get("val"))
    )


def _quiet(shape_env: Any) -> ExitStack:
    """Add no new guards and no new symbols to the user's program."""
    stack = ExitStack()
    if shape_env is not None:
        stack.enter_context(shape_env.suppress_guards())
        stack.enter_context(shape_env.ignore_fresh_unbacked_symbols())
    return stack
