"""What an operator gives for inputs of other types: found by running it on fake tensors, never asserted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from calib.graph import size_hint

REFUSALS = (RuntimeError, TypeError, NotImplementedError, ValueError)


def derived(node: fx.Node, made: fx.Node, fake_mode: FakeTensorMode) -> Any:
    """The value of `node` as exported, in the types that `made`, a copy of it with other inputs, gives.

    Sizes stay those of the export: a type changes none, and symbols of data-dependent sizes must stay. Raises what
    the operator raises where it refuses these types.
    """
    try:
        found = _run_symbolic(node, made, fake_mode)
    except REFUSALS:
        found = _run_concrete(node, made)
    with fake_mode, _quiet(fake_mode.shape_env):
        return pytree.tree_map(_retyped, node.meta["val"], found)


def _run_symbolic(node: fx.Node, made: fx.Node, fake_mode: FakeTensorMode) -> Any:
    writes = node.target._schema.is_mutable  # type: ignore[union-attr]

    def value(n: fx.Node) -> Any:
        fake = n.meta["val"]
        # An in-place op would change the shape or version of a fake tensor that other nodes share.
        return pytree.tree_map_only(torch.Tensor, torch.clone, fake) if writes else fake

    with fake_mode, torch.no_grad(), _quiet(fake_mode.shape_env), _unlogged():
        args, kwargs = fx.map_arg((made.args, made.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _run_concrete(node: fx.Node, made: fx.Node) -> Any:
    """At the sizes of the export: some kernels for half types take no symbols, such as those of lstm and baddbmm."""

    def stand_in(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty([size_hint(size) for size in value.shape], dtype=value.dtype, device=value.device)
        return size_hint(value) if isinstance(value, torch.SymInt) else value

    with FakeTensorMode(), torch.no_grad():
        args, kwargs = fx.map_arg((made.args, made.kwargs), lambda n: pytree.tree_map(stand_in, n.meta["val"]))
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _quiet(shape_env: Any) -> Any:
    """No new guards and no new symbols for the user's program."""
    stack = ExitStack()
    if shape_env is not None:
        stack.enter_context(shape_env.suppress_guards())
        stack.enter_context(shape_env.ignore_fresh_unbacked_symbols())
    return stack


@contextmanager
def _unlogged() -> Iterator[None]:
    """torch logs a stack trace when a fake kernel raises; here that is expected, and tried again."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _retyped(old: Any, new: Any) -> Any:
    return old.to(new.dtype) if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) else old
