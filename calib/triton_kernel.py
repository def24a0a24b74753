"""All statistics of a GPU tensor in one pass: a Triton kernel that reads each element once.

Imports Triton, so import it only where a GPU is. It computes what `calib.kernel.measure_on_device` does with some
twenty kernels, and adds its results to one row by atomic operations, so that nothing waits and a CUDA graph can replay
it.

A minimum or maximum is kept as an integer key: the bits of an fp32 value, with those of a negative one turned round, so
that keys order as values do (IEEE 754 is sign and magnitude).
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
NEGATIVE_INFINITY = tl.constexpr(-0x00800000)  # the bits 0xFF800000 as a signed integer
LEAST, MOST = tl.constexpr(-0x80000000), tl.constexpr(0x7FFFFFFF)


# Not one kernel for each size and row that happens to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["size", "row", "mask_at_most"])  # type: ignore[untyped-decorator,unused-ignore]
def tally(  # type: ignore[no-untyped-def] # noqa: PLR0913, PLR0915 - a kernel
    x_ptr,
    keys_ptr,  # int32 [rows, 4]: least value, largest value, least nonzero magnitude, least finite mask value
    sums_ptr,  # float64 [rows, 2]: sum, sum of squares
    counts_ptr,  # int64 [rows, 5]: nan, posinf, neginf, zeros, masked
    bins_ptr,  # int64 [rows, 256]
    size,
    row,
    mask_at_most,
    MASKED: tl.constexpr,  # noqa: N803 - Triton's own style
    HISTOGRAM: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Add the statistics of `size` elements to a row. Each program takes every so manieth block."""
    stride = tl.num_programs(0) * BLOCK
    start = tl.program_id(0).to(tl.int64) * BLOCK
    low = tl.full([BLOCK], MOST, tl.int32)
    high = tl.full([BLOCK], LEAST, tl.int32)
    small = tl.full([BLOCK], MOST, tl.int32)
    mask_low = tl.full([BLOCK], MOST, tl.int32)
    total = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    nan = tl.zeros([BLOCK], tl.int32)
    posinf = tl.zeros([BLOCK], tl.int32)
    neginf = tl.zeros([BLOCK], tl.int32)
    zeros = tl.zeros([BLOCK], tl.int32)
    masked = tl.zeros([BLOCK], tl.int32)
    uncounted = tl.zeros([BLOCK], tl.int32)
    bins = tl.zeros([256], tl.int32)
    for first in range(start, size, stride):
        offsets = first + tl.arange(0, BLOCK)
        valid = offsets < size
        x = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & MAGNITUDE
        key = tl.where(bits < 0, bits ^ MAGNITUDE, bits)
        shown = valid
        if MASKED:
            hidden = valid & (x <= mask_at_most)
            shown = valid & (x > mask_at_most) | valid & (magnitude > INFINITY)
            masked += hidden.to(tl.int32)
            mask_low = tl.minimum(mask_low, tl.where(hidden & (magnitude < INFINITY), key, MOST))
        finite = shown & (magnitude < INFINITY)
        nan += (valid & (magnitude > INFINITY)).to(tl.int32)
        posinf += (valid & (bits == INFINITY)).to(tl.int32)
        neginf += (shown & (bits == NEGATIVE_INFINITY)).to(tl.int32)
        zeros += (finite & (magnitude == 0)).to(tl.int32)
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
    keys = keys_ptr + row * 4
    tl.atomic_min(keys, tl.min(low, 0))
    tl.atomic_max(keys + 1, tl.max(high, 0))
    tl.atomic_min(keys + 2, tl.min(small, 0))
    tl.atomic_add(sums_ptr + row * 2, tl.sum(total, 0))
    tl.atomic_add(sums_ptr + row * 2 + 1, tl.sum(squares, 0))
    counts = counts_ptr + row * 5
    tl.atomic_add(counts, tl.sum(nan, 0).to(tl.int64))
    tl.atomic_add(counts + 1, tl.sum(posinf, 0).to(tl.int64))
    tl.atomic_add(counts + 2, tl.sum(neginf, 0).to(tl.int64))
    tl.atomic_add(counts + 3, tl.sum(zeros, 0).to(tl.int64))
    if MASKED:
        tl.atomic_add(counts + 4, tl.sum(masked, 0).to(tl.int64))
        tl.atomic_min(keys + 3, tl.min(mask_low, 0))
    if HISTOGRAM:
        places = tl.arange(0, 256)
        bins -= tl.where(places == 0, tl.sum(uncounted, 0), 0)
        tl.atomic_add(bins_ptr + row * 256 + places, bins.to(tl.int64))
