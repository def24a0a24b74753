"""Which tensors hold plain numbers: dense, with memory of their own, in a type that torch can compute with.

Others pass through a program untouched. They have no range and no error, and no cast is put around them: sparse and
quantised tensors, types that torch only stores (int4, float4), wrappers of other tensors, and tensors without data.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_QUANTISED = frozenset((torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4))
# torch 2.11 to 2.14 can move and reinterpret elements of these types; it has no arithmetic, nor conversions, for them.
_STORED_ONLY = frozenset(
    getattr(torch, name)
    for name in (
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
        *("float4_e2m1fn_x2", "bits1x8", "bits2x4", "bits4x2", "bits8", "bits16", "bit"),
    )
    if hasattr(torch, name)
)
_COMPUTED = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool))
_BY_ROW = frozenset((torch.sparse_csr, torch.sparse_bsr))
_BY_COLUMN = frozenset((torch.sparse_csc, torch.sparse_bsc))


def why_not_plain(tensor: torch.Tensor) -> str | None:
    """What a tensor is instead of plain numbers (its layout, type or class); None where it is plain.

    It may be the value of a node, which is a fake tensor.
    """
    if tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.dtype in _QUANTISED or tensor.dtype in _STORED_ONLY:
        return str(tensor.dtype).removeprefix("torch.")
    if tensor.device.type == "meta":
        return "meta"
    return type(tensor).__name__ if tensor.is_nested or is_traceable_wrapper_subclass(tensor) else None


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds numbers that can be read one by one."""
    if type(tensor) is torch.Tensor and tensor.dtype in _COMPUTED and not tensor.is_meta:  # asked of every result
        return tensor.layout is torch.strided and not tensor.is_nested
    return why_not_plain(tensor) is None and not is_fake(tensor)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for one that was never made, as in a program exported under `FakeTensorMode`."""
    return isinstance(tensor, FakeTensor)


def storage_of(tensor: torch.Tensor) -> int:
    """A number that is the same for tensors which share memory."""
    return tensor.untyped_storage().data_ptr() if is_plain(tensor) else id(tensor)


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor, densely: sparse ones filled up with zeros, quantised ones as what they stand for."""
    if tensor.layout is not torch.strided:
        return tensor.to_dense()
    if tensor.dtype in _QUANTISED:
        return tensor.dequantize()
    return tensor.view(torch.uint8) if tensor.dtype in _STORED_ONLY else tensor


def plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a tensor is made of: itself, or what it holds; none where it has no data."""
    if tensor.device.type == "meta" or is_fake(tensor):
        return
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in _BY_ROW:
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in _BY_COLUMN:
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.layout is not torch.strided:  # oneDNN's
        yield tensor.to_dense()
    elif tensor.is_nested:
        yield from tensor.unbind()
    elif tensor.dtype in _QUANTISED:
        yield tensor.int_repr()
    else:
        yield tensor.view(torch.uint8) if tensor.dtype in _STORED_ONLY else tensor
