"""Measure: batches through an exported program to a table of ranges."""

from typing import TYPE_CHECKING

from calibcast.calib.errors import (
    ArtifactError,
    BatchError,
    BuildError,
    CalibcastError,
    GateError,
    MismatchError,
    PlanError,
    ProgramError,
    SettingError,
)
from calibcast.calib.lazy_names import lazy_names

if TYPE_CHECKING:
    from calibcast.calib.calibration import calibrate
    from calibcast.calib.ranges import RangeTable

__all__ = [
    "ArtifactError",
    "BatchError",
    "BuildError",
    "CalibcastError",
    "GateError",
    "MismatchError",
    "PlanError",
    "ProgramError",
    "RangeTable",
    "SettingError",
    "calibrate",
]

__getattr__, __dir__ = lazy_names(
    __name__, {"RangeTable": "calibcast.calib.ranges", "calibrate": "calibcast.calib.calibration"}
)
