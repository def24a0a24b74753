"""Combine the partial results of `tally`: one kernel per batch. Imports Triton, as `tally` does."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather(
    where_ptr,  # int64 [3, measured]: a row, the row whose tensor was measured for it, elements of that tensor
    measured: tl.int64,
    values_ptr,  # what `tally` wrote
    counts_ptr,
    sums_ptr,
    bins_ptr,
    to_values_ptr,  # the arrays of `calib.statistics.Statistics`
    to_counts_ptr,
    to_batches_ptr,
    to_hidden_ptr,
    to_bins_ptr,
    PLACES: tl.constexpr,
    LANES: tl.constexpr,  # a power of two, at least PLACES
    HISTOGRAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program fills one row."""
    row = tl.load(where_ptr + tl.program_id(0))
    root = tl.load(where_ptr + measured + tl.program_id(0))
    size = tl.load(where_ptr + 2 * measured + tl.program_id(0))
    lanes = tl.arange(0, LANES)
    used = lanes < tl.minimum(tl.cdiv(size, BLOCK), PLACES)
    places = root * PLACES + lanes
    infinity = float("inf")
    least = tl.min(tl.load(values_ptr + places * 4, mask=used, other=infinity), 0)
    smallest = tl.min(tl.load(values_ptr + places * 4 + 1, mask=used, other=infinity), 0)
    mask_low = tl.min(tl.load(values_ptr + places * 4 + 2, mask=used, other=infinity), 0)
    most = tl.max(tl.load(values_ptr + places * 4 + 3, mask=used, other=-infinity), 0)
    tl.store(to_values_ptr + row * 5, least.to(tl.float64))
    tl.store(to_values_ptr + row * 5 + 1, most.to(tl.float64))
    tl.store(to_values_ptr + row * 5 + 2, smallest.to(tl.float64))
    tl.store(to_values_ptr + row * 5 + 3, tl.sum(tl.load(sums_ptr + places * 2, mask=used, other=0.0), 0))
    tl.store(to_values_ptr + row * 5 + 4, tl.sum(tl.load(sums_ptr + places * 2 + 1, mask=used, other=0.0), 0))
    tl.store(to_counts_ptr + row * 6, size)
    for count in tl.static_range(5):
        counted = tl.load(counts_ptr + places * 5 + count, mask=used, other=0).to(tl.int64)
        tl.store(to_counts_ptr + row * 6 + 1 + count, tl.sum(counted, 0))
    tl.store(to_batches_ptr + row, tl.full([], 1, tl.int64))
    tl.store(to_hidden_ptr + row * 3 + 2, mask_low.to(tl.float64))
    if HISTOGRAM:
        bins = tl.arange(0, 256)
        tl.store(to_bins_ptr + row * 256 + bins, tl.load(bins_ptr + root * 256 + bins))
