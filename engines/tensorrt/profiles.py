"""Which sizes an engine is built for: the sizes that calibration saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from calibcast.calib.batches import Signature
from calibcast.calib.errors import BatchError, BuildError
from calibcast.calib.input_checks import Leaf
from calibcast.calib.ranges import RangeTable
from calibcast.engines.tensorrt.builder.job import Profile


def profiles(signature: Signature, ranges: RangeTable | None) -> list[Profile]:
    """(smallest, most frequent, largest) shape of each input, from the sizes that calibration saw, else from the
    exported range.

    Raises BuildError for a dynamic size that nothing bounds.
    """
    sizes = {} if ranges is None else ranges.calibration.input_sizes
    return [_profile(leaf, sizes.get(leaf.name), signature.bounds) for leaf in signature.leaves]


def check_profile(leaf: Leaf, value: Any, profile: Profile) -> None:
    """Raise BatchError for an input of a size that the engine was not built for."""
    low, _, high = profile
    if isinstance(value, torch.Tensor) and any(not a <= s <= b for a, s, b in zip(low, value.shape, high, strict=True)):
        raise BatchError(
            f"input {leaf.name} is {list(value.shape)}, but this engine was built for {list(low)} to {list(high)}: the "
            "sizes that calibration saw, or else the exported range. Build it with ranges= that saw this size."
        )


def _profile(
    leaf: Leaf, seen: Sequence[Mapping[str, int]] | None, bounds: Mapping[Any, tuple[int, int | None]]
) -> Profile:
    triples: list[tuple[int, int, int]] = []
    for dimension, size in enumerate(leaf.sizes):
        if isinstance(size, int):
            triple = (size, size, size)
        elif seen is not None:
            counts = {int(key): count for key, count in seen[dimension].items()}
            triple = (min(counts), max(counts, key=lambda key: counts[key]), max(counts))
        else:
            triple = _exported_range(leaf, dimension, size, bounds)
        triples.append(triple)
    return tuple(t[0] for t in triples), tuple(t[1] for t in triples), tuple(t[2] for t in triples)


def _exported_range(
    leaf: Leaf, dimension: int, size: Any, bounds: Mapping[Any, tuple[int, int | None]]
) -> tuple[int, int, int]:
    low, high = bounds.get(size, (1, None))
    if high is None or high > 1 << 20:
        raise BuildError(
            f"input {leaf.name}: dimension {dimension} ({size}) has no upper bound, and TensorRT needs one. Pass "
            "ranges= (the sizes that calibration saw), or export with torch.export.Dim(name, min=.., max=..)."
        )
    return max(low, 1), high, high
