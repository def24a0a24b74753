"""Operators that the builder treats in a way of its own. Data: what they do to values is in `calib.operators`."""

from __future__ import annotations

# Torch-TensorRT 2.14 gives fp32 of them, whatever their input is: the converter starts the sum from an fp32 zero.
WIDE_SUMS = frozenset({"cumsum"})
# And of these, whose tables may be half.
WIDE_BAGS = frozenset({"embedding_bag", "_embedding_bag"})
