"""Floating-point operations of a node, as `torch.utils.flop_counter` counts them."""

from __future__ import annotations

from typing import Any

import torch
from calibcast.calib.graph import base_op, size_hint
from calibcast.calib.operators import WORKS
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode


class WorkCounter:
    """`work_of`, counted once per kind of node, since deep networks repeat the same kinds."""

    def __init__(self) -> None:
        self._found: dict[str, int] = {}

    def __call__(self, node: fx.Node) -> int:
        """FLOPs of one call of `node`."""
        if node.op != "call_function" or base_op(node.target) not in WORKS:
            return 0
        kind = f"{node.target} {fx.map_arg((node.args, node.kwargs), _said)}"
        if kind not in self._found:
            self._found[kind] = work_of(node)
        return self._found[kind]


def work_of(node: fx.Node) -> int:
    """FLOPs of one call at the exported sizes; 0 for what the counter does not count.

    The operator runs on meta tensors of these sizes: symbolic sizes are never evaluated, as that would add guards to
    the user's program.
    """
    if node.op != "call_function" or base_op(node.target) not in WORKS:
        return 0
    args, kwargs = pytree.tree_map_only(fx.Node, _on_meta, (node.args, node.kwargs))
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            node.target(*args, **kwargs)  # type: ignore[operator]
    except RuntimeError:  # no meta kernel for these types: the work is unknown, not an error
        return 0
    return int(counter.get_total_flops())


def _said(node: fx.Node) -> str:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return str([(v.dtype, v.shape) if isinstance(v, torch.Tensor) else v for v in leaves])


def _on_meta(node: fx.Node) -> Any:
    return pytree.tree_map(_stand_in, node.meta.get("val"))


def _stand_in(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty([size_hint(size) for size in value.shape], dtype=value.dtype, device="meta")
    return size_hint(value) if isinstance(value, torch.SymInt) else value
