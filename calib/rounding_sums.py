"""Sums over the errors of a tensor on a GPU, by one kernel each, kept there until the sums of a sweep are read."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from calibcast.calib.device_observer import on
from calibcast.calib.memory_layout import is_dense

_log = logging.getLogger("calibcast")
# BLOCK: elements that a program takes at a time. PLACES: the most programs, several for each multiprocessor of a large
# GPU. A row takes 6 KB, and rows are allocated by the page.
BLOCK, PLACES, _ROWS = 1024, 256, 256
NUMBERS = 3  # of a row
_TYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
# int32 holds the number of elements.
_MOST = 1 << 31


@dataclass(frozen=True)
class Row:
    """Where the sums of one tensor will be: on which device, in which row of `ErrorSums.added_up`."""

    device: torch.device
    place: int


class ErrorSums:
    """Sums by `triton_errors.sum_errors`, on one device: a row is three numbers, as that kernel describes them."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._kernel = device, kernel_for(device)
        self._pages: list[torch.Tensor] = []
        self._used = _ROWS

    def of(self, made: torch.Tensor, exact: torch.Tensor | None, grad: torch.Tensor | None) -> Row | None:
        """Begin to sum over `made - exact`, over `made` where there is no `exact`, and over its product with `grad`.

        None where the kernel does not take these tensors: other types, layouts that differ, elements with gaps.
        """
        given = [tensor for tensor in (made, exact, grad) if tensor is not None]
        if self._kernel is None or not all(t.device == self._device and t.dtype in _TYPES for t in given):
            return None
        alike = all(t.stride() == made.stride() and t.shape == made.shape for t in given)
        if not alike or not 0 < made.numel() < _MOST or not is_dense(made) or any(t.is_neg() for t in given):
            return None
        if self._used == _ROWS:
            self._pages.append(torch.zeros(_ROWS, PLACES, NUMBERS, dtype=torch.float64, device=self._device))
            self._used = 0
        row, self._used = self._used, self._used + 1
        with on(self._device):
            _launch(self._kernel, made, exact, grad, self._pages[-1], row)
        return Row(self._device, (len(self._pages) - 1) * _ROWS + row)

    def added_up(self) -> torch.Tensor:
        """The sums of all rows so far, float64, flat, on the device."""
        return torch.cat([page.sum(1).reshape(-1) for page in self._pages])


def sums_of(made: torch.Tensor, exact: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor:
    """What a row of `ErrorSums` holds, float64 [3], by torch: for tensors that the kernel does not take."""
    sound = torch.ones_like(made, dtype=torch.bool) if exact is None else exact.isfinite()
    error = torch.where(sound & made.isfinite(), made if exact is None else made - exact, 0)
    error = error.to(torch.complex128 if error.is_complex() else torch.float64)
    noise = 0 * error if grad is None else error * grad
    return torch.stack([
        error.abs().square().sum(), noise.abs().square().sum(),
        (sound & ~made.isfinite()).sum(dtype=torch.float64),
    ])  # fmt: skip


@cache
def kernel_for(device: torch.device) -> Any:
    """The kernel, once it has been tried out on a device; None where it does not work. Not to be asked for the first
    time while work on the device is recorded.
    """
    try:
        kernel = importlib.import_module("calibcast.calib.triton_errors").sum_errors
        with on(device):
            _try_out(kernel, device)
    except Exception as error:  # Triton compiles here, with whatever compiler and driver there are
        _log.info("errors are summed by torch, which is slower: %s: %s", type(error).__name__, error)
        return None
    return kernel


def _launch(
    kernel: Any, made: torch.Tensor, exact: torch.Tensor | None, grad: torch.Tensor | None, page: torch.Tensor, row: int
) -> None:
    size = made.numel()
    kernel[(min(PLACES, -(-size // BLOCK)),)](
        made, made if exact is None else exact, made if grad is None else grad, page, size, row,
        EXACT=exact is not None, GRAD=grad is not None, PLACES=PLACES, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def _try_out(kernel: Any, device: torch.device) -> None:
    """Sum with each variant of the kernel, which compiles them. Raises RuntimeError if one is wrong."""
    made, exact, grad = (
        torch.tensor(values, device=device)
        for values in ([1.5, float("inf"), 2.0], [1.0, 1.0, float("nan")], [2.0, 2.0, 2.0])
    )
    page = torch.zeros(4, PLACES, NUMBERS, dtype=torch.float64, device=device)
    for row, given in enumerate(((exact, grad), (exact, None), (None, grad), (None, None))):
        _launch(kernel, made, *given, page, row)
    found = page.sum(1).tolist()
    if found != [[0.25, 1.0, 1.0], [0.25, 0.0, 1.0], [6.25, 25.0, 1.0], [6.25, 0.0, 1.0]]:
        raise RuntimeError(f"it sums the errors of [1.5, inf, 2] as {found}")
