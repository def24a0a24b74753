"""Rounding to a half-precision type while computing in fp32, so that no half-precision kernel of the host is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from calibcast.calib.process_settings import HeldSetting


def rounded(tensor: torch.Tensor, low_type: torch.dtype, saturate: bool = False) -> torch.Tensor:
    """The nearest values of `low_type`, as fp32; inf beyond its range. Other types are returned unchanged.

    saturate: for a mask: values below `saturation` are first raised to it, so that none becomes -inf.
    """
    if tensor.dtype != torch.float32:
        return tensor
    kept = tensor.clamp(min=saturation(low_type)) if saturate else tensor
    return kept.to(low_type).to(torch.float32)


def rounded_otherwise(tensor: torch.Tensor, low_type: torch.dtype, saturate: bool = False) -> torch.Tensor:
    """The nearest value of `low_type` on the other side: where `rounded` goes up, this goes down.

    Both are within one step of the value. Where other noise has moved the value a little, it is rounded this way.
    """
    nearest = rounded(tensor, low_type, saturate)
    if tensor.dtype != torch.float32:
        return nearest
    step = torch.where(nearest.abs() > tensor.abs(), -1, 1).to(torch.int16)  # in the bits, of either sign
    other = (nearest.to(low_type).view(torch.int16) + step).view(low_type).to(torch.float32)
    return torch.where((nearest == tensor) | ~tensor.isfinite() | ~other.isfinite(), nearest, other)


def rounded_number(number: float, low_type: torch.dtype, saturate: bool = False) -> float:
    """`rounded` for a number in a call."""
    return float(rounded(torch.tensor(number, dtype=torch.float32), low_type, saturate))


def saturation(low_type: torch.dtype) -> float:
    """The value that lower mask values are raised to: half the lowest finite value of the low type.

    exp(-32752) is 0 for any scores, and adding scores of thousands to it still gives a finite value.
    """
    return float(torch.finfo(low_type).min) / 2


@contextmanager
def fp32_kernels() -> Iterator[None]:
    """Compute fp32 in fp32: no TF32, no bf16 inside matmul. TF32 is as coarse as fp16, and would hide its rounding.

    The flags of the process are restored, also after an error.
    """
    with _PRECISIONS.held():
        yield


def _owners() -> tuple[Any, ...]:
    """Where torch keeps its fp32 precision, per backend and operator; "ieee" is true fp32."""
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn


def _precisions() -> list[str]:
    return [owner.fp32_precision for owner in _owners()]


def _set_precisions(values: list[str]) -> None:
    for owner, value in zip(_owners(), values, strict=True):
        owner.fp32_precision = value


_PRECISIONS = HeldSetting(_precisions, _set_precisions, ["ieee"] * len(_owners()))
