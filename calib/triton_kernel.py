"""All statistics of a GPU tensor in one pass: a Triton kernel that reads each element once.

Imports Triton, so import it only where a GPU is. It computes what `calib.kernel.measure_on_device` does with some
twenty kernels. Each program writes what it found to a place of its own, and all rows are put together at once at the
end of a batch: atomic operations on one place by a thousand programs took longer than reading the tensor.

A minimum or maximum is kept as an integer key: the bits of an fp32 value, with those of a negative one turned round, so
that keys order as values do (IEEE 754 is sign and magnitude).
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
LEAST, MOST = tl.constexpr(-0x80000000), tl.constexpr(0x7FFFFFFF)
# Two counters share an integer: a lane counts one element a step, and takes fewer than 65536 steps.
UPPER, LOWER = tl.constexpr(1 << 16), tl.constexpr((1 << 16) - 1)


# Not one kernel for each size and row that happens to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["size", "row", "mask_at_most"])  # type: ignore[untyped-decorator,unused-ignore]
def tally(  # type: ignore[no-untyped-def] # noqa: PLR0913, PLR0915 - a kernel
    x_ptr,
    integers_ptr,  # int32 [rows, programs, 9]: least, smallest, mask_min, largest as keys; nan, +inf, -inf, 0, masked
    sums_ptr,  # float64 [rows, programs, 2]: sum, sum of squares
    bins_ptr,  # int64 [rows, 256], added to
    size,
    row,
    mask_at_most,
    PLACES: tl.constexpr,  # noqa: N803 - Triton's own style
    MASKED: tl.constexpr,  # noqa: N803
    HISTOGRAM: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Statistics of `size` elements. Each program takes every so manieth block, and has one of `PLACES` places."""
    program = tl.program_id(0)
    low = tl.full([BLOCK], MOST, tl.int32)
    high = tl.full([BLOCK], LEAST, tl.int32)
    small = tl.full([BLOCK], MOST, tl.int32)
    total = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    nan_posinf = tl.zeros([BLOCK], tl.int32)
    zero_neginf = tl.zeros([BLOCK], tl.int32)
    if MASKED:
        mask_low = tl.full([BLOCK], MOST, tl.int32)
        masked = tl.zeros([BLOCK], tl.int32)
    if HISTOGRAM:
        bins = tl.zeros([256], tl.int32)
        uncounted = tl.zeros([BLOCK], tl.int32)
    for first in range(program * BLOCK, size, tl.num_programs(0) * BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        valid = offsets < size
        x = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & MAGNITUDE
        key = tl.where(bits < 0, bits ^ MAGNITUDE, bits)
        shown = valid
        if MASKED:
            hidden = valid & (x <= mask_at_most)
            shown = valid & ((x > mask_at_most) | (magnitude > INFINITY))
            masked += hidden.to(tl.int32)
            mask_low = tl.minimum(mask_low, tl.where(hidden & (magnitude < INFINITY), key, MOST))
        finite = shown & (magnitude < INFINITY)
        infinite = shown & (magnitude == INFINITY)
        nan_posinf += tl.where(magnitude > INFINITY, 1, tl.where(infinite & (bits > 0), UPPER, 0))
        zero_neginf += tl.where(finite & (magnitude == 0), 1, tl.where(infinite & (bits < 0), UPPER, 0))
        low = tl.minimum(low, tl.where(finite, key, MOST))
        high = tl.maximum(high, tl.where(finite, key, LEAST))
        small = tl.minimum(small, tl.where(finite & (magnitude > 0), magnitude, MOST))
        wide = tl.where(finite, x, 0.0).to(tl.float64)
        total += wide
        squares += wide * wide
        if HISTOGRAM:
            # What does not count is put into bin 0 and taken out of it at the end.
            bins += tl.histogram(tl.where(shown, magnitude >> 23, 0), 256)
            uncounted += (~shown).to(tl.int32)
    place = row.to(tl.int64) * PLACES + program
    integers = integers_ptr + place * 9
    tl.store(integers, tl.min(low, 0))
    tl.store(integers + 1, tl.min(small, 0))
    tl.store(integers + 3, tl.max(high, 0))
    tl.store(integers + 4, tl.sum(nan_posinf & LOWER, 0))
    tl.store(integers + 5, tl.sum(nan_posinf >> 16, 0))
    tl.store(integers + 6, tl.sum(zero_neginf >> 16, 0))
    tl.store(integers + 7, tl.sum(zero_neginf & LOWER, 0))
    if MASKED:
        tl.store(integers + 2, tl.min(mask_low, 0))
        tl.store(integers + 8, tl.sum(masked, 0))
    tl.store(sums_ptr + place * 2, tl.sum(total, 0))
    tl.store(sums_ptr + place * 2 + 1, tl.sum(squares, 0))
    if HISTOGRAM:
        places = tl.arange(0, 256)
        bins -= tl.where(places == 0, tl.sum(uncounted, 0), 0)
        # Data has a few dozen exponents: the other bins need no atomic operation.
        tl.atomic_add(bins_ptr + row * 256 + places, bins.to(tl.int64), mask=bins != 0)
