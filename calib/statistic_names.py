"""What is counted of a tensor, how two counts become one, and what stands for nothing seen.

Files and devices share these names. Each statistic names its merge: "sum" adds, "least" and "largest" keep one of
the two.
"""

from __future__ import annotations

import math

# What changes nothing when it is merged.
NEUTRAL = {"sum": 0.0, "least": math.inf, "largest": -math.inf}

VALUE_MERGES = {"min": "least", "max": "largest", "smallest": "least", "sum": "sum", "sum_of_squares": "sum"}
COUNTS = ("elements", "nan", "posinf", "neginf", "zeros", "masked")
# What an operator hides (`calib.hidden`), and the lowest finite mask value of a tensor.
HIDDEN_MERGES = {"hidden_max": "largest", "hidden_min": "least", "mask_min": "least"}

VALUES, HIDDEN = tuple(VALUE_MERGES), tuple(HIDDEN_MERGES)
NOTHING = tuple(NEUTRAL[merge] for merge in VALUE_MERGES.values())
NO_HIDDEN = tuple(NEUTRAL[merge] for merge in HIDDEN_MERGES.values())
# Of a histogram: the biased exponents of fp32.
BINS = 256
# No batch: larger than any index, so that the earliest of two is the smaller.
NO_BATCH = 1 << 62
