"""Running an operator on fake tensors: which types it gives, found and not asserted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from calib.errors import first_line
from calib.graph import size_hint

_REFUSALS = (RuntimeError, TypeError, NotImplementedError, ValueError)


class RefusedError(Exception):
    """The operator does not run in these types; the message is its own."""


def run_on_fakes(node: fx.Node, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """What `node` gives for these fake arguments: its exported value, in the types that it gives now.

    Sizes are those of the export: a type changes none, and symbols of data-dependent sizes stay. Nothing is added
    to the user's program, neither guards nor symbols. Raises RefusedError where the operator refuses the types.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    if node.target._schema.is_mutable:
        # An in-place op would change the shape or version of a fake tensor that other nodes share.
        with mode:
            args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    try:
        found = _run(node, args, kwargs, mode)
    except _REFUSALS:
        try:
            found = _run_concrete(node, args, kwargs)
        except _REFUSALS as error:
            raise RefusedError(first_line(error)) from error
    with mode, _quiet(mode.shape_env):
        # By leaves: of a program from a file, several outputs are a tuple where the operator gives a list.
        old, form = pytree.tree_flatten(node.meta["val"])
        leaves = pytree.tree_leaves(found)
        return pytree.tree_unflatten([_retyped(o, n) for o, n in zip(old, leaves, strict=True)], form)


def _run(node: fx.Node, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    with mode, torch.no_grad(), _quiet(mode.shape_env), _unlogged():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _run_concrete(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """At the sizes of the export: some kernels for half types take no symbols, such as those of lstm and baddbmm."""
    with FakeTensorMode(), torch.no_grad():
        args, kwargs = pytree.tree_map(_stand_in, (args, kwargs))
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _stand_in(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty([size_hint(size) for size in value.shape], dtype=value.dtype, device=value.device)
    return size_hint(value) if isinstance(value, torch.SymInt) else value


@contextmanager
def _unlogged() -> Iterator[None]:
    """torch logs a stack trace when a fake kernel raises; here that is expected, and the kernel is asked again."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _retyped(old: Any, new: Any) -> Any:
    return old.to(new.dtype) if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) else old


def _quiet(shape_env: Any) -> ExitStack:
    """No new guards and no new symbols for the user's program."""
    stack = ExitStack()
    if shape_env is not None:
        stack.enter_context(shape_env.suppress_guards())
        stack.enter_context(shape_env.ignore_fresh_unbacked_symbols())
    return stack
