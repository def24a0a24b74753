"""Calibration: run batches through an exported program, and measure the range of every tensor."""

from typing import TYPE_CHECKING

from calibcast.calib.errors import (
    ArtifactError,
    BatchError,
    BudgetError,
    BuildError,
    CalibcastError,
    ChangedFileError,
    GateError,
    MismatchError,
    PlanError,
    ProgramError,
    SettingError,
    StorageError,
)
from calibcast.calib.lazy_names import lazy_names

if TYPE_CHECKING:
    from calibcast.calib.calibration import calibrate
    from calibcast.calib.ranges import RangeTable
    from calibcast.calib.recording import RecordedCalls, recorded
    from calibcast.calib.sequences import NewSequence

__all__ = [
    "ArtifactError",
    "BatchError",
    "BudgetError",
    "BuildError",
    "CalibcastError",
    "ChangedFileError",
    "GateError",
    "MismatchError",
    "NewSequence",
    "PlanError",
    "ProgramError",
    "RangeTable",
    "RecordedCalls",
    "SettingError",
    "StorageError",
    "calibrate",
    "recorded",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "NewSequence": "calibcast.calib.sequences",
        "RangeTable": "calibcast.calib.ranges",
        "RecordedCalls": "calibcast.calib.recording",
        "calibrate": "calibcast.calib.calibration",
        "recorded": "calibcast.calib.recording",
    },
)
