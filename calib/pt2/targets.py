"""Which functions the nodes of a program may call. torch resolves a name such as `torch.os.system`, too."""

from __future__ import annotations

import re
from typing import Any

from calibcast.calib.pt2.refusal import RefusedError, shown

_OPERATOR = re.compile(r"torch\.ops\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)(?:\.([A-Za-z_]\w*))?")
# Arithmetic of sizes: what torch._export.serde.serialize._SYM_OPS lists, and its other names in torch 2.11 to 2.14.
_SIZE_ARITHMETIC = frozenset(
    f"_operator.{name}"
    for name in (
        "eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv", "mod", "pow", "truediv",
        "and_", "or_", "lshift", "rshift", "getitem", "not_", "xor", "invert", "abs",
    )
) | {"math.trunc", "math.floor", "math.ceil"} | {
    f"torch.{module}{name}"
    for module in ("", "fx.experimental.sym_node.")
    for name in (
        "sym_not", "sym_int", "sym_float", "sym_ite", "sym_max", "sym_min", "sym_sqrt", "sym_sum", "sym_fresh_size",
        "_sym_sqrt", "_sym_log2", "_sym_exp",
    )
}  # fmt: skip
# Markers of regions that torch.vmap and forward-mode derivatives leave in a program.
_MARKERS = frozenset(
    f"torch._functorch.predispatch.{name}"
    for name in (
        "_add_batch_dim", "_remove_batch_dim", "_vmap_increment_nesting", "_vmap_decrement_nesting",
        "lazy_load_decompositions", "_make_dual", "_unpack_dual", "_jvp_increment_nesting", "_jvp_decrement_nesting",
        "_unwrap_for_grad", "_enter_dual_level", "_exit_dual_level",
    )
) | {"torch._C._set_grad_enabled"}  # fmt: skip
_CONTROL_FLOW = frozenset(
    (
        "cond", "switch", "while_loop", "while_loop_stack_output", "scan", "associative_scan", "map", "map_impl",
        "wrap", "wrap_with_autocast", "wrap_with_set_grad_enabled", "wrap_activation_checkpoint",
        "tag_activation_checkpoint", "strict_mode", "hints_wrapper", "out_dtype", "flex_attention",
        "flex_attention_backward", "invoke_subgraph", "auto_functionalized", "auto_functionalized_v2", "with_effects",
        "run_with_rng_state", "run_and_save_rng_state", "foreach_map",
    )
)  # fmt: skip
# torch's own operators that reach beyond the tensors of a program: files, other processes, raw memory, streams.
_CLOSED = frozenset(
    (
        "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "_native", "_test", "aoti", "c10d",
        "c10d_functional", "coor", "cuda", "debug_mode_ops", "debugprims", "fsdp", "image", "inductor",
        "inductor_prims", "mempool", "onnx", "onnx_symbolic", "prim", "profiler", "static_runtime", "streams",
        "symm_mem", "tensorrt",
    )
)  # fmt: skip
_FILES = re.compile(r"file|path|url|dir\b", re.IGNORECASE)


def check_target(name: str) -> None:
    """Raise RefusedError unless a node may call `name`: an operator on tensors, control flow, or arithmetic of sizes.

    Operators that a package has registered count as its own: a program may call them.
    """
    if name in _SIZE_ARITHMETIC or name in _MARKERS:
        return
    match = _OPERATOR.fullmatch(name)
    if match is None or ("__" in (match[1][:2], match[2][:2]) and not _is_arithmetic_dunder(match[2])):
        raise RefusedError(f"a node that calls {shown(name)}, which is not an operator")
    space, operator, overload = match.groups()
    if space == "higher_order":
        if operator not in _CONTROL_FLOW or overload is not None:
            raise RefusedError(f"a node that calls {shown(name)}, which is not among the control flow that is known")
        return
    if space in _CLOSED:
        raise RefusedError(f"a node that calls {shown(name)}, which reaches beyond the tensors of the program")
    if overload is None:
        raise RefusedError(f"a node that calls {shown(name)}, an operator without its overload")
    _check_operator(name, _resolved(name, space, operator, overload))


def _is_arithmetic_dunder(name: str) -> bool:
    """`__and__`, `__lshift__` and their kind are operators of aten."""
    return re.fullmatch(r"__i?(and|or|xor|lshift|rshift)__", name) is not None


def _resolved(name: str, space: str, operator: str, overload: str) -> Any:
    import torch

    found: Any = torch.ops
    for part, kind in ((space, "_OpNamespace"), (operator, "OpOverloadPacket"), (overload, "OpOverload")):
        try:
            found = getattr(found, part)
        except (AttributeError, RuntimeError) as error:
            raise RefusedError(
                f"a node that calls {name}, which is not registered here: import the package that registers it first "
                "(with MODEL as file.py:function, that file can)"
            ) from error
        if not isinstance(found, getattr(torch._ops, kind)):
            raise RefusedError(f"a node that calls {shown(name)}, which is not an operator")
    return found


def _check_operator(name: str, operator: Any) -> None:
    for argument in operator._schema.arguments:
        if "str" in str(argument.type) and _FILES.search(argument.name):
            raise RefusedError(f"a node that calls {shown(name)}, which reads or writes files")
