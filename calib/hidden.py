"""How large the sums inside norms, means, sums and attention get. No tensor of the program shows these sums.

They are measured along the reduced dimensions: bounds from peaks alone (n times the square of the peak) are a hundred
times too wide for a layer norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from calibcast.calib.graph import argument_of, as_list, base_op
from calibcast.calib.memory_layout import memory_levels, pieces
from calibcast.calib.operators import ATTENTION, SQUARES, SUMS, operator_of
from calibcast.calib.operators.operator import GROUPS, LAST, SPATIAL, WINDOW
from torch import fx

# Elements of scratch at a time: squares of a large activation would double the memory that a forward pass needs.
_STEP = 1 << 21
# Below this share of the mean square, a spread from fp32 sums is doubtful: they are right to some 1e-6 of it.
_DOUBTFUL = 1e-4


@dataclass(frozen=True)
class SlicesInMemory:
    """Where slices lie in memory: `count` slices of `length` elements, which are `apart` elements from each other.

    Slice i begins at (i // width) * pitch + (i % width) * step.
    """

    count: int
    length: int
    apart: int
    width: int
    step: int
    pitch: int


@dataclass(frozen=True)
class Slices:
    """What an operator sums: the slices of `x` along `dimensions`.

    squares: it sums squares, else magnitudes. spread: 0 if no spread is wanted, 1 for the mean square of a slice, 2 for
    its mean square deviation.
    """

    x: torch.Tensor
    dimensions: list[int]
    squares: bool
    spread: int = 0

    def in_memory(self) -> SlicesInMemory | None:
        """Where the slices lie; None if that takes more strides than `SlicesInMemory` has."""
        shape, strides, reduced = self.x.shape, self.x.stride(), set(self.dimensions)
        inside = memory_levels((shape[d], strides[d]) for d in reduced)
        between = memory_levels((shape[d], strides[d]) for d in range(self.x.dim()) if d not in reduced)
        if len(inside) > 1 or len(between) > 2:
            return None
        (length, apart), (width, step) = inside[0], between[0]
        return SlicesInMemory(
            self.x.numel() // length, length, apart, width, step, between[1][1] if len(between) > 1 else 0
        )


def hidden_values(node: fx.Node, arguments: Mapping[fx.Node, Any]) -> torch.Tensor | None:
    """What `node` has just formed inside: float64 [2], on the tensor's device; None for an operator that hides nothing.

    The first number is the largest magnitude. For sums (and means, before the division) it is the largest sum of |x|
    along the reduced dimensions; for norms and variances the largest sum of squares; for attention the largest logit
    that the lengths of queries and keys allow, before scaling (|q . k| is at most |q| |k|: Cauchy-Schwarz). The second
    number is the least mean square deviation of a slice (for an RMS norm the least mean square). A norm divides by its
    root. For sums and attention it is inf.
    """
    base = base_op(node.target)
    if is_pool(base) and not _pools_all(node, base):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: arguments.get(n))
        pooled = bool(args) and isinstance(args[0], torch.Tensor) and _summable(args[0])
        return _pooled(node, base, args, kwargs) if pooled else None
    found = [_measured(slices) for slices in slices_of(node, arguments)]
    if len(found) == 2:
        (queries, _), (keys, _) = found
        return _pair((queries.double() * keys.double()).sqrt())
    return _pair(*found[0]) if found else None


def slices_of(node: fx.Node, arguments: Mapping[fx.Node, Any]) -> tuple[Slices, ...]:
    """What `node` sums inside: for attention queries and keys, for other operators one tensor; else ()."""
    base = base_op(node.target)
    sums = base in SUMS and (not is_pool(base) or _pools_all(node, base))
    summed = 2 if base in ATTENTION else int(base in SQUARES or sums)
    found = [arguments.get(n) if isinstance(n, fx.Node) else None for n in node.args[:summed]]
    tensors = [x for x in found if isinstance(x, torch.Tensor) and _summable(x)]
    if not tensors or len(tensors) < len(found):
        return ()
    if base in ATTENTION:
        return tuple(Slices(x, [x.dim() - 1], True) for x in tensors)
    x = tensors[0]
    if sums:
        return (Slices(x, reduced_dimensions(node, base, x.dim()), False),)
    dimensions = reduced_dimensions(node, base, x.dim())
    groups = group_count(node, base)
    if groups is not None:
        x = torch.unflatten(x, 1, (groups, -1))
    return (Slices(x, dimensions, True, 2 if operator_of(base).centred else 1),)


def is_pool(base: str) -> bool:
    """Whether an operator sums over windows."""
    return operator_of(base).along == WINDOW


def _pools_all(node: fx.Node, base: str) -> bool:
    """Whether it is a pool with one window, whose size is that of its input."""
    return operator_of(base).adaptive and all(size == 1 for size in as_list(node.args[1]))


def _summable(x: torch.Tensor) -> bool:
    return x.is_floating_point() and x.numel() > 0


def reduced_dimensions(node: fx.Node, base: str, rank: int) -> list[int]:
    """The dimensions of its first argument, a tensor of `rank`, that the operator sums over, counted from 0.

    For a group norm: the dimensions of its input with the channels split into [groups, channels per group].
    """
    known = operator_of(base)
    if known.along == LAST:
        normalized = node.args[1] if len(node.args) > 1 else [None]
        return list(range(rank - len(as_list(normalized)), rank))
    if known.along == GROUPS:
        return list(range(2, rank + 1))
    if known.along == SPATIAL:
        return list(range(2, rank))
    if known.along == WINDOW:
        return list(range(rank - known.window, rank))
    chosen = argument_of(node, "dim")
    dimensions = [d for d in as_list(chosen) if isinstance(d, int)]
    return [d % rank for d in dimensions] if dimensions and rank else list(range(rank))


def window_size(base: str, size: list[int], shape: Sequence[int]) -> int:
    """Elements of the largest window of a pool. size: of the kernel, or of the output for an adaptive pool, one number
    for all dimensions or one for each; shape: of the input."""
    rank = operator_of(base).window
    size = size * rank if len(size) == 1 else size
    if not operator_of(base).adaptive:
        return math.prod(size)
    return math.prod(_widest(whole, parts) for whole, parts in zip(shape[-rank:], size, strict=True))


def _widest(whole: int, parts: int) -> int:
    """The longest of the windows from floor(i whole / parts) to ceil((i + 1) whole / parts), which may overlap."""
    return max((-(-(i + 1) * whole // parts) - i * whole // parts for i in range(parts)), default=0)


def group_count(node: fx.Node, base: str) -> int | None:
    """The number of groups of a group norm; None for another operator."""
    place = operator_of(base).groups_at
    return None if place is None else int(node.args[place])  # type: ignore[arg-type]


def _pooled(node: fx.Node, base: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The largest sum of |x| over a window: the operator itself gives the means, times the elements of a window."""
    x = args[0]
    pieces = _pieces(x, list(range(1, x.dim())))
    means = torch.stack([node.target(p.abs().float(), *args[1:], **kwargs).amax() for p in pieces])  # type: ignore[operator]
    return _pair(means.amax() * window_size(base, as_list(args[1]), x.shape))


def _measured(slices: Slices) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The largest sum, and the least spread."""
    x, dimensions = slices.x, slices.dimensions
    sums = _sums(x, dimensions, torch.square if slices.squares else torch.abs)
    if not slices.spread:
        return sums.amax(), None
    terms = max(1, math.prod(x.shape[d] for d in dimensions))
    mean_squares = sums.double() / terms
    if slices.spread == 1:
        return sums.amax(), mean_squares.amin()
    if x.device.type == "cpu":  # reading is free here; far from zero, the difference is only rounding error
        spread = mean_squares - (_sums(x, dimensions, None).double() / terms).square()
        if bool((spread >= _DOUBTFUL * mean_squares).all()):
            return sums.amax(), spread.amin()
    return sums.amax(), _variances(x, dimensions).amin()


def _pair(largest: torch.Tensor, least: torch.Tensor | None = None) -> torch.Tensor:
    # NaN gives no bound: the largest becomes inf, the least 0.
    largest = torch.nan_to_num(largest.double(), nan=math.inf, posinf=math.inf)
    least = torch.full_like(largest, math.inf) if least is None else torch.nan_to_num(least.double(), 0.0, math.inf)
    return torch.stack([largest, least])


def _sums(x: torch.Tensor, dimensions: list[int], of: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
    """The sums of `of(x)` along `dimensions`, in some order, in fp32 at least."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def total(piece: torch.Tensor, along: list[int]) -> torch.Tensor:
        values = piece if of is None else of(piece.to(wide))
        return (values.sum(along, dtype=wide) if along else values).reshape(-1)

    if len(dimensions) == x.dim():
        return torch.stack([total(piece, [0]) for piece in pieces(x, _STEP)]).sum(0, keepdim=True)
    return torch.cat([total(piece, dimensions) for piece in _pieces(x, dimensions)])


def _variances(x: torch.Tensor, dimensions: list[int]) -> torch.Tensor:
    """Mean square deviations of the slices along `dimensions`, in some order: slower than `_sums`, but exact."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = (x,) if len(dimensions) == x.dim() else _pieces(x, dimensions)
    return torch.cat([part.to(wide).var(dimensions, correction=0).reshape(-1).double() for part in parts])


def _pieces(x: torch.Tensor, reduced: list[int]) -> tuple[torch.Tensor, ...]:
    """Parts of `x` along its widest dimension that is not reduced, each of about `_STEP` elements."""
    if x.numel() <= _STEP:
        return (x,)
    widest = max((d for d in range(x.dim()) if d not in reduced), key=x.size)
    return torch.split(x, max(1, x.size(widest) * _STEP // x.numel()), widest)
