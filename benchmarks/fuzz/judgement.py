"""Judging draws: all laws on one random program, and the smallest program that still breaks the same one."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from calibcast.calib import calibrate
from calibcast.calib.aliasing import written_arguments
from calibcast.calib.execution import ProgramRunner
from calibcast.passes import classify, compare

from benchmarks.fuzz.case import Case, made_case, plan_by_hand, snapshot
from benchmarks.fuzz.laws import LAWS, numbers_stay_close
from benchmarks.fuzz.programs import NAMES, Draw, exported, inputs_of


class NotExportedError(Exception):
    """torch itself cannot export or run the drawn program: it says nothing about casts."""


@dataclass(frozen=True)
class Failure:
    """A law that a draw breaks. law: its name, or the stage that raised."""

    draw: Draw
    law: str
    message: str


def judge(draw: Draw) -> Failure | None:
    """All laws on one draw; None when all hold. Raises NotExportedError."""
    case, failure = _case_of(draw)
    if case is None:
        return failure
    # Those first that leave the cast graph's own buffers as they are: one of the others writes into them.
    laws: list[Callable[[Case], None]] = [other_batch_sizes_run] if draw.recipe.dynamic else []
    for law in [*laws, comparison_agrees, *LAWS]:
        try:
            law(case)
        except Exception as error:
            return Failure(draw, law.__name__, _told(error))
    return None


def shrunk(failure: Failure) -> Failure:
    """The same failure with as few steps as removing one at a time gives."""
    smaller = True
    while smaller:
        smaller = False
        for position in range(len(failure.draw.recipe.steps)):
            candidate = failure.draw.without(position)
            if not candidate.recipe.steps:
                continue
            try:
                found = judge(candidate)
            except NotExportedError:
                continue
            if found is not None and found.law == failure.law:
                failure, smaller = found, True
                break
    return failure


def comparison_agrees(case: Case) -> None:
    """`compare` has a row for every tensor, and for an output's node the error that the outputs show."""
    comparison = compare(case.program, case.mixed, [_batch()], progress=False)
    assert comparison.frame["dtype"].null_count() == int(comparison.frame["dtype"].is_null().sum()) == 0
    if case.smooth:
        assert comparison.first_nonfinite is None or _has_infinite_mask(comparison.first_nonfinite.absmax_reference)
    if any(written_arguments(node) for node in case.source.graph.nodes):
        return
    for spec, mine, theirs in zip(
        [s for s in case.program.graph_signature.output_specs if s.kind.name == "USER_OUTPUT"],
        case.outputs,
        case.reference,
        strict=True,
    ):
        rows = comparison.frame.filter(pl.col("node") == getattr(spec.arg, "name", ""), pl.col("output") == 0)
        if rows.height and case.smooth and theirs.is_floating_point():
            difference = float((mine.double() - theirs.double()).abs().max())
            rounding = 2e-2 * float(theirs.abs().max())  # of the cast back to the output's type
            assert abs(rows["max_abs"][0] - difference) <= rounding


def _has_infinite_mask(absmax: float) -> bool:
    """Whether what overflowed may be a mask's sentinel, which a plan drawn at random may have in fp16."""
    return absmax >= 1e8


def other_batch_sizes_run(case: Case) -> None:
    """What was exported with a dynamic batch runs at another size, and stays close there too."""
    inputs = inputs_of(seed=1, batch=5)
    reference, outputs = (ProgramRunner(p).run([v.clone() for v in inputs]) for p in (case.program, case.mixed))
    for mine, theirs in zip(outputs, reference, strict=True):
        assert type(mine) is type(theirs)
        if hasattr(mine, "shape") and case.smooth:
            assert mine.shape == theirs.shape
    if case.smooth:
        numbers_stay_close(_Run(outputs, reference))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Run:
    """What `numbers_stay_close` reads of a case."""

    outputs: list[Any]
    reference: list[Any]
    smooth: bool = True


def _case_of(draw: Draw) -> tuple[Case | None, Failure | None]:
    inputs = inputs_of()
    try:
        program = exported(draw.recipe)
        ProgramRunner(program).run([v.clone() for v in inputs])
    except Exception as error:
        raise NotExportedError(_told(error)) from error
    before = snapshot(program)
    stage = "plan"
    try:
        if draw.coins is None:
            stage = "calibrate"
            ranges = calibrate(program, [_batch()], progress=False)
            stage = "classify"
            plan = classify(program, ranges, low_precision_type=draw.low_type)
        else:
            coins = draw.coins
            plan = plan_by_hand(program, lambda i: bool(coins >> (i % 64) & 1), draw.low_type, legal=True)
        stage = "insert_casts"
        case = made_case(program, plan, inputs, draw.recipe.smooth)
        stage = "leaving the program alone"
        assert snapshot(program) == before
    except Exception as error:
        return None, Failure(draw, stage, _told(error))
    return case, None


def _batch() -> dict[str, torch.Tensor]:
    return dict(zip(NAMES, inputs_of(), strict=True))


def _told(error: Exception) -> str:
    """The error with the innermost line of this project."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    place = f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    first = (str(error).strip() or repr(error)).splitlines()[0]
    return f"{type(error).__name__}: {first[:300]}{place}"
