"""Sums over errors, kept on their device until the end of a sweep: one wait for all, where a GPU would wait at each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from calibcast.calib.kernel import is_dense

Note = Callable[[Sequence[float]], None]


@dataclass(frozen=True)
class Error:
    """A result that rounding has changed. again: the same once more. may_write: nobody else needs `made`, whose memory
    may be used. counts: it is of the reader itself, so that its own signal to noise is of interest.
    """

    made: torch.Tensor
    again: Callable[[], torch.Tensor]
    may_write: bool = False
    counts: bool = True

    def difference(self, exact: torch.Tensor) -> torch.Tensor:
        """How far it is from the exact result. An operator may give an input back, or an expanded result."""
        shares = self.made.untyped_storage().data_ptr() == exact.untyped_storage().data_ptr()
        return self.made.sub_(exact) if self.may_write and not shares and is_dense(self.made) else self.made - exact


class Ledger:
    """Numbers that are being computed, and what is to be done with them."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor | list[float]] = []
        self._notes: list[tuple[int, int, Note]] = []

    def await_(self, sums: Sequence[torch.Tensor], note: Note) -> None:
        """Call `note` with the values of these tensors, flat, when they are asked for; in the order of the calls.

        On the CPU they are numbers at once: small tensors that lie between large ones keep the heap from shrinking.
        """
        flat = [part.reshape(-1) if part.is_cuda else part.reshape(-1).tolist() for part in sums]
        self._notes.append((len(self._sums), len(self._sums) + len(flat), note))
        self._sums.extend(flat)

    def settle(self) -> None:
        """Wait for all, and note them."""
        sums, notes, self._sums, self._notes = self._sums, self._notes, [], []
        values = _on_host(sums)
        for begin, end, note in notes:
            note([number for part in values[begin:end] for number in part])


def _on_host(parts: Sequence[torch.Tensor | list[float]]) -> list[list[float]]:
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
    """Sum of squares, in the order in which the elements lie in memory: a copy in another order costs more than it."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype in {torch.float16, torch.bfloat16}:  # of a region of the user's own: squares would overflow
        tensor = tensor.float()
    if not tensor.is_contiguous() and is_dense(tensor):
        tensor = tensor.as_strided((tensor.numel(),), (1,))
    flat = tensor.reshape(-1)
    return torch.dot(flat, flat)


def parts_of(energies: Sequence[float]) -> list[float]:
    """What part of their sum each is; all alike where that says nothing."""
    total = sum(energies)
    return [part / total if 0 < total < math.inf else 1 / len(energies) for part in energies]
