"""Operators of arithmetic, and those that make tensors."""

from __future__ import annotations

from calibcast.calib.operators.operator import (
    CHOOSES,
    COMPUTES,
    SAME,
    SHARE,
    STEP,
    Operator,
    Pole,
    alike,
    operator,
)

_AT_FIRST, _AT_SECOND = (Pole(0),), (Pole(1),)

ARITHMETIC: tuple[Operator, ...] = (
    operator("add", literals=("other", "alpha"), masks=COMPUTES, adds=True, hands_on=True, takes_offset=True),
    operator(
        "sub subtract",
        subtracts=True,
        literals=("other", "alpha"),
        masks=COMPUTES,
        adds=True,
        hands_on=True,
        takes_offset=True,
    ),
    operator("rsub", subtracts=True, literals=("other", "alpha"), masks=COMPUTES, adds=True, takes_offset=True),
    operator("mul multiply", error=SHARE, literals=("other",), masks=COMPUTES, hands_on=True),
    operator(
        "div divide true_divide", error=SHARE, literals=("other",), masks=COMPUTES, poles=_AT_SECOND, hands_on=True
    ),
    operator("floor_divide", error=STEP, steps=True, literals=("other",), poles=_AT_SECOND),
    operator(
        "remainder", error=STEP, steps=True, slopes=True, literals=("other",), poles=_AT_SECOND, takes_offset=True
    ),
    operator("fmod", error=STEP, steps=True, slopes=True, literals=("other",), poles=_AT_SECOND, takes_offset=True),
    operator("maximum", error=SAME, masks=COMPUTES, hands_on=True),
    operator("minimum", error=SAME, masks=COMPUTES, hands_on=True),
    operator(
        "clamp clip",
        error=SAME,
        literals=("min", "max"),
        masks=COMPUTES,
        checks_numbers=True,
        hands_on=True,
        keeps_rounded=True,
    ),
    operator(
        "clamp_min",
        error=SAME,
        literals=("min",),
        masks=COMPUTES,
        checks_numbers=True,
        hands_on=True,
        keeps_rounded=True,
    ),
    operator("clamp_max", error=SAME, literals=("max",), checks_numbers=True, keeps_rounded=True),
    operator("hardtanh", error=SAME, literals=("min_val", "max_val"), checks_numbers=True, keeps_rounded=True),
    operator("threshold", error=SAME, literals=("threshold", "value"), checks_numbers=True),
    operator("where", error=SAME, literals=("self", "other"), masks=CHOOSES, keeps_rounded=True),
    operator("masked_fill", error=SAME, literals=("value",), masks=CHOOSES, checks_numbers=True, keeps_rounded=True),
    operator("index_fill", literals=("value",), checks_numbers=True),
    operator("scatter", checks_numbers=True),
    operator("constant_pad_nd", error=SAME, literals=("value",), checks_numbers=True, keeps_rounded=True),
    operator("pad", error=SAME, literals=("value",), checks_numbers=True, keeps_rounded=True),
    operator("nan_to_num", error=SAME, literals=("nan", "posinf", "neginf")),
    operator("addcmul", literals=("value",), takes_offset=True),
    operator("addcdiv", literals=("value",), takes_offset=True),
    operator("lerp", takes_offset=True),
    *alike("linalg_cross cross", takes_offset=True),
    operator("diff", error=SAME, takes_offset=True),
    operator("pow", powers=True, error=SHARE, checks_numbers=True, poles=(Pole(0, exponent=1),), hands_on=True),
    operator("relu", error=SAME, hands_on=True, keeps_rounded=True),
    operator("abs absolute", error=SHARE, keeps_rounded=True, hands_on=True),
    operator("neg negative", error=SHARE, keeps_rounded=True, hands_on=True),
    operator("sqrt", power=0.5, error=SHARE, keeps_poles=True, hands_on=True),
    operator("square", power=2.0, error=SHARE, hands_on=True),
    operator("reciprocal", error=SHARE, power=-1.0, poles=_AT_FIRST),
    operator("rsqrt", error=SHARE, power=-0.5, poles=_AT_FIRST),
    # Operators that make a tensor from a number.
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
