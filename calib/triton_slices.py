"""Measures what an operator sums inside, on a GPU: one kernel per tensor, not about fifteen. Imports Triton.

It computes what `calib.hidden` does with `Slices`. All results are at least zero, and the order of such numbers is that
of their bits as integers. So programs combine their results with two integer atomics; float64 ones would need a loop.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["place", "slices", "length", "apart", "width", "step", "pitch"])
def sum_slices(
    x_ptr,
    found_ptr,  # int64 [places]: the bits of float64 numbers; the largest sum at `place`, the least spread behind it
    place,
    slices,  # as in `calib.hidden.SlicesInMemory`, from here
    length,
    apart,
    width,
    step,
    pitch,  # to here
    SQUARES: tl.constexpr,  # sums of squares, else of magnitudes
    SPREAD: tl.constexpr,  # 0: none is wanted; 1: mean squares; 2: mean square deviations
    ADJACENT: tl.constexpr,  # whether `apart` is 1
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # 1 where elements are not adjacent, so that threads read side by side either way
):
    """Program `p` of `n` takes the groups p, p + n, p + 2n, .. of `ROWS` slices each."""
    largest = tl.zeros([ROWS], tl.float64)
    least = tl.full([ROWS], float("inf"), tl.float64)
    columns = tl.arange(0, COLUMNS)
    if ADJACENT:
        apart = 1  # so that the compiler knows
    for group in range(tl.program_id(0), tl.cdiv(slices, ROWS), tl.num_programs(0)):
        rows = group * ROWS + tl.arange(0, ROWS)
        first = (rows // width).to(tl.int64) * pitch + (rows % width).to(tl.int64) * step
        # In float64: the variance of values far from zero is a small difference of large sums.
        sums = tl.zeros([ROWS, COLUMNS], tl.float64)
        plain = tl.zeros([ROWS, COLUMNS], tl.float64)
        for at in range(0, length, COLUMNS):
            inside = (rows < slices)[:, None] & (at + columns < length)[None, :]
            offsets = first[:, None] + (at + columns).to(tl.int64)[None, :] * apart
            x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float64)
            sums += x * x if SQUARES else tl.abs(x)
            if SPREAD == 2:
                plain += x
        total = tl.sum(sums, 1)
        # A NaN gives no bound (inf) and no deviation (0).
        largest = tl.maximum(largest, tl.where(total == total, total, float("inf")))
        if SPREAD > 0:
            spread = total / length
            if SPREAD == 2:
                mean = tl.sum(plain, 1) / length
                spread -= mean * mean
            spread = tl.where(spread > 0, spread, 0.0)
            least = tl.minimum(least, tl.where(rows < slices, spread, float("inf")))
    tl.atomic_max(found_ptr + place, tl.max(largest, 0).to(tl.int64, bitcast=True))
    if SPREAD > 0:
        tl.atomic_min(found_ptr + place + 1, tl.min(least, 0).to(tl.int64, bitcast=True))
