"""A call of every operator in the table of exponents, on two weights of 8 by 8: for the laws of each row alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F  # noqa: N812

Call = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
aten = torch.ops.aten
_INDEX = torch.tensor([[0, 2, 1, 3, 5, 4, 7, 6]] * 8)
_PLACES = torch.tensor([1, 4])


def _positive(a: torch.Tensor) -> torch.Tensor:
    return a.abs() + 1


def _mask(b: torch.Tensor) -> torch.Tensor:
    return b > 0


def _spread(a: torch.Tensor, dimensions: int) -> torch.Tensor:
    """[1, 8, 8, 1, ..]: a batch of eight channels."""
    return a.reshape(1, 8, 8, *[1] * (dimensions - 1))


def _square(a: torch.Tensor, dimensions: int) -> torch.Tensor:
    """[1, 1, 8, 8] or [1, 1, 4, 4, 4]: one channel with so many dimensions."""
    return a.reshape({1: (1, 8, 8), 2: (1, 1, 8, 8), 3: (1, 1, 4, 4, 4)}[dimensions])


def _conv(name: str, dimensions: int) -> Call:
    return lambda a, b: getattr(aten, name)(_spread(a, dimensions), b.reshape(8, 8, *[1] * dimensions), b[:, 0])


def _pool(name: str, dimensions: int, *arguments: object) -> Call:
    return lambda a, b: _first(getattr(aten, name)(_square(a, dimensions), *arguments))


def _first(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def _resized(mode: str, dimensions: int) -> Call:
    smooth = {} if mode == "nearest" else {"align_corners": False}
    return lambda a, b: F.interpolate(_square(a, dimensions), scale_factor=2.0, mode=mode, **smooth)


def _padded(name: str, dimensions: int) -> Call:
    return lambda a, b: getattr(aten, name)(_square(a, dimensions), [1] * (2 * dimensions))


CALLS: dict[str, Call] = {
    **{name: (lambda a, b, name=name: getattr(aten, name)(a)) for name in (
        "relu", "neg", "abs", "positive", "leaky_relu", "square")},
    **{name: (lambda a, b, name=name: getattr(aten, name)(a, 0.5, False)) for name in (
        "dropout", "feature_dropout", "alpha_dropout")},
    **{name: (lambda a, b, name=name: getattr(aten, name)(a)) for name in ("mean", "sum", "median", "std", "var")},
    **{name: (lambda a, b, name=name: getattr(aten, name)(a, [1])) for name in ("amax", "amin")},
    **{name: (lambda a, b, name=name: _first(getattr(aten, name)(a, 1))) for name in ("max", "min", "sort")},
    **{name: (lambda a, b, name=name: getattr(aten, name)(a, b)) for name in (
        "maximum", "minimum", "fmax", "fmin", "matmul", "mm")},
    "cumsum": lambda a, b: aten.cumsum(a, 1),
    "topk": lambda a, b: a.topk(2)[0],
    "kthvalue": lambda a, b: aten.kthvalue(a, 3)[0],
    **{name: (lambda a, b, name=name: getattr(aten, name)(a, 1) * b[0] + a[0]) for name in ("argmax", "argmin")},
    "argsort": lambda a, b: aten.argsort(a)[0] * b[0] + a[0],
    "add": lambda a, b: (a + 0.5) + b,
    "sub": lambda a, b: (a - 0.5) - b,
    "rsub": lambda a, b: aten.rsub(a, 0.5) + b,
    "_add_relu": lambda a, b: aten._add_relu(a, b),
    **{name: (lambda a, b, name=name: torch.where(getattr(aten, name)(a, 0.25), b, b * 2)) for name in (
        "lt", "le", "gt", "ge")},
    **{name: (lambda a, b, name=name: torch.where(getattr(aten, name)(a, a * 1.0), b, b * 2)) for name in ("eq", "ne")},
    "clamp": lambda a, b: a.clamp(-0.5, 0.75),
    "clamp_min": lambda a, b: aten.clamp_min(a, 0.25),
    "clamp_max": lambda a, b: aten.clamp_max(a, 0.25),
    "hardtanh": lambda a, b: aten.hardtanh(a, -0.5, 0.75),
    "threshold": lambda a, b: aten.threshold(a, 0.25, 0.5),
    "where": lambda a, b: torch.where(a > 0.25, b, a),
    "masked_fill": lambda a, b: a.masked_fill(_mask(b), 0.5),
    "masked_scatter": lambda a, b: aten.masked_scatter(a, _mask(b), b),
    "index_fill": lambda a, b: aten.index_fill(a, 0, _PLACES, 0.5),
    "index_put": lambda a, b: aten.index_put(a, [_PLACES], b[:2]),
    "index": lambda a, b: aten.index(a, [_PLACES]),
    "slice_scatter": lambda a, b: aten.slice_scatter(a, b[:2], 0, 0, 2),
    "select_scatter": lambda a, b: aten.select_scatter(a, b[0], 0, 3),
    "scatter": lambda a, b: aten.scatter(a, 1, _INDEX[:, :3], 0.5) + aten.scatter(a, 1, _INDEX, b),
    "scatter_add": lambda a, b: aten.scatter_add(a, 1, _INDEX, b),
    "scatter_reduce": lambda a, b: aten.scatter_reduce(a, 1, _INDEX, b, "amax"),
    "index_add": lambda a, b: aten.index_add(a, 0, _PLACES, b[:2]),
    "index_copy": lambda a, b: aten.index_copy(a, 0, _PLACES, b[:2]),
    "constant_pad_nd": lambda a, b: aten.constant_pad_nd(a, [1, 1], 0.5),
    "pad": lambda a, b: aten.pad(a, [1, 1], "constant", 0.5),
    **{f"{kind}_pad{d}d": _padded(f"{kind}_pad{d}d", d) for kind in ("reflection", "replication") for d in (1, 2, 3)},
    **{f"max_pool{d}d": _pool(f"max_pool{d}d", d, [2] * d) for d in (1, 2, 3)},
    "max_pool2d_with_indices": _pool("max_pool2d_with_indices", 2, [2, 2]),
    **{f"adaptive_max_pool{d}d": _pool(f"adaptive_max_pool{d}d", d, [2] * d) for d in (1, 2)},
    **{f"avg_pool{d}d": _pool(f"avg_pool{d}d", d, [2] * d) for d in (1, 2, 3)},
    **{f"adaptive_avg_pool{d}d": _pool(f"adaptive_avg_pool{d}d", d, [2] * d) for d in (1, 2, 3)},
    **{f"upsample_nearest{d}d": _resized("nearest", d) for d in (1, 2, 3)},
    "upsample_linear1d": _resized("linear", 1),
    "upsample_bilinear2d": _resized("bilinear", 2),
    "upsample_bicubic2d": _resized("bicubic", 2),
    "upsample_trilinear3d": _resized("trilinear", 3),
    "pixel_shuffle": lambda a, b: aten.pixel_shuffle(a.reshape(4, 4, 4), 2),
    "pixel_unshuffle": lambda a, b: aten.pixel_unshuffle(a[None], 2),
    "im2col": lambda a, b: aten.im2col(_square(a, 2), [2, 2], [1, 1], [0, 0], [1, 1]),
    "col2im": lambda a, b: aten.col2im(a.reshape(1, 4, 16), [8, 8], [2, 2], [1, 1], [0, 0], [2, 2]),
    "norm": lambda a, b: aten.norm(a),
    "linalg_vector_norm": lambda a, b: a / aten.linalg_vector_norm(a, 2, [1], True),
    "mul": lambda a, b: (a * 3) * b,
    "div": lambda a, b: a / _positive(b),
    "bmm": lambda a, b: aten.bmm(a[None], b[None]),
    "dot": lambda a, b: aten.dot(a[0], b[0]),
    "mv": lambda a, b: aten.mv(a, b[0]),
    "einsum": lambda a, b: torch.einsum("ij,kj->ik", a, b),
    "addmm": lambda a, b: aten.addmm(a[0] * b[0], a, b),
    "addmv": lambda a, b: aten.addmv(a[0] * b[0], a, b[0]),
    "baddbmm": lambda a, b: aten.baddbmm((a * b)[None], a[None], b[None]),
    "addcmul": lambda a, b: torch.addcmul(a, a, b),
    "addcdiv": lambda a, b: torch.addcdiv(a, a, _positive(b)),
    "lerp": lambda a, b: torch.lerp(a, b, 0.25),
    "linear": lambda a, b: F.linear(a, b, b[:, 0]),
    **{f"conv{d}d": _conv(f"conv{d}d", d) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _conv(f"conv_transpose{d}d", d) for d in (1, 2, 3)},
    "convolution": lambda a, b: aten.convolution(
        _spread(a, 1), b[:, :, None], b[:, 0], [1], [0], [1], False, [0], 1
    ),
    "embedding": lambda a, b: F.embedding(_PLACES, a),
    "prelu": lambda a, b: F.prelu(a, b[0]),
    "layer_norm": lambda a, b: F.layer_norm(a, (8,), b[0], b[1]),
    "group_norm": lambda a, b: F.group_norm(a, 2, b[0], b[1]),
    "rms_norm": lambda a, b: F.rms_norm(a, (8,), b[0]),
    "native_layer_norm": lambda a, b: aten.native_layer_norm(a, [8], b[0], b[1], 1e-5)[0],
    "instance_norm": lambda a, b: F.instance_norm(a[None], weight=b[0], bias=b[1]),
    "batch_norm": lambda a, b: F.batch_norm(a, b[0].detach(), b[3].detach().square() + 1, b[1], b[2]),
    "sqrt": lambda a, b: _positive(a).sqrt(),
    "rsqrt": lambda a, b: _positive(a).rsqrt(),
    "reciprocal": lambda a, b: _positive(a).reciprocal(),
    "scaled_dot_product_attention": lambda a, b: F.scaled_dot_product_attention(a[None], b[None], (a * b)[None]),
    "full": lambda a, b: torch.full((8,), 0.5) + a,
    "full_like": lambda a, b: torch.full_like(a, 0.5) + a,
    "new_full": lambda a, b: a.new_full((8,), 0.5) + a,
    "scalar_tensor": lambda a, b: aten.scalar_tensor(0.5) + a,
    "fill": lambda a, b: aten.fill(a, 0.5) + b,
    **{name: (lambda a, b, name=name: getattr(aten, name)(a) + a) for name in ("zeros_like", "zero")},
    "zeros": lambda a, b: torch.zeros(8) + a,
    "new_zeros": lambda a, b: a.new_zeros(8) + a,
    "empty": lambda a, b: torch.zeros_like(torch.empty(8)) + a,
    "empty_like": lambda a, b: torch.zeros_like(torch.empty_like(a)) + a,
    "new_empty": lambda a, b: torch.zeros_like(a.new_empty(8)) + a,
    "empty_strided": lambda a, b: torch.zeros_like(torch.empty_strided((8,), (1,))) + a,
    "new_empty_strided": lambda a, b: torch.zeros_like(a.new_empty_strided((8,), (1,))) + a,
    "empty_permuted": lambda a, b: torch.zeros_like(torch.empty_permuted((8, 8), (1, 0))) + a,
    **{f"pow {n:g}": (lambda a, b, n=n: torch.pow(_positive(a), n)) for n in (2.0, 3.0, 1.0, 0.5, -1.0, -2.0, -0.5)},
}  # fmt: skip
