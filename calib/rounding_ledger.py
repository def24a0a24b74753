"""Keeps sums of errors on their device until the end of a sweep: the host waits for a GPU once, not for each sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from calibcast.calib.memory_layout import is_dense

Note = Callable[[Sequence[float]], None]


@dataclass(frozen=True)
class Error:
    """A result that rounding has changed. again: computes it once more. may_write: nobody else needs `made`, so its
    memory may be overwritten. counts: it is a result of the reader itself, and counts in `local`. coherent: it comes of
    one number that was rounded.
    """

    made: torch.Tensor
    again: Callable[[], torch.Tensor]
    may_write: bool = False
    counts: bool = True
    coherent: bool = False

    def difference(self, exact: torch.Tensor) -> torch.Tensor:
        """How far it is from the exact result. An operator may return an input or an expanded tensor."""
        shares = self.made.untyped_storage().data_ptr() == exact.untyped_storage().data_ptr()
        return self.made.sub_(exact) if self.may_write and not shares and is_dense(self.made) else self.made - exact


class Ledger:
    """Numbers that are being computed, and what is to be done with them."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor | list[float]] = []
        self._notes: list[tuple[int, int, Note]] = []

    def await_(self, sums: Sequence[torch.Tensor], note: Note) -> None:
        """Have `settle` call `note` with the values of these tensors, flat, in the order in which they were handed in.

        On the CPU they become numbers at once: small tensors between large ones would keep the heap from shrinking.
        """
        flat = [part.reshape(-1) if part.is_cuda else part.reshape(-1).tolist() for part in sums]
        self._notes.append((len(self._sums), len(self._sums) + len(flat), note))
        self._sums.extend(flat)

    def settle(self) -> None:
        """Wait for all, and note them."""
        sums, notes, self._sums, self._notes = self._sums, self._notes, [], []
        values = on_host(sums)
        for begin, end, note in notes:
            note([number for part in values[begin:end] for number in part])


def on_host(parts: Sequence[torch.Tensor | list[float]]) -> list[list[float]]:
    """The numbers of each tensor, by one copy for each device and type."""
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, torch.Tensor]]] = {}
    for i, part in enumerate(parts):
        if isinstance(part, torch.Tensor):
            kinds.setdefault((part.device, part.dtype), []).append((i, part))
    found = [[] if isinstance(part, torch.Tensor) else part for part in parts]
    for waiting in kinds.values():
        numbers, begin = torch.cat([part for _, part in waiting]).tolist(), 0
        for i, part in waiting:
            found[i] = numbers[begin : begin + part.numel()]
            begin += part.numel()
    return found


def energy(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of squares, in memory order: a copy in another order would cost more than the sum."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype in {torch.float16, torch.bfloat16}:  # from the user's autocast region: squares would overflow
        tensor = tensor.float()
    if not tensor.is_contiguous() and is_dense(tensor):
        tensor = tensor.as_strided((tensor.numel(),), (1,))
    flat = tensor.reshape(-1)
    return torch.dot(flat, flat)


def noise_energy(product: torch.Tensor, coherent: bool) -> torch.Tensor:
    """The noise at the outputs, estimated from the products of errors and gradients, element by element.

    coherent: all errors come from one number, such as the base of a power, and add up instead of averaging out. The
    square of their sum is then the estimate: over all elements, or over each slice of the first dimension, as those of
    a batch do not meet. With one draw it may be too small by chance, so it is never less than the sum of squares.
    """
    apart = energy(product)
    if not coherent or product.is_complex() or not product.ndim:
        return apart
    slices = product.flatten(1).sum(1) if product.ndim > 1 else product
    return torch.stack([apart, slices.sum().square(), slices.square().sum()]).max()


def parts_of(energies: Sequence[float]) -> list[float]:
    """Each energy as a share of their sum; equal shares where the sum is 0 or not finite."""
    total = sum(energies)
    return [part / total if 0 < total < math.inf else 1 / len(energies) for part in energies]
