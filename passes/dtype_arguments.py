"""Handles `dtype=` arguments, which must follow the type of their node."""

from __future__ import annotations

from typing import Any

import torch
from calibcast.calib.graph import is_measurable, tensor_values
from torch import fx


def dtype_position(node: fx.Node) -> tuple[int, str] | None:
    """Position and name of the `dtype` argument of an operator with floating-point output, if it has one."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if not any(is_measurable(value.dtype) for _, value in tensor_values(node)):
        return None
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dtype":
            return position, argument.name
    return None


def needs_dtype(node: fx.Node) -> bool:
    """Whether the type of a factory's output is torch's default, as it has neither a dtype nor a tensor to follow."""
    has_tensor = any(tensor_values(argument) for argument in node.all_input_nodes)
    return not has_tensor


def with_low_dtype(node: fx.Node, args: Any, kwargs: Any, low_type: torch.dtype) -> tuple[Any, Any]:
    """The arguments of a low node: a `dtype` of float32, or the default of a factory, becomes the low type."""
    position = dtype_position(node)
    if position is None:
        return args, kwargs
    index, name = position
    stated = node.args[index] if index < len(node.args) else node.kwargs.get(name)
    if stated == torch.float32 and index < len(node.args):
        return (*args[:index], low_type, *args[index + 1 :]), kwargs
    if stated == torch.float32 or needs_dtype(node):
        return args, {**kwargs, name: low_type}
    return args, kwargs
