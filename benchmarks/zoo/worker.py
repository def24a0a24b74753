"""The child process of the zoo's measurements: one job, one answer. Run as `python -m benchmarks.zoo.worker`.

A job names what is asked (a function below), a model and a type (`fp32`, `fp16`, `bf16`).
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
import warnings
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from calibcast.calib.errors import known
from calibcast.engines.tensorrt.limits import buildable
from calibcast.engines.tensorrt.remedies import settings_for
from calibcast.engines.tensorrt.widening import restated
from calibcast.passes import PrecisionPlan, insert_casts
from torch.export import ExportedProgram

from benchmarks.isolation import serve
from benchmarks.zoo import ZOO
from benchmarks.zoo.architecture import CALIBRATION_BATCHES
from benchmarks.zoo.judgement import (
    TOLERANCE,
    Trial,
    everything_low,
    excess_of,
    flat_inputs,
    outputs_of,
    shares_of,
    worst_error,
)

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SHOWN = 40  # high nodes per model and type


@lru_cache(maxsize=1)
def trial(model: str) -> Trial:
    """The model, exported and calibrated; the last one asked for is kept."""
    return Trial.of(ZOO[model])


@lru_cache(maxsize=1)
def measured(model: str) -> Trial:
    """The same with evidence of rounding from all calibration batches."""
    return Trial.of(ZOO[model], CALIBRATION_BATCHES)


def ours(model: str, low_type: torch.dtype) -> dict[str, Any]:
    """What calibcast's plan and cast graph are worth, and what stays high."""
    tried = trial(model)
    plan = tried.plan(low_type)
    outcome = tried.judged(plan, insert_casts(tried.program, plan))
    high = [(d.node, d.rule, d.reason, d.evidence, d.limit) for d in outcome.high]
    return {
        "shares": asdict(outcome.shares),
        "error": outcome.error,
        "half_error": outcome.half_error,
        "misses": outcome.misses,
        "high": high[:SHOWN],
        "high_count": len(high),
        "seconds": tried.seconds,
    }


def budget(model: str, low_type: torch.dtype) -> dict[str, Any]:
    """The same of a plan for the default budget, from evidence of rounding; and what that evidence took."""
    tried = measured(model)
    start = time.perf_counter()
    plan = tried.plan(low_type)
    planning = time.perf_counter() - start
    outcome = tried.judged(plan, insert_casts(tried.program, plan))
    by_rules = tried.plan_by_rules(low_type)
    shares = shares_of(tried.program, by_rules, insert_casts(tried.program, by_rules))
    half = tried.half_error(low_type, by_channel=True)
    summary = plan.rounding
    return {
        "shares": asdict(outcome.shares),
        "error": outcome.error,
        "misses": [*outcome.misses, *excess_of(outcome, shares, half, TOLERANCE[low_type])],
        "predicted_db": None if summary is None else summary.predicted_sqnr_db,
        "spread": summary is not None and summary.spread,
        "seconds": tried.seconds,
        "planning": planning,
    }


def peer(model: str, low_type: torch.dtype) -> dict[str, Any]:
    """The same of Torch-TensorRT's own autocast."""
    from benchmarks.peer_autocast import autocast

    entry = ZOO[model]
    program, changed = entry.program(), entry.program()
    inputs = flat_inputs(entry, program)
    reference = outputs_of(program, inputs)
    changed = autocast(changed, inputs[:-1], low_type)
    outputs = outputs_of(changed, inputs)
    error = worst_error(outputs, reference)
    types = [
        (one.dtype, other.dtype)
        for mine, theirs in zip(outputs, reference, strict=True)
        for one, other in zip(mine, theirs, strict=True)
        if isinstance(other, torch.Tensor)
    ]
    return {
        "shares": asdict(shares_of(program, everything_low(program, low_type), changed)),
        "error": error,
        "right": math.isfinite(error) and error <= TOLERANCE[low_type],
        "types_kept": all(one == other for one, other in types),
    }


def build(model: str, kind: str) -> dict[str, Any]:
    """The size of the engine that TensorRT-RTX builds of the fp32 program, or of a cast one, with its own settings."""
    return _built(ZOO[model].program() if kind == "fp32" else _cast(model, kind)[0])


def build_decomposed(model: str, kind: str) -> dict[str, Any]:
    """The same with attention taken apart, the remedy for a builder that cannot fuse it."""
    program = ZOO[model].program() if kind == "fp32" else _cast(model, kind)[0]
    return _built(program, decompose_attention=True)


def build_cast(model: str, kind: str) -> dict[str, Any]:
    """The cast program, with the settings and corrections that `engines.build` derives from its plan."""
    given = buildable(*_cast(model, kind), is_rtx=True)
    settings, why = settings_for(given.plan, given.program, is_rtx=True)
    built = _built(restated(given.program), **settings)
    return {**built, "settings": sorted(settings), "why": why, "kept_in_fp32": given.kept}


def crash(model: str, kind: str) -> None:
    """What a builder may do to its process: so that the isolation can be tested."""
    os.kill(os.getpid(), signal.SIGSEGV)


def _built(program: ExportedProgram, **settings: Any) -> dict[str, Any]:
    from benchmarks.rtx_builder import engine_size

    try:
        return {"bytes": engine_size(program, **settings)}
    finally:
        trial.cache_clear()  # lowering may fix symbolic sizes, which a cast program shares with the one it came from


def _cast(model: str, kind: str) -> tuple[ExportedProgram, PrecisionPlan]:
    tried = trial(model)
    plan = tried.plan(TYPES[kind])
    return insert_casts(tried.program, plan), plan


def answer(job: dict[str, str]) -> Any:
    """Do one job."""
    measures = {"ours": ours, "budget": budget, "peer": peer}
    builds = {"build": build, "build_cast": build_cast, "build_decomposed": build_decomposed, "crash": crash}
    if job["ask"] in measures:
        return measures[job["ask"]](job["model"], TYPES[job["type"]])
    if job["ask"] not in builds:
        raise ValueError(f"{job['ask']!r} is unknown; {known(job['ask'], [*measures, *builds])}")
    return builds[job["ask"]](job["model"], job["type"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    serve(answer)
