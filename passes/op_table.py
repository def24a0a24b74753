"""What ATen operators do to values. Data, with a source where it is not the operator's own definition.

Operators are named without overload and in-place mark: `add` stands for `aten.add.Tensor` and `aten.add_.Scalar`.
"""

from __future__ import annotations

from functools import cache

import torch
from calibcast.calib.operators import ATTENTION, MASKING, MOVES

# A type that the user wrote down: `.to(dtype)` and what it becomes. It keeps the type that it states.
STATED_TYPE = frozenset({"to", "_to_copy", "convert_element_type", "type_as", "_to_dtype"})

# `x.view(torch.int32)`: in another type the same bits mean another number, or another number of elements.
BITCASTS = frozenset({torch.ops.aten.view.dtype})

# Arguments that become values of a tensor, by operator. Attributes (eps of a norm, momentum) are not among them.
LITERALS: dict[str, tuple[str, ...]] = {
    "add": ("other", "alpha"),
    "sub": ("other", "alpha"),
    "rsub": ("other", "alpha"),
    "mul": ("other",),
    "div": ("other",),
    "remainder": ("other",),
    "fmod": ("other",),
    "floor_divide": ("other",),
    "clamp": ("min", "max"),
    "clip": ("min", "max"),
    "clamp_min": ("min",),
    "clamp_max": ("max",),
    "hardtanh": ("min_val", "max_val"),
    "threshold": ("threshold", "value"),
    "where": ("self", "other"),
    "masked_fill": ("value",),
    "fill": ("value",),
    "index_fill": ("value",),
    "full": ("fill_value",),
    "full_like": ("fill_value",),
    "new_full": ("fill_value",),
    "scalar_tensor": ("s",),
    "arange": ("start", "end", "step"),
    "linspace": ("start", "end"),
    "constant_pad_nd": ("value",),
    "pad": ("value",),
    "addcmul": ("value",),
    "addcdiv": ("value",),
    "addmm": ("beta", "alpha"),
    "baddbmm": ("beta", "alpha"),
    "nan_to_num": ("nan", "posinf", "neginf"),
    "maximum": ("other",),
    "minimum": ("other",),
    "eq": ("other",),
    "ne": ("other",),
    "lt": ("other",),
    "le": ("other",),
    "gt": ("other",),
    "ge": ("other",),
}

# Operators by whose small inputs, or by the root or logarithm of which, a result is blown up: op -> the argument.
MAGNIFIES: dict[str, int] = {
    "div": 1,
    "floor_divide": 1,
    "remainder": 1,
    "fmod": 1,
    "reciprocal": 0,
    "rsqrt": 0,
    "log": 0,
    "log2": 0,
    "log10": 0,
}
# Operators that hand small values on to where they are magnified.
HANDS_ON = MOVES | frozenset(
    """
    sqrt abs neg square pow add sub mul div sum mean clamp clamp_min clip maximum minimum norm linalg_vector_norm
    """.split()  # noqa: SIM905
)

# Operators that may take an offset away and leave the variation: of 400.05 and 400.10 what tells them apart. Products,
# activations and movement keep an offset; it is then judged where they are read.
TAKES_OFFSET = frozenset(
    """
    add sub rsub addcmul addcdiv lerp linear addmm conv1d conv2d conv3d convolution _convolution conv_transpose1d
    conv_transpose2d conv_transpose3d layer_norm native_layer_norm group_norm native_group_norm instance_norm batch_norm
    _native_batch_norm_legit_no_training var std var_mean std_mean softmax _softmax _safe_softmax log_softmax
    _log_softmax logsumexp eq ne lt le gt ge argmax argmin topk sort argsort floor ceil round frac remainder fmod sin
    cos diff unique searchsorted bucketize lstm gru rnn_tanh rnn_relu mse_loss l1_loss
    """.split()  # noqa: SIM905
)

# Operators with no half-precision kernels worth the name, on any backend: the same list on every machine, as a plan
# must not depend on where it was made. Measured over 108 operators of 66 architectures; `linalg_vector_norm` is an
# ordinary reduction and not among them.
NEVER_LOW_PREFIXES = ("linalg_", "_linalg_", "fft_", "_fft_", "special_")
NEVER_LOW = frozenset(
    """
    cdist _cdist_forward pdist cholesky cholesky_solve cholesky_inverse ctc_loss _ctc_loss det logdet slogdet inverse
    lstsq lu_solve lu_unpack matrix_exp nanquantile quantile qr ormqr orgqr geqrf stft istft svd symeig trapezoid
    triangular_solve eig bincount histc histogram
    """.split()  # noqa: SIM905 - a list of words reads as one
)
NEVER_LOW_EXCEPT = frozenset({"linalg_vector_norm", "special_softmax", "special_log_softmax", "special_expit"})

EPSILONS: dict[str, str] = {
    "layer_norm": "eps",
    "native_layer_norm": "eps",
    "group_norm": "eps",
    "native_group_norm": "eps",
    "rms_norm": "eps",
    "_fused_rms_norm": "eps",
    "instance_norm": "eps",
    "batch_norm": "eps",
    "_native_batch_norm_legit_no_training": "eps",
}

# Of what a mask passes through, what computes with it instead of choosing.
MASK_ARITHMETIC = MASKING - {"where", "masked_fill"}

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution", "_convolution"})
TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
PRODUCTS = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "dot", "addmv"})
RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})

# Operators that do floating-point work by `torch.utils.flop_counter`, before and after decomposition.
WORKS = CONVOLUTIONS | TRANSPOSED | PRODUCTS | RECURRENT | ATTENTION | frozenset({"einsum", "bilinear", "tensordot"})


@cache
def never_low(base: str) -> bool:
    """Whether no target runs this operator in half precision."""
    if base in NEVER_LOW_EXCEPT:
        return False
    return base in NEVER_LOW or base.startswith(NEVER_LOW_PREFIXES)
