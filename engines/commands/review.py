"""Commands that show what was measured and decided: report and what-if."""

from __future__ import annotations

import math
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from calibcast.calib.file_kinds import VERIFICATION
from calibcast.engines.commands.options import PLAN, RANGES, check_file, check_inputs, existing, note

Ranges = Annotated[Path, typer.Argument(metavar="R.parquet", help="ranges from calibcast calibrate", callback=RANGES)]
VERDICT = existing("a verdict written by calibcast verify -o", VERIFICATION)
Format = Annotated[str, typer.Option("--format", metavar="table|json|csv|parquet", help="how to write it")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="write there instead of to stdout")]
Program = Annotated[str | None, typer.Option("--program", metavar="MODEL", help="a .pt2 file, or file.py:function")]
Rows = Annotated[int, typer.Option(min=0, help="how many rows; 0: all")]


def report(  # noqa: PLR0913 - a command line has options
    ranges: Ranges,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", metavar="P.json", help="show each node's precision and rule", callback=PLAN)
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="F.html", help="write one self-contained page instead of the table")
    ] = None,
    verification: Annotated[
        Path | None,
        typer.Option(metavar="J.json", help="the page shows this verdict of calibcast verify -o", callback=VERDICT),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=0, help="how many rows; 0: all; default: 40 in the table, else all")
    ] = None,
    above: Annotated[float | None, typer.Option(help="only larger magnitudes")] = None,
    op: Annotated[str | None, typer.Option(help="only this operator: linear, aten.linear, aten.linear.default")] = None,
    module: Annotated[str | None, typer.Option(help="only modules that this regex matches, from the start")] = None,
    kind: Annotated[
        str | None, typer.Option(help="only input, parameter, buffer, constant or activation tensors")
    ] = None,
    rule: Annotated[str | None, typer.Option(help="only nodes that have met this rule; needs --plan")] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="a condition on any column: 'rms>3', 'source~model.py'; repeatable")
    ] = None,
    sort: Annotated[str | None, typer.Option(help="by this column; default: worst first")] = None,
    ascending: Annotated[bool, typer.Option("--ascending", help="smallest first")] = False,
    form: Format = "table",
    output: Output = None,
) -> None:
    """Show measured ranges, worst first: what is near or beyond what fp16 holds.

    Example: calibcast report ranges.parquet --plan plan.json --above 512 --module "encoder\\..*" --rows 20
    """
    check_file(html)
    check_file(output)
    from calibcast.calib.ranges import RangeTable
    from calibcast.engines.review.frame_output import check_format, write_frame
    from calibcast.engines.review.report_table import overflowing, report_frame, report_table

    check_format(form, output)
    table = RangeTable.load(ranges)
    decided = None if plan_file is None else _plan_of(plan_file, table, ranges)
    if html is not None:
        _write_page(html, table, decided, verification, str(ranges))
        return
    frame = report_frame(
        table, decided, above=above, op=op, module=module, kind=kind, rule=rule, where=where or (), sort=sort,
        descending=not ascending,
    )  # fmt: skip
    most = 40 if rows is None and form == "table" else rows or None
    shown = frame if most is None else frame.head(most)
    text = partial(report_table, table, decided, most, frame, sort)
    write_frame(shown, text, form, output, red=overflowing(table, shown))


def what_if(  # noqa: PLR0913
    ranges: Ranges,
    program: Annotated[str, typer.Option("--program", metavar="MODEL", help="a .pt2 file, or file.py:function")],
    data_max: Annotated[
        str | None,
        typer.Option(help="limits to try, such as 256,512,inf; default: 256,512,1024,inf without rounding evidence"),
    ] = None,
    min_sqnr_db: Annotated[
        str | None, typer.Option(help="budgets to try, dB; default: 30,40,50 where rounding was measured")
    ] = None,
    low_precision_type: Annotated[str, typer.Option(help="types to try: fp16, bf16, or fp16,bf16")] = "fp16",
    range_quantile: Annotated[str, typer.Option(help="judge by these shares of the magnitudes: 1,0.9999")] = "1",
    base: Annotated[
        Path | None,
        typer.Option(
            "--plan", metavar="P.json", help="show flips against this plan; default: the defaults", callback=PLAN
        ),
    ] = None,
    init_max: Annotated[float | None, typer.Option(help="as of calibcast plan")] = None,
    max_depth_of_reduction: Annotated[int | None, typer.Option(help="as of calibcast plan")] = None,
    nodes_to_exclude: Annotated[list[str] | None, typer.Option(help="as of calibcast plan; repeatable")] = None,
    targets_to_exclude: Annotated[
        list[str] | None,
        typer.Option("--targets-to-exclude", "--op-types-to-exclude", help="as of calibcast plan; repeatable"),
    ] = None,
    nodes_to_include: Annotated[list[str] | None, typer.Option(help="as of calibcast plan; repeatable")] = None,
    targets_to_include: Annotated[list[str] | None, typer.Option(help="as of calibcast plan; repeatable")] = None,
    form: Format = "table",
    output: Output = None,
) -> None:
    """Decide again with other thresholds and types, from the same ranges.

    Example: calibcast what-if ranges.parquet --program net.pt2 --data-max 256,512,inf --low-precision-type fp16,bf16
    """
    check_inputs(program)
    check_file(output)
    from calibcast.calib.ranges import RangeTable
    from calibcast.engines.locations import load_model
    from calibcast.engines.review.frame_output import check_format, write_frame
    from calibcast.passes.alternatives import what_if as ask
    from calibcast.passes.plan import PrecisionPlan

    check_format(form, output)
    table = RangeTable.load(ranges)
    limits, budgets = _questions(data_max, min_sqnr_db, table.rounding.height > 0)
    quantiles = _numbers("--range-quantile", range_quantile)
    plan = None if base is None else PrecisionPlan.load(base)
    frame = ask(
        load_model(program), table, limits, _words(low_precision_type), quantiles, budgets, base=plan,
        init_max=init_max, max_depth_of_reduction=max_depth_of_reduction, nodes_to_exclude=nodes_to_exclude or (),
        targets_to_exclude=targets_to_exclude or (), nodes_to_include=nodes_to_include or (),
        targets_to_include=targets_to_include or (),
    )  # fmt: skip
    against = "the defaults, fp16" if base is None else str(base)
    write_frame(frame, lambda: frame.table(against), form, output)


def _plan_of(path: Path, table: Any, ranges: Path) -> Any:
    from calibcast.calib.errors import MismatchError
    from calibcast.calib.graph_digests import first_difference
    from calibcast.passes.plan import PrecisionPlan

    decided = PrecisionPlan.load(path)
    difference = first_difference(dict(decided.digests), table.calibration.digests)
    if difference is not None:
        raise MismatchError(f"{path} and {ranges} are of different programs: {difference}")
    return decided


def _write_page(html: Path, table: Any, plan: Any, verification: Path | None, title: str) -> None:
    from calibcast.calib.artifacts import written_whole
    from calibcast.engines.html_report import html_report
    from calibcast.engines.judging.report_file import read_verdict

    verdict = None if verification is None else read_verdict(verification)
    page = html_report(table, plan, verdict, title=title, made=date.fromtimestamp(Path(title).stat().st_mtime))
    with written_whole(html) as temporary:
        temporary.write_text(page, encoding="utf-8")
    note(f"wrote {html}")


def _questions(
    data_max: str | None, min_sqnr_db: str | None, measured: bool
) -> tuple[list[float | None], list[float | None]]:
    """The limits and budgets to try. By default these are budgets where rounding was measured, else limits."""
    limits: list[float | None] = [None] if measured else [256.0, 512.0, 1024.0, math.inf]
    budgets: list[float | None] = [30.0, 40.0, 50.0] if measured and data_max is None else [None]
    return (
        limits if data_max is None else [*_numbers("--data-max", data_max)],
        budgets if min_sqnr_db is None else [*_numbers("--min-sqnr-db", min_sqnr_db)],
    )


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(word) for word in _words(text)]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: give numbers with commas between", param_hint=option) from error


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
