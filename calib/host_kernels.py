"""Half precision on the CPU, where torch lacks some kernels, and some that it has are wrong.

A plan must not depend on the machine on which it is tried, and a GPU has these kernels. So on a CPU these operators run
in fp32 and their results are rounded, as a half-precision kernel that accumulates in fp32 would do.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from calibcast.calib.graph import base_op, program_device
from calibcast.calib.operators import operator_of
from calibcast.calib.training_mode import is_random
from torch import fx
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_HALVES = {torch.float16, torch.bfloat16}


def call_anywhere(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator; on a host that lacks its half-precision kernel, or has a wrong one, in fp32 and rounded.

    Random numbers are drawn in fp32 on any machine: half-precision kernels draw others from the same generator.
    """
    if is_random(target) and (wanted := _half_result(args, kwargs)) is not None:
        return _drawn(target, args, kwargs, wanted)
    if operator_of(base_op(target)).wrong_on_host and _half_on_host(args, kwargs):
        return _emulated(target, args, kwargs)
    try:
        return target(*args, **kwargs)
    except RuntimeError as error:
        if not _lacks_half_kernel(error, target):
            raise
        return _emulated(target, args, kwargs)


class CastProgram(ExportedProgram):
    """An exported program whose `module()` runs on a host, too, even if torch lacks half-precision kernels there.

    torch treats it as any other `ExportedProgram`; `torch.export.load` gives back torch's own class.
    """

    def module(self, check_guards: bool = True) -> fx.GraphModule:
        """As `ExportedProgram.module`: the program as a module that is called like the model."""
        module = super().module(check_guards)
        if program_device(self).type == "cpu":
            _run_on_host(module)
        return module


def _run_on_host(module: fx.GraphModule) -> None:
    module.forward = MethodType(_forward_on_host, module)
    module._register_deepcopy_hook(_run_on_host)  # a copy is built from the graph alone


def _forward_on_host(module: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    with _HostKernels():
        return type(module).forward(module, *args, **kwargs)


class _HostKernels(TorchFunctionMode):
    """While this mode is active, `call_anywhere` calls the operators."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(func, torch._ops.OpOverload):
            return call_anywhere(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _half_result(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The half-precision type that a call is to give: the one it states, else that of its first such argument."""
    if (stated := kwargs.get("dtype")) is not None:
        return stated if stated in _HALVES else None
    return next((v.dtype for v in pytree.tree_leaves((args, kwargs)) if _is_half(v)), None)


def _drawn(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: torch.dtype) -> Any:
    """Run an operator that draws random numbers in fp32, and round what it gives and what it writes into."""
    leaves, spec = pytree.tree_flatten((args, {**kwargs, "dtype": torch.float32} if "dtype" in kwargs else kwargs))
    wide = [v.float() if _is_half(v) else v for v in leaves]
    wide_args, wide_kwargs = pytree.tree_unflatten(wide, spec)
    results = target(*wide_args, **wide_kwargs)
    written = {id(w): n.copy_(w) for n, w in zip(leaves, wide, strict=True) if w is not n and w._version}
    return pytree.tree_map_only(
        torch.Tensor, lambda t: written.get(id(t), t.to(wanted) if t.dtype == torch.float32 else t), results
    )


def _half_on_host(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(_is_half(value) and value.device.type == "cpu" for value in pytree.tree_leaves((args, kwargs)))


def _lacks_half_kernel(error: RuntimeError, target: Any) -> bool:
    """Whether a host kernel is missing for half precision: `"..." not implemented for 'Half'`."""
    text = str(error)
    is_operator = isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable
    return is_operator and "not implemented for" in text and ("'Half'" in text or "'BFloat16'" in text)


def _emulated(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator in fp32 and round its results to the type of its first half-precision argument."""
    narrow = [t.dtype for t in pytree.tree_leaves((args, kwargs)) if _is_half(t)]
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.float() if _is_half(t) else t, (args, kwargs))
    results = target(*args, **kwargs)
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(narrow[0]) if t.dtype == torch.float32 else t, results)


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in _HALVES
