"""Copies of the tensors that a program writes into, so that running it leaves the caller's alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from calibcast.calib.plain_tensors import is_plain

# Copied stretches of memory begin at multiples of this, and so of every element size: views fall on whole elements.
_ALIGN = 16
_Span = tuple[int, int, int]  # address of the storage, and the first and end byte of a tensor in it


def copies_of_written(
    tensors: Mapping[str, torch.Tensor], written: Collection[str], device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """Copies, by name, of the tensors in `written` and of all others that share memory with one of them.

    Tensors that overlapped do so in the copies, too: a write through one is seen through the other. Only the stretches
    of storage that are written are copied. device: where the copies go; None leaves each where it is.
    """
    if tensors.keys().isdisjoint(written):
        return {}
    spans = {name: span for name, tensor in tensors.items() if (span := _span(tensor)) is not None}
    copies: dict[str, torch.Tensor] = {}
    for group in _overlapping(spans):
        if group.isdisjoint(written):
            continue
        first = min(spans[name][1] for name in group) // _ALIGN * _ALIGN
        last = max(spans[name][2] for name in group)
        memory = _copied_bytes(tensors[next(iter(group))], first, last, device)
        copies |= {name: _view_like(tensors[name], memory, first) for name in group}
    # Tensors without memory to share, such as empty ones.
    return copies | {
        name: tensors[name].detach().to(device or tensors[name].device, copy=True)
        for name in written
        if name in tensors and name not in copies
    }


def _span(tensor: torch.Tensor) -> _Span | None:
    """The storage of a plain tensor, and the bytes that it covers there; None for others and for empty tensors."""
    if not is_plain(tensor) or tensor.numel() == 0:
        return None
    size = tensor.element_size()
    furthest = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * size
    return tensor.untyped_storage().data_ptr(), start, start + (int(furthest) + 1) * size


def _overlapping(spans: Mapping[str, _Span]) -> list[set[str]]:
    """The names of the tensors, in groups that share bytes."""
    groups: list[set[str]] = []
    storage, end = -1, -1
    for name in sorted(spans, key=lambda name: spans[name]):
        address, start, stop = spans[name]
        if address == storage and start < end:
            groups[-1].add(name)
            end = max(end, stop)
        else:
            groups.append({name})
            storage, end = address, stop
    return groups


def _copied_bytes(tensor: torch.Tensor, first: int, last: int, device: torch.device | None) -> torch.Tensor:
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    memory.set_(tensor.untyped_storage(), first, (last - first,), (1,))
    return memory.to(device or tensor.device, copy=True)


def _view_like(tensor: torch.Tensor, memory: torch.Tensor, first: int) -> torch.Tensor:
    view = torch.empty(0, dtype=tensor.dtype, device=memory.device)
    offset = tensor.storage_offset() - first // tensor.element_size()
    view.set_(memory.untyped_storage(), offset, tensor.shape, tensor.stride())
    return view
