"""A verification report as a file."""

from __future__ import annotations

import math
import os
from typing import Any

import polars as pl

from calib.artifacts import load_json, parsed, save_json
from engines.verification import SCHEMA, VerificationReport

_KIND = "verification"


def save_report(path: str | os.PathLike[str], report: VerificationReport) -> None:
    """Write a report as JSON, whole or not at all."""
    # JSON has no inf and NaN; as text they survive every reader.
    rows = [{key: _text(value) for key, value in row.items()} for row in report.frame.to_dicts()]
    content = {
        "passed": report.passed,
        "batches": report.batches,
        "problems": list(report.problems),
        "reference_problem": report.reference_problem,
        "metrics": {name: _text(value) for name, value in report.metrics.items()},
        "floating": list(report.floating),
        "outputs": rows,
    }
    save_json(path, _KIND, content)


def load_report(path: str | os.PathLike[str]) -> VerificationReport:
    """Read a report. Raises ArtifactError when the file is truncated, foreign or newer."""
    content = load_json(path, _KIND)
    with parsed(path, _KIND):
        rows = [{key: _number(key, value) for key, value in row.items()} for row in content["outputs"]]
        return VerificationReport(
            frame=pl.DataFrame(rows, schema=SCHEMA),
            batches=content["batches"],
            metrics={name: float(value) for name, value in content["metrics"].items()},
            problems=tuple(content["problems"]),
            reference_problem=content["reference_problem"],
            floating=tuple(content["floating"]),
        )


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(column: str, value: Any) -> Any:
    return float(value) if SCHEMA[column] == pl.Float64 and isinstance(value, str) else value
