"""Regions that export leaves flat: nodes between a marker that sets something for the thread and one that undoes it.

`torch.vmap`, `torch.func.jvp` and `associative_scan` leave such regions, and so does `torch.autocast` where export
could not give it a graph of its own. Between the markers, tensors are wrapped, and the setting holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._functorch import predispatch
from torch.amp import autocast_mode
from torch.utils import _pytree as pytree


class _Marker(NamedTuple):
    """leave: the function that ends a region. undo: the same, called with the result of the marker that began it."""

    leave: Any
    undo: Callable[[Any], Any]
    name: str


def _markers() -> dict[Any, _Marker]:
    """The markers that begin a region, as far as the installed torch has them: torch 2.11 traces fewer than 2.14.

    Source: `_allowed_torch_functions` in torch/_export/verifier.py, which lists all that a program may hold besides
    operators. `_set_grad_enabled` is in that list, too; it has no effect without gradients.
    """
    found = {
        autocast_mode._enter_autocast: _Marker(
            autocast_mode._exit_autocast, autocast_mode._exit_autocast, "torch.autocast"
        )
    }
    pairs = (
        ("_vmap_increment_nesting", "_vmap_decrement_nesting", "torch.vmap"),
        ("_jvp_increment_nesting", "_jvp_decrement_nesting", "torch.func.jvp"),
        ("_grad_increment_nesting", "_grad_decrement_nesting", "torch.func.grad"),
        ("_enter_dual_level", "_exit_dual_level", "torch.autograd.forward_ad"),
    )
    for begin, end, name in pairs:
        if hasattr(predispatch, begin) and hasattr(predispatch, end):
            leave = getattr(predispatch, end)
            undo = _exit_dual_level if begin == "_enter_dual_level" else _without_argument(leave)
            found[getattr(predispatch, begin)] = _Marker(leave, undo, name)
    return found


def _exit_dual_level(level: Any) -> Any:
    return predispatch._exit_dual_level(level=level)


def _without_argument(leave: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda _: leave()


MARKERS = _markers()
_LEAVES = {marker.leave for marker in MARKERS.values()}


class Block(NamedTuple):
    """Nodes that run together. region: the user's call that made the region, such as "torch.vmap"; "" outside one."""

    nodes: tuple[fx.Node, ...]
    region: str


def blocks(nodes: Iterable[fx.Node]) -> Iterator[Block]:
    """The nodes of a graph in order: each flat region, markers included, as one block, all else one by one."""
    open_markers: list[fx.Node] = []
    held: list[fx.Node] = []
    for node in nodes:
        if node.target in MARKERS:
            open_markers.append(node)
        if not open_markers:
            yield Block((node,), "")
            continue
        if node.op == "output":  # a region that nothing closes ends here
            yield Block(tuple(held), MARKERS[held[0].target].name)
            yield Block((node,), "")
            return
        held.append(node)
        if node.target in _LEAVES:
            open_markers.pop()
            if not open_markers:
                yield Block(tuple(held), MARKERS[held[0].target].name)
                held = []


def flat_regions(graph: fx.Graph) -> dict[fx.Node, str]:
    """The nodes inside flat regions, markers included, each with the user's call that made its region."""
    return {node: block.region for block in blocks(graph.nodes) if block.region for node in block.nodes}


class OpenRegions:
    """The markers of one thread that have run and have not been undone."""

    def __init__(self) -> None:
        self._open: list[tuple[_Marker, Any]] = []

    def note(self, node: fx.Node, result: Any) -> None:
        """Record a node that has run."""
        if node.target in MARKERS:
            self._open.append((MARKERS[node.target], result))
        elif node.target in _LEAVES:
            self._open.pop()

    def leave_all(self) -> None:
        """Undo what is still set, the last marker first: after an error, or where the graph leaves a region open."""
        with ExitStack() as stack:
            for marker, result in self._open:
                stack.callback(marker.undo, result)
        self._open.clear()


@contextmanager
def open_regions() -> Iterator[OpenRegions]:
    """Inside, regions may be entered; afterwards all have been left, also after an error."""
    opened = OpenRegions()
    try:
        yield opened
    finally:
        opened.leave_all()


def unwrapped(value: Any, copy: bool = False) -> Any:
    """Plain tensors in place of those that a region wraps: all samples of a `vmap`, the values of a `jvp`.

    copy: give copies, because a later node of the region writes in place.
    """
    return pytree.tree_map_only(torch.Tensor, lambda tensor: _plain(tensor, copy), value)


def _plain(tensor: torch.Tensor, copy: bool) -> torch.Tensor:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    with torch._C._DisableFuncTorch():
        return tensor.detach().clone() if copy else tensor.detach()
