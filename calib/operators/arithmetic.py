"""Operators that compute element by element, and those that make tensors."""

from __future__ import annotations

from calibcast.calib.operators.operator import CHOOSES, COMPUTES, Operator, Pole, alike, operator

_AT_FIRST, _AT_SECOND = (Pole(0),), (Pole(1),)

ARITHMETIC: tuple[Operator, ...] = (
    operator("add", literals=("other", "alpha"), masks=COMPUTES, adds=True, hands_on=True, takes_offset=True),
    operator("sub subtract", literals=("other", "alpha"), masks=COMPUTES, adds=True, hands_on=True, takes_offset=True),
    operator("rsub", literals=("other", "alpha"), masks=COMPUTES, adds=True, takes_offset=True),
    operator("mul multiply", literals=("other",), masks=COMPUTES, hands_on=True),
    operator("div divide true_divide", literals=("other",), masks=COMPUTES, poles=_AT_SECOND, hands_on=True),
    operator("floor_divide", literals=("other",), poles=_AT_SECOND, steps=True),
    operator("remainder", literals=("other",), poles=_AT_SECOND, takes_offset=True, steps=True),
    operator("fmod", literals=("other",), poles=_AT_SECOND, takes_offset=True, steps=True),
    operator("maximum", masks=COMPUTES, hands_on=True),
    operator("minimum", masks=COMPUTES, hands_on=True),
    operator("clamp clip", literals=("min", "max"), masks=COMPUTES, checks_numbers=True, hands_on=True),
    operator("clamp_min", literals=("min",), masks=COMPUTES, checks_numbers=True, hands_on=True),
    operator("clamp_max", literals=("max",), checks_numbers=True),
    operator("hardtanh", literals=("min_val", "max_val"), checks_numbers=True),
    operator("threshold", literals=("threshold", "value"), checks_numbers=True),
    operator("where", literals=("self", "other"), masks=CHOOSES),
    operator("masked_fill", literals=("value",), masks=CHOOSES, checks_numbers=True),
    operator("index_fill", literals=("value",), checks_numbers=True),
    operator("scatter", checks_numbers=True),
    operator("constant_pad_nd", literals=("value",), checks_numbers=True),
    operator("pad", literals=("value",), checks_numbers=True),
    operator("nan_to_num", literals=("nan", "posinf", "neginf")),
    operator("addcmul", literals=("value",), takes_offset=True),
    operator("addcdiv", literals=("value",), takes_offset=True),
    operator("lerp", takes_offset=True),
    operator("diff", takes_offset=True),
    operator("pow", checks_numbers=True, poles=(Pole(0, exponent=1),), hands_on=True),
    operator("relu", keeps_rounded=True),
    operator("abs absolute", keeps_rounded=True, hands_on=True),
    operator("neg negative", keeps_rounded=True, hands_on=True),
    operator("sqrt", keeps_poles=True, hands_on=True),
    operator("square", hands_on=True),
    *alike("reciprocal rsqrt log log2 log10", poles=_AT_FIRST),
    # Steps, and functions of a period: they see nothing but the difference to the last step or period.
    *alike("floor ceil round frac", takes_offset=True, steps=True),
    *alike("trunc fix sign sgn heaviside", steps=True),
    *alike("sin cos", takes_offset=True),
    # Found by comparing 400 calls with the same in fp32, rounded (torch 2.14): NaN, or reads out of bounds, on images
    # from 192 pixels on.
    *alike("grid_sampler grid_sampler_2d grid_sampler_3d", wrong_on_host=True),
    # The number that they make a tensor of.
    operator("full", literals=("fill_value",), fills=True, checks_numbers=True),
    operator("full_like", literals=("fill_value",), fills=True, checks_numbers=True),
    operator("new_full", literals=("fill_value",), fills=True, checks_numbers=True),
    operator("scalar_tensor", literals=("s",), fills=True, checks_numbers=True),
    operator("fill", literals=("value",), fills=True, checks_numbers=True, overwrites=True),
    operator("zero", overwrites=True),
    operator("arange", literals=("start", "end", "step")),
    operator("linspace", literals=("start", "end"), checks_numbers=True),
    *alike("empty empty_like empty_permuted empty_strided new_empty new_empty_strided", empties=True),
)
