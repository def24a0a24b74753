"""The command that shows what changed between two tables or two plans, and fails a build when it must not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from calibcast.calib.file_kinds import PLAN as PLAN_FILE
from calibcast.calib.file_kinds import RANGES_OR_PLAN, kind_of
from calibcast.engines.commands.options import check_file, check_inputs, existing
from calibcast.engines.commands.review import Format, Output, Rows
from calibcast.engines.usage import UsageError

EITHER = existing("a ranges file written by calibcast calibrate, or a plan", RANGES_OR_PLAN)


def diff(  # noqa: PLR0913
    old: Annotated[Path, typer.Argument(metavar="OLD", help="a range table, or a plan", callback=EITHER)],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="another of the same kind", callback=EITHER)],
    program: Annotated[
        str | None,
        typer.Option("--program", metavar="MODEL", help="the model of NEW: decide by all rules, not by tensors alone"),
    ] = None,
    data_max: Annotated[float, typer.Option(help="the limit that decisions are made by")] = 512.0,
    low_precision_type: Annotated[str, typer.Option(help="fp16 or bf16")] = "fp16",
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            help="exit code 3: 'flip' when a decision flips; 'headroom=2' when a tensor has lost headroom and has "
            "less than 2x left below 65504, or turned NaN or Inf; repeatable"
        ),
    ] = None,
    rows: Rows = 20,
    form: Format = "table",
    output: Output = None,
) -> None:
    """What changed: new and gone tensors, ranges that grew or shrank, headroom lost, decisions that flip.

    Tables of another export of the model are matched by module path and structure. --format json, csv and parquet have
    all rows. Example: calibcast diff monday.parquet friday.parquet --fail-on flip --fail-on headroom=2
    """
    from calibcast.calib.errors import GateError, MismatchError
    from calibcast.engines.review.diff_text import (
        compared_tensors,
        diff_frame,
        diff_text,
        fewest_tensors,
        plan_diff_text,
        require_compared,
        require_headroom,
        require_no_flip,
    )
    from calibcast.engines.review.frame_output import check_format, write_frame

    gates = [_gate(text) for text in fail_on or ()]
    _check_diff(program, data_max)
    check_file(output)
    check_format(form, output)
    if _kind_of_both(old, new) in PLAN_FILE.kinds:
        flips = _plans_diff(old, new)
        write_frame(flips, lambda: plan_diff_text(flips, rows or None), form, output)
        if any(gate is not None for gate in gates):
            raise typer.BadParameter("headroom is of ranges, and these are plans", param_hint="--fail-on")
        if gates:
            require_compared(*_shared_nodes(old, new), "node")
            require_no_flip(flips)
        return
    try:
        changes, flips, by = _ranges_diff(old, new, program, data_max, low_precision_type)
    except MismatchError as error:
        if not gates:
            raise
        raise GateError(f"the alarm cannot compare: {error}") from error
    write_frame(diff_frame(changes, flips), lambda: diff_text(changes, flips, by, rows or None), form, output)
    if gates:
        require_compared(compared_tensors(changes), fewest_tensors(changes), "computed tensor")
    for gate in gates:
        if gate is None:
            require_no_flip(flips)
        else:
            require_headroom(changes, gate)


def _check_diff(program: str | None, data_max: float) -> None:
    if program is not None:
        check_inputs(program)
    if not data_max > 0:
        raise UsageError(f"--data-max {data_max:g}: give a positive number, or inf")


def _kind_of_both(old: Path, new: Path) -> str:
    kinds = kind_of(old), kind_of(new)
    if kinds[0] != kinds[1]:
        raise UsageError(f"{old} is {kinds[0]}, and {new} is {kinds[1]}: give two of one kind")
    return kinds[0]


def _ranges_diff(old: Path, new: Path, program: str | None, data_max: float, low_type: str) -> tuple[Any, Any, str]:
    from calibcast.calib.range_diff import range_diff
    from calibcast.calib.ranges import RangeTable
    from calibcast.passes.tensor_diff import tensor_decision_diff

    changes = range_diff(RangeTable.load(old), RangeTable.load(new))
    if program is None:
        flips = tensor_decision_diff(changes, low_type, data_max)
        return changes, flips, f"data_max {data_max:g}, each tensor alone; --program MODEL asks all rules"
    if changes.new.calibration.ends_only:
        raise UsageError(
            "--program decides by the ranges of all tensors, and a table of an engine in service has inputs and "
            "outputs alone: leave --program out"
        )
    from calibcast.engines.locations import load_model
    from calibcast.passes.plan_diff import decision_diff

    flips = decision_diff(changes, load_model(program), low_precision_type=low_type, data_max=data_max)
    return changes, flips, f"data_max {data_max:g}, all rules"


def _shared_nodes(old: Path, new: Path) -> tuple[int, int]:
    """How many kinds of nodes, by operator and module, both plans have, and how many the smaller one has."""
    from calibcast.passes.plan import PrecisionPlan

    places = [{(d.op, d.module) for d in PrecisionPlan.load(path).decisions} for path in (old, new)]
    return len(places[0] & places[1]), min(map(len, places))


def _plans_diff(old: Path, new: Path) -> Any:
    from calibcast.passes.plan import PrecisionPlan
    from calibcast.passes.plan_diff import plan_diff

    return plan_diff(PrecisionPlan.load(old), PrecisionPlan.load(new))


def _gate(text: str) -> float | None:
    """Parse a gate: None for `flip`; the least headroom, 2.0, for `headroom=2`."""
    if text == "flip":
        return None
    name, _, value = text.partition("=")
    try:
        least = float(value) if name == "headroom" else 0.0
    except ValueError:
        least = 0.0
    if not least > 0:
        raise typer.BadParameter(f"{text!r}: known are flip and headroom=NUMBER", param_hint="--fail-on")
    return least
