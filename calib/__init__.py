"""Measure: batches through an exported program to a table of ranges."""

from calib.calibration import calibrate
from calib.errors import (
    ArtifactError,
    BatchError,
    BuildError,
    CalibcastError,
    GateError,
    MismatchError,
    PlanError,
    ProgramError,
)
from calib.ranges import RangeTable

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
    "calibrate",
]
