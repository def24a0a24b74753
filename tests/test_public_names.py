"""The contract with who uses calibcast: its names, their arguments in order, columns, errors and exit codes.

A name or an argument may be added, and is then added here. None goes, and no two change places.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import calibcast
import pytest
from calibcast import Engine, PrecisionPlan, RangeTable, VerificationReport
from calibcast.calib import errors
from calibcast.calib.errors import CalibcastError
from calibcast.engines import cli, usage
from calibcast.engines.job.errors import JobError

NAMES = set(
    """
    ArtifactError BatchError BudgetError BuildError CalibcastError ChangedFileError Comparison Decision Engine GateError
    Hidden Literal Lost MismatchError Monitor MonitorReport NewSequence NodeFacts PlanError PrecisionPlan ProgramError
    Proof RangeTable RecordedCalls Rescaling RoundingSummary Rule SettingError StorageError TensorFacts Verdict
    VerificationReport
    build calibrate classify compare compile emulate export_onnx insert_casts recorded report_frame rescale tune verify
    what_if
    """.split()  # noqa: SIM905
)
# By position as far as "/", then by name, in any order.
ARGUMENTS = {
    "calibrate": "program dataloader transform max_batches histogram device on_nonfinite progress / checkpoint "
    "checkpoint_batches checkpoint_seconds carry_state rounding_batches",
    "recorded": "module folder / max_bytes when_full",
    "classify": "program ranges low_precision_type min_sqnr_db data_max init_max max_depth_of_reduction "
    "nodes_to_exclude targets_to_exclude nodes_to_include targets_to_include range_quantile rules / weights "
    "wide_accumulation",
    "tune": "program ranges dataloader min_sqnr_db transform max_batches start / low_precision_type device weights "
    "carry_state settings",
    "rescale": "program ranges low_precision_type / carry_state settings",
    "insert_casts": "program plan keep_io_types",
    "what_if": "program ranges data_max / low_precision_type range_quantile min_sqnr_db base keep_io_types weights "
    "settings",
    "compare": "program mixed dataloader transform max_batches device progress",
    "build": "mixed plan ranges backend / ahead_of_time strict_precision allow_unknown on_failure isolate "
    "build_timeout cache cache_size progress settings",
    "compile": "model inputs use_explicit_typing enable_autocast low_precision_type nodes_to_exclude "
    "targets_to_exclude data_max max_depth_of_reduction calibration_dataloader transform backend / rescale settings",
    "verify": "engine program dataloader transform max_batches metrics / progress attribute carry_state bounds",
    "export_onnx": "mixed plan path",
}
MEMBERS: dict[Any, str] = {
    RangeTable: "frame rounding save load merge calibration",
    PrecisionPlan: "frame low_precision_nodes high_precision_nodes explain save load from_types from_autocast proof "
    "decisions share check fingerprint",
    Engine: "plan ranges program ledger save load reset backend why record",
    VerificationReport: "frame passed require bounds",
}
# Exit codes of the command line, by error; all others are 1.
CODES = {
    "UsageError": 2, "LocationError": 2, "JobError": 2, "SettingError": 2, "ArtifactError": 2, "ChangedFileError": 2,
    "GateError": 3, "BudgetError": 3,
}  # fmt: skip


def test_no_public_name_goes() -> None:
    assert set(calibcast.__all__) == NAMES


@pytest.mark.parametrize("name", ARGUMENTS)
def test_no_argument_goes_or_changes_its_place(name: str) -> None:
    function: Callable[..., Any] = getattr(calibcast, name)
    placed, _, named = ARGUMENTS[name].partition(" / ")
    found = list(inspect.signature(function).parameters)
    assert found[: len(placed.split())] == placed.split()
    assert set(named.split()) <= set(found)


@pytest.mark.parametrize(("kind", "member"), [(kind, m) for kind, members in MEMBERS.items() for m in members.split()])
def test_no_member_goes(kind: type, member: str) -> None:
    known = set(dir(kind)) | set(getattr(kind, "__dataclass_fields__", {})) | set(getattr(kind, "__annotations__", {}))
    assert member in known


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        ("ProgramError", "CalibcastError"), ("BatchError", "CalibcastError"), ("ArtifactError", "CalibcastError"),
        ("MismatchError", "CalibcastError"), ("PlanError", "CalibcastError"), ("SettingError", "PlanError"),
        ("BudgetError", "PlanError"), ("BudgetError", "GateError"), ("BuildError", "CalibcastError"),
        ("GateError", "CalibcastError"), ("ChangedFileError", "ArtifactError"), ("ChangedFileError", "MismatchError"),
        ("StorageError", "ArtifactError"),
    ],
)  # fmt: skip
def test_an_error_is_still_caught_by_its_base(kind: str, base: str) -> None:
    assert issubclass(getattr(errors, kind), getattr(errors, base))


def test_exit_codes() -> None:
    kinds, seen = [CalibcastError], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        seen.add(kind.__name__)
        if kind.__module__.startswith("calibcast."):
            assert usage.exit_code(kind("a message")) == CODES.get(kind.__name__, 1), kind
    assert set(CODES) < seen
    assert JobError.__name__ in seen


def test_commands() -> None:
    names = "calibrate plan rescale diagnose build inspect export verify report what-if diff merge init run demo"
    assert set(names.split()) <= {command.name or command.callback.__name__.replace("_", "-")  # type: ignore[union-attr]
                                  for command in cli.app.registered_commands}  # fmt: skip
