"""The statistics of a tensor: their names, how two values merge, and which value means that nothing was seen.

Files and devices share these names. Each statistic names its merge: "sum" adds, "least" and "largest" keep one of
the two.
"""

from __future__ import annotations

import math

# Values that change nothing when merged.
NEUTRAL = {"sum": 0.0, "least": math.inf, "largest": -math.inf}

VALUE_MERGES = {"min": "least", "max": "largest", "smallest": "least", "sum": "sum", "sum_of_squares": "sum"}
COUNTS = ("elements", "nan", "posinf", "neginf", "zeros", "masked")
# Values inside an operator (`calib.hidden`), and the lowest finite mask value of a tensor.
HIDDEN_MERGES = {"hidden_max": "largest", "hidden_min": "least", "mask_min": "least"}

VALUES, HIDDEN = tuple(VALUE_MERGES), tuple(HIDDEN_MERGES)
NOTHING = tuple(NEUTRAL[merge] for merge in VALUE_MERGES.values())
NO_HIDDEN = tuple(NEUTRAL[merge] for merge in HIDDEN_MERGES.values())
# The bins of a histogram: the biased exponents of fp32.
BINS = 256
# No batch: larger than any index, so that the earliest of two is the smaller.
NO_BATCH = 1 << 62
