"""What is counted of a tensor, and what stands for nothing seen: names and numbers that files and devices share."""

from __future__ import annotations

import math

VALUES = ("min", "max", "smallest", "sum", "sum_of_squares")
COUNTS = ("elements", "nan", "posinf", "neginf", "zeros", "masked")
NOTHING = (math.inf, -math.inf, math.inf, 0.0, 0.0)
# Of a histogram: the biased exponents of fp32.
BINS = 256
# No batch: larger than any index, so that the earliest of two is the smaller.
NO_BATCH = 1 << 62
# What an operator hides (`calib.hidden`), and the lowest finite mask value of a tensor.
HIDDEN = ("hidden_max", "hidden_min", "mask_min")
NO_HIDDEN = (-math.inf, math.inf, math.inf)
