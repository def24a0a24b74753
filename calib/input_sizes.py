"""Which sizes the inputs had: counted per dimension, merged, and bounded in number."""

from __future__ import annotations

# Sizes kept per dimension of an input: enough to choose profiles from.
MAX_SIZES = 64

Sizes = dict[str, list[dict[str, int]]]


def merge_sizes(first: Sizes, second: Sizes) -> Sizes:
    """Add up how often each size came, per input and dimension."""
    merged: Sizes = {name: [dict(counts) for counts in dimensions] for name, dimensions in first.items()}
    for name, dimensions in second.items():
        mine = merged.setdefault(name, [{} for _ in dimensions])
        for counts, more in zip(mine, dimensions, strict=True):
            for size, count in more.items():
                count_size(counts, size, count)
    return merged


def count_size(counts: dict[str, int], size: str, count: int = 1) -> None:
    """Count a size. If there are more than 64, remove the rarest, but never the smallest or the largest."""
    counts[size] = counts.get(size, 0) + count
    if len(counts) > MAX_SIZES:
        ends = {min(counts, key=int), max(counts, key=int)}
        del counts[min((key for key in counts if key not in ends), key=lambda key: counts[key])]
