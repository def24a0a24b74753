"""All statistics of a GPU tensor in one pass: a Triton kernel that reads each element once.

Imports Triton, so import it only where a GPU is. It computes what `calib.kernel.measure_on_device` does with some
twenty kernels. Each program writes its results to its own place, and the results of all rows are combined at the end of
a batch: atomic operations of a thousand programs on one place took longer than reading the tensor.

Instructions, not memory, limit its speed. So a program first reads its tiles the short way: no masks, no special cases,
no reduction over threads before the end. The result shows whether that was valid (all values finite, with exponents
that it counts). If not, the program reads its tiles again, the long way. Both ways give the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
# The biased exponents that the short way counts: from 2^-46, far below what fp16 holds, to 2^17, above it. The first
# slot is for zeros.
FIRST, COMMON = tl.constexpr(80), tl.constexpr(64)


# Triton would otherwise compile another kernel where a size or row is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["size", "row", "mask_at_most", "width", "step", "pitch"])
def tally(
    x_ptr,
    values_ptr,  # float32 [rows, programs, 4]: least, smallest magnitude, lowest mask value, largest
    counts_ptr,  # int32 [rows, programs, 5]: nan, posinf, neginf, zeros, masked
    sums_ptr,  # float64 [rows, programs, 2]: sum, sum of squares
    bins_ptr,  # int64 [rows, 256], added to
    size,
    row,
    mask_at_most,
    width,  # width, step, pitch: element i lies at (i // width) * pitch + (i % width) * step
    step,
    pitch,
    GAPS: tl.constexpr,  # 0: at i; 1: a tile's elements lie side by side, four of them aligned; 2: in any way
    PLACES: tl.constexpr,
    MASKED: tl.constexpr,
    HISTOGRAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of `size` elements. Program `p` of `n` takes tiles p, p + n, .. of four blocks, then single blocks.

    Each program writes the whole of its own place, one of `PLACES`. A block has at most 4095 elements.
    """
    tiles = 0 if MASKED else size // (4 * BLOCK)
    least, most, tiny, sum_x, sum_xx, zeros, common = _short_way(
        x_ptr, tiles, width, step, pitch, GAPS, HISTOGRAM, BLOCK
    )
    # The sum of squares is NaN or Inf only where a value is: no square of an fp32 value overflows float64.
    again = tl.where(sum_xx < float("inf"), False, True)
    if HISTOGRAM:
        again = again | (tl.maximum(most, -least) >= 2.0**17) | (tiny < ((FIRST + 1) << 23) - 1)
    least, most = tl.where(again, float("inf"), least), tl.where(again, float("-inf"), most)
    tiny, zeros = tl.where(again, MAGNITUDE, tiny), tl.where(again, 0, zeros)
    sum_x, sum_xx = tl.where(again, 0.0, sum_x), tl.where(again, 0.0, sum_xx)

    nan, posinf, neginf, masked = 0, 0, 0, 0
    mask_low = float("inf")
    bins = tl.zeros([256], tl.int32)
    left = (4 * tiles + tl.program_id(0)) * BLOCK
    if again or left < size:
        found, counted, mask_low, bins = _long_way(
            x_ptr, size, tiles, again, left, mask_at_most, width, step, pitch, GAPS, MASKED, HISTOGRAM, BLOCK
        )
        least, most, tiny, sum_x, sum_xx, zeros = _both(
            least, most, tiny, sum_x, sum_xx, zeros, found[0], found[1], found[2], found[3], found[4], found[5]
        )
        nan, posinf, neginf, masked = counted

    place = row.to(tl.int64) * PLACES + tl.program_id(0)
    values, counts, sums = values_ptr + place * 4, counts_ptr + place * 5, sums_ptr + place * 2
    tl.store(values, least)
    tl.store(values + 1, tl.where(tiny == MAGNITUDE, INFINITY, tiny + 1).to(tl.float32, bitcast=True))
    tl.store(values + 2, mask_low)
    tl.store(values + 3, most)
    tl.store(counts, nan)
    tl.store(counts + 1, posinf)
    tl.store(counts + 2, neginf)
    tl.store(counts + 3, zeros)
    tl.store(counts + 4, masked)
    tl.store(sums, sum_x)
    tl.store(sums + 1, sum_xx)
    if HISTOGRAM:
        # Data has a few dozen exponents: the other bins need no atomic operation.
        first, places, slots = bins_ptr + row.to(tl.int64) * 256, tl.arange(0, 256), tl.arange(0, COMMON)
        common = tl.where(again, 0, common)
        tl.atomic_add(first + places, bins.to(tl.int64), mask=bins != 0)
        tl.atomic_add(first + tl.where(slots == 0, 0, FIRST + slots), common.to(tl.int64), mask=common != 0)


@triton.jit
def _both(low, high, small, total, squares, zeros, low_2, high_2, small_2, total_2, squares_2, zeros_2):
    """Combine the results of two lanes, or of the two ways."""
    low, high, small = tl.minimum(low, low_2), tl.maximum(high, high_2), tl.minimum(small, small_2)
    return low, high, small, total + total_2, squares + squares_2, zeros + zeros_2


@triton.jit
def _place(i, width, step, pitch, GAPS: tl.constexpr):
    """Where element i lies."""
    return i.to(tl.int64) if GAPS == 0 else (i // width).to(tl.int64) * pitch + (i % width).to(tl.int64) * step


@triton.jit
def _short_way(x_ptr, tiles, width, step, pitch, GAPS: tl.constexpr, HISTOGRAM: tl.constexpr, BLOCK: tl.constexpr):
    """Over this program's tiles: least, largest, smallest magnitude less one, sum, sum of squares, zeros; exponents."""
    lanes = tl.arange(0, BLOCK)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    small = tl.full([BLOCK], MAGNITUDE, tl.int32)
    total, squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    zeros, common = tl.zeros([BLOCK], tl.int32), tl.zeros([COMMON], tl.int32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first = tile * (4 * BLOCK)
        if GAPS == 2:
            a_at = x_ptr + _place(first + lanes, width, step, pitch, GAPS)
            b_at = x_ptr + _place(first + BLOCK + lanes, width, step, pitch, GAPS)
            c_at = x_ptr + _place(first + 2 * BLOCK + lanes, width, step, pitch, GAPS)
            d_at = x_ptr + _place(first + 3 * BLOCK + lanes, width, step, pitch, GAPS)
        else:
            # `// 4 * 4` tells the compiler that this is a multiple of four, so that it loads four at a time.
            a_at = x_ptr + _place(first, width, step, pitch, GAPS) // 4 * 4 + lanes
            b_at, c_at, d_at = a_at + BLOCK, a_at + 2 * BLOCK, a_at + 3 * BLOCK
        a, b = tl.load(a_at).to(tl.float32), tl.load(b_at).to(tl.float32)
        c, d = tl.load(c_at).to(tl.float32), tl.load(d_at).to(tl.float32)
        low = tl.minimum(low, tl.minimum(tl.minimum(a, b), tl.minimum(c, d)))
        high = tl.maximum(high, tl.maximum(tl.maximum(a, b), tl.maximum(c, d)))
        wide_a, wide_b, wide_c, wide_d = a.to(tl.float64), b.to(tl.float64), c.to(tl.float64), d.to(tl.float64)
        total += (wide_a + wide_b) + (wide_c + wide_d)
        squares += (wide_a * wide_a + wide_b * wide_b) + (wide_c * wide_c + wide_d * wide_d)
        # Minus one, both zeros become the largest integer; the rest keep their order.
        e, f = (a.to(tl.int32, bitcast=True) - 1) & MAGNITUDE, (b.to(tl.int32, bitcast=True) - 1) & MAGNITUDE
        g, h = (c.to(tl.int32, bitcast=True) - 1) & MAGNITUDE, (d.to(tl.int32, bitcast=True) - 1) & MAGNITUDE
        small = tl.minimum(small, tl.minimum(tl.minimum(e, f), tl.minimum(g, h)))
        if HISTOGRAM:
            tiled = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.int32, bitcast=True)
            magnitude = tl.reshape(tiled, [4 * BLOCK], can_reorder=True) & MAGNITUDE
            common += tl.histogram(tl.maximum((magnitude >> 23) - FIRST, 0), COMMON)
        else:
            zeros += (a == 0).to(tl.int32) + (b == 0).to(tl.int32) + (c == 0).to(tl.int32) + (d == 0).to(tl.int32)
    least, most, tiny, sum_x, sum_xx, none = tl.reduce((low, high, small, total, squares, zeros), 0, _both)
    if HISTOGRAM:
        none = tl.sum(tl.where(tl.arange(0, COMMON) == 0, common, 0), 0)
    return least, most, tiny, sum_x, sum_xx, none, common


@triton.jit
def _long_way(
    x_ptr,
    size,
    tiles,
    again,  # whether to read the tiles again
    left,  # first element of this program's first block behind the tiles
    mask_at_most,
    width,
    step,
    pitch,
    GAPS: tl.constexpr,
    MASKED: tl.constexpr,
    HISTOGRAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same for blocks of any values (the last may be short); counts; the lowest mask value; exponents."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    small = tl.full([BLOCK], MAGNITUDE, tl.int32)
    total, squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    zeros, bins = tl.zeros([BLOCK], tl.int32), tl.zeros([256], tl.int32)
    nan, posinf, neginf, masked = 0, 0, 0, 0
    repeated = tl.where(again, 4 * tl.cdiv(tl.maximum(tiles - program, 0), programs), 0)
    turns = repeated + tl.cdiv(tl.maximum(size - left, 0), programs * BLOCK)
    for turn in range(turns):
        in_tiles = (4 * (program + (turn // 4) * programs) + turn % 4) * BLOCK
        first = tl.where(turn < repeated, in_tiles, left + (turn - repeated) * programs * BLOCK)
        offsets = first + lanes
        shown = offsets < size
        x = tl.load(x_ptr + _place(offsets, width, step, pitch, GAPS), mask=shown, other=0.0).to(tl.float32)
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & MAGNITUDE
        if MASKED:
            hidden = shown & (x <= mask_at_most)
            shown = shown & ((x > mask_at_most) | (magnitude > INFINITY))
            lowest = tl.minimum(lowest, tl.where(hidden & (magnitude < INFINITY), x, float("inf")))
        finite, infinite = shown & (magnitude < INFINITY), shown & (magnitude == INFINITY)
        # The counts of a block, twelve bits each, in one number: one sum over the threads instead of four.
        flags = (shown & (magnitude > INFINITY)).to(tl.int64) + ((infinite & (bits > 0)).to(tl.int64) << 12)
        flags += ((infinite & (bits < 0)).to(tl.int64) << 24) + ((~shown).to(tl.int64) << 36)
        counted = tl.sum(flags, 0)
        nan += (counted & 0xFFF).to(tl.int32)
        posinf += ((counted >> 12) & 0xFFF).to(tl.int32)
        neginf += ((counted >> 24) & 0xFFF).to(tl.int32)
        unshown = (counted >> 36).to(tl.int32)
        masked += unshown - tl.maximum(first + BLOCK - size, 0)
        zeros += (finite & (magnitude == 0)).to(tl.int32)
        low = tl.minimum(low, tl.where(finite, x, float("inf")))
        high = tl.maximum(high, tl.where(finite, x, float("-inf")))
        small = tl.minimum(small, tl.where(finite, (bits - 1) & MAGNITUDE, MAGNITUDE))
        kept = tl.where(finite, x, 0.0).to(tl.float64)
        total += kept
        squares += kept * kept
        if HISTOGRAM:
            # Elements that do not count are put into bin 0 and subtracted from it.
            bins += tl.histogram(tl.where(shown, magnitude >> 23, 0), 256)
            bins -= tl.where(tl.arange(0, 256) == 0, unshown, 0)
    found = tl.reduce((low, high, small, total, squares, zeros), 0, _both)
    return found, (nan, posinf, neginf, masked), tl.min(lowest, 0), bins
