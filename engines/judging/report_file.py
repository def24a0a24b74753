"""A verification report as a file."""

from __future__ import annotations

import math
import os
from typing import Any

import polars as pl
from calibcast.calib.artifacts import load_json, parsed, save_json
from calibcast.calib.errors import ArtifactError, CalibcastError
from calibcast.calib.json_types import require_keys, require_types
from calibcast.engines.judging.attribution import SCHEMA as ATTRIBUTION
from calibcast.engines.judging.bounds import Bounds
from calibcast.engines.judging.report import SCHEMA, VerificationReport

_KIND = "verification"
_FILE: dict[str, Any] = {
    "passed": bool,
    "verdict": str,
    "batches": int,
    "problems": list[str],
    "reference_problem": str | None,
    "metrics": dict[str, Any],
    "floating": list[str],
    "outputs": list[dict[str, Any]],
    "attribution": list[dict[str, Any]] | None,
}


def save_report(path: str | os.PathLike[str], report: VerificationReport) -> None:
    """Write a report as JSON, atomically."""
    content = {
        "passed": report.passed,
        "verdict": str(report.verdict),
        "bounds": report.bounds.set(),
        "batches": report.batches,
        "problems": list(report.problems),
        "reference_problem": report.reference_problem,
        "metrics": {name: _text(value) for name, value in report.metrics.items()},
        "floating": list(report.floating),
        "outputs": _rows(report.frame),
        "attribution": None if report.attribution is None else _rows(report.attribution),
    }
    save_json(path, _KIND, content)


def read_verdict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a report's file, as the page takes it. Raises ArtifactError as `load_report` does."""
    content = load_json(path, _KIND)
    with parsed(path, _KIND):
        require_types(content, _FILE)
        require_keys(content, [name for name in _FILE if name != "verdict"])  # older files have none
        content["verdict"] = _verdict_of(path, content)
    return content


def _verdict_of(path: str | os.PathLike[str], content: dict[str, Any]) -> str:
    """The verdict by the file's own numbers and bounds. Raises ArtifactError where the file says that it passed, and
    these say that it did not."""
    try:
        verdict = _report(content).verdict
    except CalibcastError as error:
        raise ArtifactError(f"{path} cannot be judged: {error}") from error
    if content["passed"] and not verdict.passed:
        raise ArtifactError(f"{path} says that it passed, but {verdict}: the file was changed, or is damaged")
    return str(verdict)


def load_report(path: str | os.PathLike[str]) -> VerificationReport:
    """Read a report. Raises ArtifactError when the file is truncated, not a report, or of a newer version."""
    content = read_verdict(path)
    with parsed(path, _KIND):
        return _report(content)


def _report(content: dict[str, Any]) -> VerificationReport:
    attribution = content["attribution"]
    return VerificationReport(
        frame=_frame(content["outputs"], SCHEMA),
        batches=content["batches"],
        metrics={name: float(value) for name, value in content["metrics"].items()},
        problems=tuple(content["problems"]),
        reference_problem=content["reference_problem"],
        floating=tuple(content["floating"]),
        attribution=None if attribution is None else _frame(attribution, ATTRIBUTION),
        bounds=Bounds.of(content.get("bounds", {})),
    )


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _rows(frame: pl.DataFrame) -> list[dict[str, Any]]:
    # JSON has no inf and NaN; as text they survive every reader.
    return [{key: _text(value) for key, value in row.items()} for row in frame.to_dicts()]


def _frame(rows: list[dict[str, Any]], schema: dict[str, Any]) -> pl.DataFrame:
    floats = {name for name, dtype in schema.items() if dtype == pl.Float64}
    numbers = [{k: float(v) if k in floats and isinstance(v, str) else v for k, v in row.items()} for row in rows]
    return pl.DataFrame(numbers, schema=schema)
