"""How the elements of a tensor lie in memory: without gaps or with, repeated or not, and how to read them in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch


def without_repeats(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Undo `expand`: the distinct elements, and how often each is repeated."""
    times = 1
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
            times *= size
    # A lazily negated view (`x.conj().imag`) has other bits than its values.
    return tensor.detach().resolve_neg(), times


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order: contiguous, channels-last, permuted."""
    if tensor.is_contiguous():
        return True
    return memory_levels(zip(tensor.shape, tensor.stride(), strict=True)) == [(tensor.numel(), 1)]


def memory_levels(dimensions: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions, the innermost first, joined where they form one run of equal steps."""
    levels: list[tuple[int, int]] = []
    for size, stride in sorted(dimensions, key=lambda dimension: dimension[1]):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    return levels or [(1, 1)]


def pieces(tensor: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """Flat pieces of at most `limit` elements, in any order, copied only where memory has gaps."""
    if tensor.numel() == 0:
        return
    if is_dense(tensor):
        yield from torch.split(tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()), limit)
    elif tensor.numel() <= limit:
        yield tensor.reshape(-1)
    else:
        widest = max(range(tensor.dim()), key=tensor.size)
        rows = max(1, tensor.size(widest) * limit // tensor.numel())
        for part in torch.split(tensor, rows, widest):
            yield from pieces(part, limit)
