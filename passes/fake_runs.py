"""Running an operator on fake tensors: which types it gives, found and not asserted."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree


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
        with mode, torch.no_grad(), _quiet(mode.shape_env):
            leaves = pytree.tree_leaves(node.target(*args, **kwargs))
            # By leaves: of a program from a file, several outputs are a tuple where the operator gives a list.
            old, form = pytree.tree_flatten(node.meta["val"])
            return pytree.tree_unflatten([_retyped(o, n) for o, n in zip(old, leaves, strict=True)], form)
    except (RuntimeError, TypeError, NotImplementedError, ValueError) as error:
        raise RefusedError(str(error)) from error


def _retyped(old: Any, new: Any) -> Any:
    return old.to(new.dtype) if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) else old


def _quiet(shape_env: Any) -> ExitStack:
    """No new guards and no new symbols for the user's program."""
    stack = ExitStack()
    if shape_env is not None:
        stack.enter_context(shape_env.suppress_guards())
        stack.enter_context(shape_env.ignore_fresh_unbacked_symbols())
    return stack
