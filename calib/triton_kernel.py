"""All statistics of a GPU tensor in one pass: a Triton kernel that reads each element once.

Imports Triton, so import it only where a GPU is. It computes what `calib.kernel.measure_on_device` does with some
twenty kernels. Each program writes what it found to a place of its own, and all rows are put together at once at the
end of a batch: atomic operations of a thousand programs on one place took longer than reading the tensor.

Arithmetic on integers, not memory, limits it, so a block of values like those of most tensors (finite, zero or between
2^-47 and 2^17) takes a short way: a quarter of the exponents to count, and nothing to tell apart. Any other block takes
the long one. Both give the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
# The biased exponents of the short way: 2^-47 is far below what fp16 holds, 2^17 above it.
FIRST, COMMON = tl.constexpr(80), tl.constexpr(64)


# Not one kernel for each size and row that happens to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["size", "row", "mask_at_most"])  # type: ignore[untyped-decorator,unused-ignore]
def tally(  # type: ignore[no-untyped-def] # noqa: PLR0913, PLR0915 - a kernel
    x_ptr,
    values_ptr,  # float32 [rows, programs, 4]: least, smallest magnitude, lowest mask value, largest
    counts_ptr,  # int32 [rows, programs, 5]: nan, posinf, neginf, zeros, masked
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
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    small = tl.full([BLOCK], MAGNITUDE, tl.int32)
    total = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    zeros = tl.zeros([BLOCK], tl.int32)
    common = tl.zeros([COMMON], tl.int32)
    bins = tl.zeros([256], tl.int32)
    nan, posinf, neginf, masked, more_zeros = 0, 0, 0, 0, 0
    mask_low = float("inf")
    for first in range(program * BLOCK, size, tl.num_programs(0) * BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        valid = offsets < size
        x = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & MAGNITUDE
        zero = magnitude == 0
        slot = (magnitude >> 23) - FIRST
        odd = ((slot < 0) | (slot >= COMMON)) & (magnitude != 0) | (offsets >= size)
        if MASKED:
            odd = odd | (x <= mask_at_most)
        wide = x.to(tl.float64)
        if tl.max(odd.to(tl.int32), 0) == 0:
            low = tl.minimum(low, x)
            high = tl.maximum(high, x)
            # Less one, both zeros are the largest integer, and the rest keep their order.
            small = tl.minimum(small, (bits - 1) & MAGNITUDE)
            total += wide
            squares += wide * wide
            zeros += zero.to(tl.int32)
            if HISTOGRAM:
                common += tl.histogram(tl.where(zero, 0, slot), COMMON)
        else:
            shown = valid
            if MASKED:
                hidden = valid & (x <= mask_at_most)
                shown = valid & ((x > mask_at_most) | (magnitude > INFINITY))
                masked += tl.sum(hidden.to(tl.int32), 0)
                lowest = tl.where(hidden & (magnitude < INFINITY), x, float("inf"))
                mask_low = tl.minimum(mask_low, tl.min(lowest, 0))
            finite = shown & (magnitude < INFINITY)
            infinite = shown & (magnitude == INFINITY)
            nan += tl.sum((valid & (magnitude > INFINITY)).to(tl.int32), 0)
            posinf += tl.sum((infinite & (bits > 0)).to(tl.int32), 0)
            neginf += tl.sum((infinite & (bits < 0)).to(tl.int32), 0)
            more_zeros += tl.sum((finite & zero).to(tl.int32), 0)
            low = tl.minimum(low, tl.where(finite, x, float("inf")))
            high = tl.maximum(high, tl.where(finite, x, float("-inf")))
            small = tl.minimum(small, tl.where(finite, (bits - 1) & MAGNITUDE, MAGNITUDE))
            kept = tl.where(finite, wide, 0.0)
            total += kept
            squares += kept * kept
            if HISTOGRAM:
                # What does not count is put into bin 0 and taken out of it.
                uncounted = tl.sum((~shown).to(tl.int32), 0)
                bins += tl.histogram(tl.where(shown, magnitude >> 23, 0), 256)
                bins -= tl.where(tl.arange(0, 256) == 0, uncounted, 0)
    place = row.to(tl.int64) * PLACES + program
    short_zeros = tl.sum(zeros, 0)
    least = tl.min(small, 0)
    smallest = tl.where(least == MAGNITUDE, INFINITY, least + 1).to(tl.float32, bitcast=True)
    values = values_ptr + place * 4
    tl.store(values, tl.min(low, 0))
    tl.store(values + 1, smallest)
    tl.store(values + 3, tl.max(high, 0))
    counts = counts_ptr + place * 5
    tl.store(counts, nan)
    tl.store(counts + 1, posinf)
    tl.store(counts + 2, neginf)
    tl.store(counts + 3, short_zeros + more_zeros)
    if MASKED:
        tl.store(values + 2, mask_low)
        tl.store(counts + 4, masked)
    tl.store(sums_ptr + place * 2, tl.sum(total, 0))
    tl.store(sums_ptr + place * 2 + 1, tl.sum(squares, 0))
    if HISTOGRAM:
        # Data has a few dozen exponents: the other bins need no atomic operation.
        found = bins_ptr + row.to(tl.int64) * 256
        places = tl.arange(0, 256)
        bins += tl.where(places == 0, short_zeros, 0)
        tl.atomic_add(found + places, bins.to(tl.int64), mask=bins != 0)
        slots = tl.arange(0, COMMON)
        common -= tl.where(slots == 0, short_zeros, 0)
        tl.atomic_add(found + FIRST + slots, common.to(tl.int64), mask=common != 0)
