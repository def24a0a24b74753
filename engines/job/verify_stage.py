"""The stage `verify`: compares the engine with the fp32 model on held-out batches, and applies the gate."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from calibcast.calib.artifacts import load_program
from calibcast.calib.number_text import counted
from calibcast.engines.building import build
from calibcast.engines.engine import Engine
from calibcast.engines.job.context import JobContext
from calibcast.engines.job.feed import Feeding, feed
from calibcast.engines.job.folder import ENGINE, MIXED, VERIFICATION
from calibcast.engines.job.logs import tell
from calibcast.engines.job.measuring import counts
from calibcast.engines.job.openers import code_digest, fingerprints
from calibcast.engines.job.progress import Progress
from calibcast.engines.job.ranks import Ranks
from calibcast.engines.job.settings import Source
from calibcast.engines.job.shares import Share
from calibcast.engines.job.sources import Done
from calibcast.engines.job.stage import Stage, plain_settings
from calibcast.engines.job.trust import DataReport
from calibcast.engines.judging.bounds import Bounds
from calibcast.engines.judging.report import VerificationReport
from calibcast.engines.judging.report_file import load_report, save_report
from calibcast.engines.judging.verification import verify
from calibcast.engines.locations import load_function


def verify_stage(run: JobContext, held: tuple[Source, Share]) -> Stage:
    """The stage that compares the engine with the fp32 model on the held-out batches `held`."""
    source, share = held
    settings = run.file.job.verification
    code = {f"metric {name}": code_digest(run.file, location) for name, location in settings.metrics.items()}
    inputs = {**run.model_inputs, **fingerprints(run.file, source), **code}
    own = {**plain_settings(settings, "max_batches"), **plain_settings(run.file.job.limits, "on_nonfinite_inputs"),
           **plain_settings(run.file.job.calibration, "carry_state"),
           "held_out_share": share.held_out_share}  # fmt: skip
    work, judge, restate = partial(_compare, run), partial(_judge_engine, run), partial(_restate_verdict, run)
    return Stage("verify", (VERIFICATION,), ("build",), inputs, own, work, judge, restate)


def _compare(run: JobContext) -> dict[str, Any]:
    assert run.held_out is not None
    source, share = run.held_out
    data, inputs = run.opened(source, Ranks())  # all of it, not a shard
    metrics = run.file.job.verification.metrics
    functions = {name: load_function(run.file.function(location)) for name, location in metrics.items()}
    total = counts(data.batches.length, share)[0]
    items = feed(data.batches.read(share, Done()), inputs, run.signature)
    feeding = Feeding(items, run.signature, run.file.job.limits, Progress("verify", total, bar=run.bar), total)
    engine, judged = _judged_engine(run)
    bounds = run.file.job.verification.bounds
    report = verify(
        engine, run.program, feeding, feeding.inputs, metrics=functions, progress=False, bounds=bounds,
        carry_state=run.file.job.calibration.carry_state,
    )  # fmt: skip
    save_report(run.folder.path / VERIFICATION, report)
    data_report = feeding.report.to_json()
    return {**_told(report, judged), "judged": judged, "metrics": dict(report.metrics), "report": data_report}


def _judged_engine(run: JobContext) -> tuple[Engine, str]:
    """The saved engine, or the cast program in PyTorch where the engine needs a GPU and there is none; and its name."""
    if run.file.job.build.ahead_of_time and not torch.cuda.is_available():
        mixed = load_program(run.folder.path / MIXED)
        return build(mixed, backend="eager"), "the cast program in PyTorch: the engine needs a GPU"
    engine = Engine.load(run.folder.path / ENGINE)
    return engine, f"the {engine.backend} engine"


def _restate_verdict(run: JobContext) -> dict[str, Any]:
    """The report contains its bounds. When they have changed, its verdict is made again, without a new verification."""
    path, bounds = run.folder.path / VERIFICATION, Bounds.of(run.file.job.verification.bounds)
    report = load_report(path)
    if report.bounds == bounds:
        return {}
    report.bounds = bounds
    save_report(path, report)
    return _told(report)


def _judge_engine(run: JobContext, result: Mapping[str, Any]) -> None:
    for line in DataReport.from_json(result["report"]).lines():
        tell(f"held-out data: {line}", 30, event="data")
    load_report(run.folder.path / VERIFICATION).require(**run.file.job.verification.bounds)


def _told(report: VerificationReport, judged: str = "") -> dict[str, Any]:
    """What the manifest says about a report. judged: what was verified."""
    verdict = report.verdict
    return {
        "summary": f"{counted(report.batches, 'batch')}, {verdict}{f' ({judged})' if judged else ''}",
        "verdict": str(verdict),
        "passed": verdict.passed,
        "bounds": report.bounds.set(),
    }
