"""Data: operators that the builder handles differently from PyTorch. What they do to values is in `calib.operators`."""

from __future__ import annotations

# Torch-TensorRT 2.14 returns fp32 from these for any input type: the converter starts the sum from an fp32 zero.
WIDE_SUMS = frozenset({"cumsum"})
# It returns fp32 from these too, although their tables may be half.
WIDE_BAGS = frozenset({"embedding_bag", "_embedding_bag"})
