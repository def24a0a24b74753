"""Commands that look at what was measured and decided."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    ranges: Annotated[Path, typer.Argument(metavar="R.parquet", help="ranges from calibcast calibrate")],
    plan_file: Annotated[
        Path | None, typer.Option("--plan", metavar="P.json", help="show each node's precision and rule")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="how many rows; 0: all")] = 0,
) -> None:
    """Show measured ranges, worst first: what is near or beyond what fp16 holds.

    Example: calibcast report ranges.parquet --plan plan.json --rows 20
    """
    from calib.errors import MismatchError
    from calib.fingerprint import first_difference
    from calib.ranges import RangeTable
    from engines.report_table import report_table
    from passes.plan import PrecisionPlan

    table = RangeTable.load(ranges)
    decided = None if plan_file is None else PrecisionPlan.load(plan_file)
    if decided is not None:
        difference = first_difference(dict(decided.digests), table.calibration.digests)
        if difference is not None:
            raise MismatchError(f"{plan_file} and {ranges} are of different programs: {difference}")
    typer.echo(report_table(table, decided, rows or None))
