"""Functions of one number, steps, and look-ups.

A slope counts as bounded if it is at most about 1 (`gelu` reaches 1.13). Poles are where the mathematics puts them:
where the result is unbounded, or its slope is. For example, acos is 0 at 1, and its slope is infinite there.
"""

from __future__ import annotations

import math

from calibcast.calib.operators.operator import (
    EXPONENT,
    LOGARITHM,
    SAME,
    SHARE,
    STEP,
    Operator,
    Pole,
    Training,
    alike,
    operator,
)

_AT_ONE = (Pole(0, -1.0), Pole(0, 1.0))

FUNCTIONS: tuple[Operator, ...] = (
    *alike(
        """
        tanh gelu silu elu celu selu leaky_relu prelu hardswish hardsigmoid mish softplus softshrink
        log_sigmoid log_sigmoid_forward erf erfc glu
        """,
        error=SAME,
    ),
    operator("relu6", error=SAME, keeps_rounded=True),
    operator("sigmoid special_expit", error=SAME),
    operator("rrelu", error=SAME, training=Training(flag=3)),
    operator("atan arctan", error=SAME),
    operator("asinh arcsinh", error=SAME),
    # They remove whole periods from their argument: of 500, only the rest matters.
    *alike("sin cos", error=SAME, takes_offset=True),
    operator("tan", error=EXPONENT, poles=(Pole(0, math.pi / 2), Pole(0, -math.pi / 2)), takes_offset=True),
    *alike("exp cosh sinh", error=EXPONENT),
    operator("exp2 special_exp2", error=EXPONENT),
    operator("expm1 special_expm1", error=EXPONENT),
    # log x: d(log x) = dx / x. Far from its pole, a relative error becomes an absolute error of the same size.
    *alike("log log2 log10", error=LOGARITHM, poles=(Pole(0),)),
    operator("log1p special_log1p", poles=(Pole(0, -1.0),)),
    operator("xlogy special_xlogy", poles=(Pole(1),)),
    # The host rounds 1 - eps before it clamps to it; in bfloat16 the result is 1.
    operator("logit special_logit", poles=(Pole(0), Pole(0, 1.0)), wrong_on_host=True),
    # A relative error of the vector becomes an error in radians. At an angle of pi, the sign of the first decides.
    operator("atan2 arctan2", error=LOGARITHM, angle=True),
    operator("acos arccos", poles=_AT_ONE),
    operator("asin arcsin", poles=_AT_ONE),
    operator("atanh arctanh", poles=_AT_ONE),
    operator("erfinv special_erfinv", poles=_AT_ONE),
    operator("acosh arccosh", poles=(Pole(0, 1.0),)),
    operator("lgamma special_gammaln", poles=(Pole(0), Pole(0, -1.0))),
    operator("digamma special_psi special_digamma", poles=(Pole(0), Pole(0, -1.0))),
    *alike("floor ceil round", error=STEP, steps=True, takes_offset=True),
    operator("frac", error=STEP, steps=True, slopes=True, takes_offset=True),
    operator("trunc fix", error=STEP, steps=True, takes_offset=True),
    *alike("sign sgn heaviside", steps=True),
    # Coordinates in an image: their error is a distance in pixels. The host kernels are wrong (NaN, or reads out of
    # bounds) on images from 192 pixels on: found by comparing 400 calls with the same in fp32, rounded (torch 2.14).
    *alike("grid_sampler grid_sampler_2d grid_sampler_3d", places=1, wrong_on_host=True),
    *alike(
        "embedding embedding_bag _embedding_bag index_put index_add index_copy scatter_add scatter_reduce", error=SAME
    ),
    *alike(
        """
        upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa im2col col2im adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
        max_pool2d_with_indices max_pool3d_with_indices
        """,
        error=SAME,
    ),
    *alike(
        """
        upsample_nearest1d upsample_nearest2d upsample_nearest3d reflection_pad1d reflection_pad2d reflection_pad3d
        replication_pad1d replication_pad2d replication_pad3d
        """,
        error=SAME,
        keeps_rounded=True,
    ),
    *alike("cumprod prod", error=SHARE, multiplies=True, hands_on=True),
    *alike("hardshrink cummax cummin"),
)
