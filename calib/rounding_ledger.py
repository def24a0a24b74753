"""Keeps sums of errors on their device until the end of a sweep: the host waits for a GPU once, not for each sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from calibcast.calib.memory_layout import is_dense
from calibcast.calib.rounding_sums import NUMBERS, ErrorSums, Row

Note = Callable[[Sequence[float]], None]
Sum = torch.Tensor | Row


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

    def __init__(self, waits: bool = False) -> None:
        """waits: numbers stay on their device until they are settled, on a host as well."""
        self._waits = waits
        self._sums: list[torch.Tensor | list[float] | Row] = []
        self._notes: list[tuple[int, int, Note]] = []
        self._errors: dict[torch.device, ErrorSums] = {}
        self._gathered: Gathered | None = None

    def errors(self, made: torch.Tensor, exact: torch.Tensor | None, grad: torch.Tensor | None) -> Row | None:
        """Begin the three sums of `ErrorSums`, by one kernel; None on a host, and for tensors that it does not take."""
        if not made.is_cuda:
            return None
        if made.device not in self._errors:
            self._errors[made.device] = ErrorSums(made.device)
        return self._errors[made.device].of(made, exact, grad)

    def await_(self, sums: Sequence[Sum], note: Note) -> None:
        """Have `settle` call `note` with the values of these tensors, flat, in the order in which they were handed in.

        On the CPU they become numbers at once: small tensors between large ones would keep the heap from shrinking.
        """
        flat = [self._kept(part) for part in sums]
        self._notes.append((len(self._sums), len(self._sums) + len(flat), note))
        self._sums.extend(flat)

    def _kept(self, part: Sum) -> torch.Tensor | list[float] | Row:
        if not isinstance(part, torch.Tensor):
            return part
        return part.reshape(-1) if part.is_cuda or self._waits else part.reshape(-1).tolist()

    def gather(self) -> None:
        """Bring all numbers together on their devices, for `settle`. Nothing more is to be awaited then, and `settle`
        may be called again when the device has computed them anew.
        """
        self._gathered = Gathered.of(self._sums, self._errors)

    def settle(self) -> None:
        """Wait for all, and note them."""
        gathered = self._gathered or Gathered.of(self._sums, self._errors)
        values, notes = gathered.numbers(), self._notes
        if self._gathered is None:
            self._sums, self._notes, self._errors = [], [], {}
        for begin, end, note in notes:
            note([number for part in values[begin:end] for number in part])


@dataclass(frozen=True)
class Gathered:
    """Numbers on their way to the host, in one tensor for each device and type.

    counts: of each part's numbers. known: those that are on the host already, by part. places: for each tensor, the
    parts in it, each with the index of its first number.
    """

    counts: Sequence[int]
    known: Mapping[int, list[float]]
    places: Sequence[tuple[torch.Tensor, Sequence[tuple[int, int]]]]

    @classmethod
    def of(
        cls, parts: Sequence[torch.Tensor | list[float] | Row], errors: Mapping[torch.device, ErrorSums] = {}
    ) -> Gathered:
        """Without waiting for a device."""
        kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, torch.Tensor]]] = {}
        rows: dict[torch.device, list[tuple[int, int]]] = {}
        known: dict[int, list[float]] = {}
        for i, part in enumerate(parts):
            if isinstance(part, torch.Tensor):
                kinds.setdefault((part.device, part.dtype), []).append((i, part))
            elif isinstance(part, Row):
                rows.setdefault(part.device, []).append((i, NUMBERS * part.place))
            else:
                known[i] = part
        places = [_joined(waiting) for waiting in kinds.values()]
        places += [(errors[device].added_up(), found) for device, found in rows.items()]
        counts = [NUMBERS if isinstance(p, Row) else len(p) if isinstance(p, list) else p.numel() for p in parts]
        return cls(counts, known, places)

    def numbers(self) -> list[list[float]]:
        """The numbers of each part. Waits once for each tensor."""
        found = [self.known.get(i, []) for i in range(len(self.counts))]
        for tensor, places in self.places:
            numbers = tensor.tolist()
            for i, begin in places:
                found[i] = numbers[begin : begin + self.counts[i]]
        return found


def _joined(waiting: Sequence[tuple[int, torch.Tensor]]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Tensors in one, and where each begins in it."""
    begin, places = 0, []
    for i, part in waiting:
        places.append((i, begin))
        begin += part.numel()
    return torch.cat([part.reshape(-1) for _, part in waiting]), places


def on_host(parts: Sequence[torch.Tensor | list[float]]) -> list[list[float]]:
    """The numbers of each tensor, by one copy for each device and type."""
    return Gathered.of(parts).numbers()


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
