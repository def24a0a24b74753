"""Operators that no target runs in half precision: the same list everywhere, since no plan may depend on a machine.

Measured over 108 operators of 66 architectures. Factorisations, transforms and the special functions have no half
kernels, and quantised tensors are made from fp32 alone. `linalg_vector_norm` is an ordinary reduction, `linalg_cross`
products and differences of elements, and some special functions are aliases of ordinary ones.
"""

from __future__ import annotations

from calibcast.calib.operators.operator import Operator, alike

NEVER_LOW_PREFIXES = ("linalg_", "_linalg_", "fft_", "_fft_", "special_")
NEVER: tuple[Operator, ...] = alike(
    """
    cdist _cdist_forward pdist cholesky cholesky_solve cholesky_inverse ctc_loss _ctc_loss det logdet slogdet inverse
    lu_solve lu_unpack matrix_exp nanquantile quantile qr ormqr orgqr geqrf stft istft svd trapezoid
    triangular_solve bincount histc histogram
    quantize_per_tensor quantize_per_channel quantize_per_tensor_dynamic dequantize int_repr
    """,
    never_low=True,
)
