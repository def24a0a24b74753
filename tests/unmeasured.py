"""`calibrate` without rounding evidence, for tests of the rules that judge by magnitude and operator."""

from __future__ import annotations

from functools import partial

from calibcast.calib import calibration

calibrate = partial(calibration.calibrate, rounding_batches=0)
