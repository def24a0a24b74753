"""Find the type in which `torch.autocast` would run each node, by calling the program's operators under it on fake
tensors.

The lists of operators are torch's own, for the installed version and the device type; calibcast keeps none. Nothing is
computed, and the lists of a GPU can be used without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import getitem
from typing import Any

import torch
from calibcast.calib.graph import size_hint
from calibcast.calib.process_settings import unlogged
from calibcast.passes.low_types import FAKE_KERNELS
from calibcast.passes.regions import flatten, qualified_name
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# A call that cannot run on fake tensors raises one of these; its node then keeps its types.
_REFUSALS = (RuntimeError, TypeError, NotImplementedError, ValueError, AssertionError)


def ran_low(program: ExportedProgram, low_type: torch.dtype, device_type: str) -> frozenset[str]:
    """Names of the nodes that autocast runs in `low_type`: those whose floating results have it, or, where a node has
    none (a comparison), whose arguments have it."""
    source, low = flatten(program.graph_module), set[str]()
    made: dict[fx.Node, Any] = {}
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        unlogged(FAKE_KERNELS),
        _autocast(device_type, low_type),
    ):
        for node in source.graph.nodes:
            recorded = pytree.tree_map(lambda value: _stand_in(value, device_type), node.meta.get("val"))
            made[node] = recorded
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                made[node], is_low = _called(node, made, recorded, device_type, low_type)
                low |= {qualified_name(node)} if is_low else set()
            elif node.target is getitem:
                made[node] = made[node.args[0]][node.args[1]]
    return frozenset(low)


def _called(
    node: fx.Node, made: dict[fx.Node, Any], recorded: Any, device_type: str, low_type: torch.dtype
) -> tuple[Any, bool]:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: made[n])
    args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device(device_type), (args, kwargs))
    args, kwargs = pytree.tree_map_only(torch.SymInt, size_hint, (args, kwargs))
    seen = _Types()
    try:
        with seen:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
    except _REFUSALS:
        return recorded, False
    types = {t.dtype for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_floating_point()}
    return result, (types or seen.read) == {low_type}


class _Types(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the floating types that operators read, once autocast has cast them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = pytree.tree_leaves((args, kwargs or {}))
        self.read = {t.dtype for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()} or self.read
        return func(*args, **(kwargs or {}))


@contextmanager
def _autocast(device_type: str, low_type: torch.dtype) -> Iterator[None]:
    """Like `torch.autocast`, but also for a GPU on a machine without one, where `torch.autocast` does nothing."""
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_dtype(device_type, low_type)
    torch.set_autocast_enabled(device_type, True)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])


def _stand_in(value: Any, device_type: str) -> Any:
    if isinstance(value, torch.Tensor):
        sizes = [size_hint(size) for size in value.shape]
        return torch.empty(sizes, dtype=value.dtype, device=device_type)
    return size_hint(value) if isinstance(value, torch.SymInt) else value
