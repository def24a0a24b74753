"""What a monitor has seen, as a frame, as findings and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from calibcast.calib.printable import printable
from calibcast.calib.statistics import Statistics
from calibcast.calib.text_table import Column, text_table
from calibcast.engines.monitoring.ends import End
from calibcast.engines.monitoring.findings import Finding

_COLUMNS = (
    Column("name", "tensor"),
    Column("absmax_calibrated", "absmax was", 10, number=True),
    Column("absmax", "now", 10, number=True),
    Column("growth", "growth", 8, number=True),
    Column("unseen", "unseen", 8, number=True),
    Column("headroom", "headroom", 9, number=True),
    Column("causes", "causes", head=True),
)
_SCHEMA: dict[str, Any] = {
    "name": pl.String,
    "node": pl.String,
    "output": pl.Int64,
    "is_input": pl.Boolean,
    **{f"{number}{which}": pl.Float64 for number in ("min", "max", "absmax", "rms") for which in ("", "_calibrated")},
    "growth": pl.Float64,
    "unseen": pl.Float64,
    "headroom": pl.Float64,
    "nonfinite": pl.Int64,
    "causes": pl.String,
}


@dataclass(frozen=True, eq=False)
class MonitorReport:
    """An engine in service beside its calibration.

    calls, watched: how many calls there were, and how many of them were watched. findings: each cause at each tensor,
    in the order in which they were seen. frame: a row for each floating-point input and output: `min`, `max`, `absmax`,
    `rms` of the watched calls and, as `.._calibrated`, of the calibration; `growth`, the ratio of the peaks; `unseen`,
    the share of finite values whose power of two calibration never met; `headroom`, how many times the peak could grow
    before it passes what its low type holds (null where it has none); `nonfinite`, how many NaN and Inf; `causes`.
    """

    frame: pl.DataFrame
    findings: tuple[Finding, ...]
    calls: int
    watched: int

    @property
    def passed(self) -> bool:
        """Whether some calls were watched, and nothing was found."""
        return self.watched > 0 and not self.findings

    def __str__(self) -> str:
        verdict = "nothing found" if not self.findings else f"{len(self.findings)} found"
        lines = [f"MonitorReport: {self.watched} of {self.calls} calls watched, {verdict}"]
        lines += [f"  {printable(str(finding))}" for finding in self.findings]
        return "\n".join([*lines, *text_table(self.frame.iter_rows(named=True), _COLUMNS, indent="  ")])


def report_of(
    ends: Sequence[End], statistics: Statistics, findings: tuple[Finding, ...], calls: int, watched: int
) -> MonitorReport:
    """The report of statistics that are on the host."""
    causes: dict[str, list[str]] = {}
    for finding in findings:
        causes.setdefault(finding.name, []).append(finding.cause)
    rows = [_row(end, i, statistics, ", ".join(causes.get(end.what, ()))) for i, end in enumerate(ends)]
    return MonitorReport(pl.DataFrame(rows, schema=_SCHEMA), findings, calls, watched)


def _row(end: End, i: int, statistics: Statistics, causes: str) -> dict[str, Any]:
    least, most, _, _, squares = statistics.values[i].tolist()
    count = int(statistics.finite()[i])
    was: Mapping[str, Any] = end.calibrated or {}
    now: dict[str, float | None] = dict.fromkeys(("min", "max", "absmax", "rms"))
    if count:
        now = {"min": least, "max": most, "absmax": max(most, -least), "rms": (max(squares, 0.0) / count) ** 0.5}
    peak, before = now["absmax"], was.get("absmax")
    return {
        "name": end.name, "node": end.spec.node, "output": end.spec.output, "is_input": end.is_input,
        **now, **{f"{number}_calibrated": was.get(number) for number in now},
        "growth": peak / before if peak is not None and before else None,
        "unseen": _unseen(statistics, i, was.get("histogram")),
        "headroom": end.limit / peak if peak and end.limit is not None else None,
        "nonfinite": int(statistics.nonfinite()[i]), "causes": causes,
    }  # fmt: skip


def _unseen(statistics: Statistics, i: int, calibrated: Sequence[int] | None) -> float | None:
    """The share of finite values in bins that are empty in the calibration's histogram; the last bin is Inf and NaN."""
    if calibrated is None or statistics.histograms is None:
        return None
    now = statistics.histograms[i][:-1]
    total = int(now.sum())
    return float(now[torch.tensor(calibrated)[:-1] == 0].sum()) / total if total else None
