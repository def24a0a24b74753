"""What rounding did to a tensor, in one kernel instead of four: sums over its errors, with or without a gradient.

Imports Triton, so import it only where a GPU is. Each program writes its sums to its own place, and the places are
added up at the end of a sweep (`calib.rounding_sums`), so the results are the same in each run.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Triton would otherwise compile another kernel where a size or row is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["size", "row"])
def sum_errors(
    made_ptr,
    exact_ptr,
    grad_ptr,
    sums_ptr,  # float64 [rows, PLACES, 3]: sums of squares, sums of squares times the gradient's, how many were lost
    size,
    row,
    EXACT: tl.constexpr,  # False: `made` itself is summed, and what is not finite is counted
    GRAD: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over `size` elements. Program `p` of `n` takes the blocks p, p + n, .. and writes its own place.

    Elements that are not finite in `exact` are left out; those that are lost, which only `made` has not finite, are
    left out as well and counted. Sums are in float64, in which no square of an fp32 value overflows.
    """
    lanes = tl.arange(0, BLOCK)
    energy, noise = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    lost = tl.zeros([BLOCK], tl.int32)
    infinity = float("inf")
    for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at = block * BLOCK + lanes.to(tl.int64)
        inside = at < size
        made = tl.load(made_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sound = inside
        exact = tl.zeros([BLOCK], tl.float32)
        if EXACT:
            exact = tl.load(exact_ptr + at, mask=inside, other=0.0).to(tl.float32)
            sound = sound & (tl.abs(exact) < infinity)
        finite = tl.abs(made) < infinity
        lost += (sound & (finite == 0)).to(tl.int32)
        error = tl.where(sound & finite, made - exact, 0.0).to(tl.float64)
        energy += error * error
        if GRAD:
            product = error * tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float64)
            noise += product * product
    place = sums_ptr + (row.to(tl.int64) * PLACES + tl.program_id(0)) * 3
    tl.store(place, tl.sum(energy, 0))
    tl.store(place + 1, tl.sum(noise, 0))
    tl.store(place + 2, tl.sum(lost, 0).to(tl.float64))
