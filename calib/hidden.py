"""How large the sums get that an operator forms inside and no tensor shows: of norms, means, sums, attention.

Measured along the reduced dimensions, because bounds from peaks alone (n times the square of the peak) are a hundred
times too wide for a layer norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from calib.graph import argument_of, as_list, base_op
from calib.kernel import pieces
from calib.operators import ATTENTION, SQUARES, SUMS

# Elements of scratch at a time: squares of a large activation would double the memory that a forward pass needs.
_STEP = 1 << 21
_LAYER_NORMS = frozenset({"layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"})
_UNCENTRED = frozenset({"rms_norm", "_fused_rms_norm", "norm", "linalg_vector_norm"})
_GROUPS_AT = {"group_norm": 1, "native_group_norm": 6}


def hidden_values(node: fx.Node, arguments: Mapping[fx.Node, Any]) -> torch.Tensor | None:
    """What `node` has just formed inside: float64 [2], on the tensor's device; None for an operator that hides nothing.

    The first is the largest magnitude: of sums (and of means, before the division) the largest sum of |x| along the
    reduced dimensions; of norms and variances the largest sum of squares; of attention the largest logit that the
    lengths of queries and keys allow, before scaling (Cauchy-Schwarz). The second is the least mean square deviation
    of a slice (of an RMS norm the mean square), by whose root a norm divides; inf for what is no norm.
    """
    base = base_op(node.target)
    measure = _measure_of(base)
    if measure is None:
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: arguments.get(n))
    x = args[0] if args else None
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or not x.numel():
        return None
    return measure(node, base, args, kwargs)


def reduced_dimensions(node: fx.Node, base: str, rank: int) -> list[int]:
    """The dimensions of its first argument that the operator sums over, counted from 0, of a tensor of `rank`.

    Of a group norm, those of its input with the channels split into [groups, channels per group].
    """
    if base in _LAYER_NORMS:
        normalized = node.args[1] if len(node.args) > 1 else [None]
        return list(range(rank - len(as_list(normalized)), rank))
    if base in _GROUPS_AT:
        return list(range(2, rank + 1))
    if base == "instance_norm":
        return list(range(2, rank))
    chosen = argument_of(node, "dim")
    dimensions = [d for d in as_list(chosen) if isinstance(d, int)]
    return [d % rank for d in dimensions] if dimensions and rank else list(range(rank))


def window_size(base: str, size: list[int], shape: Sequence[int]) -> int:
    """Elements of the largest window of a pool. size: of the kernel, or of the output for an adaptive pool, one number
    for all dimensions or one for each; shape: of the input."""
    rank = int(base[-2])
    size = size * rank if len(size) == 1 else size
    if base.startswith("avg_pool"):
        return math.prod(size)
    return math.prod(_widest(whole, parts) for whole, parts in zip(shape[-rank:], size, strict=True))


def _widest(whole: int, parts: int) -> int:
    """The longest of the windows from floor(i whole / parts) to ceil((i + 1) whole / parts), which may overlap."""
    return max((-(-(i + 1) * whole // parts) - i * whole // parts for i in range(parts)), default=0)


def group_count(node: fx.Node, base: str) -> int | None:
    """Of a group norm, how many groups it has."""
    return int(node.args[_GROUPS_AT[base]]) if base in _GROUPS_AT else None  # type: ignore[arg-type]


_Measure = Callable[[fx.Node, str, tuple[Any, ...], dict[str, Any]], torch.Tensor]


def _measure_of(base: str) -> _Measure | None:
    if base in SUMS:
        return _pooled if "pool" in base else _summed
    if base in SQUARES:
        return _squared
    return _attended if base in ATTENTION else None


def _summed(node: fx.Node, base: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    x = args[0]
    sums = _sums(x, reduced_dimensions(node, base, x.dim()), torch.abs)
    return _pair(sums.amax())


def _pooled(node: fx.Node, base: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The operator itself gives the means of |x|; times the elements of a window, they are its sums."""
    x = args[0]
    pieces = _pieces(x, list(range(1, x.dim())))
    means = torch.stack([node.target(p.abs().float(), *args[1:], **kwargs).amax() for p in pieces])  # type: ignore[operator]
    return _pair(means.amax() * window_size(base, as_list(args[1]), x.shape))


def _squared(node: fx.Node, base: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    x = args[0]
    dimensions = reduced_dimensions(node, base, x.dim())
    groups = group_count(node, base)
    if groups is not None:
        x = x.unflatten(1, (groups, -1))
    terms = max(1, math.prod(x.shape[d] for d in dimensions))
    squares = _sums(x, dimensions, torch.square)
    spread = squares.double() / terms
    if base not in _UNCENTRED:
        spread = spread - (_sums(x, dimensions, None).double() / terms).square()
    return _pair(squares.amax(), spread.amin().clamp_min(0))


def _attended(node: fx.Node, base: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """|q . k| is at most |q| |k|."""
    query, key = (_sums(x, [x.dim() - 1], torch.square).amax().double() for x in args[:2])
    return _pair((query * key).sqrt())


def _pair(largest: torch.Tensor, least: torch.Tensor | None = None) -> torch.Tensor:
    # What is not a number bounds nothing.
    largest = torch.nan_to_num(largest.double(), nan=math.inf, posinf=math.inf)
    least = torch.full_like(largest, math.inf) if least is None else torch.nan_to_num(least.double(), nan=0.0)
    return torch.stack([largest, least])


def _sums(x: torch.Tensor, dimensions: list[int], of: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
    """The sums of `of(x)` along `dimensions`, in some order, in fp32 at least."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def total(piece: torch.Tensor, along: list[int]) -> torch.Tensor:
        values = piece if of is None else of(piece)
        return (values.sum(along, dtype=wide) if along else values).reshape(-1)

    if len(dimensions) == x.dim():
        return torch.stack([total(piece, [0]) for piece in pieces(x, _STEP)]).sum(0, keepdim=True)
    return torch.cat([total(piece, dimensions) for piece in _pieces(x, dimensions)])


def _pieces(x: torch.Tensor, reduced: list[int]) -> tuple[torch.Tensor, ...]:
    """Parts of `x` along its widest dimension that is not reduced, each of about `_STEP` elements."""
    if x.numel() <= _STEP:
        return (x,)
    widest = max((d for d in range(x.dim()) if d not in reduced), key=x.size)
    return torch.split(x, max(1, x.size(widest) * _STEP // x.numel()), widest)
