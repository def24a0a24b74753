"""The command that finds the layer which half precision breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from calibcast.engines.commands.options import (
    PLAN,
    Data,
    MaxBatches,
    Model,
    Transform,
    check_device,
    check_inputs,
    inputs,
    say,
)


def diagnose(  # noqa: PLR0913 - a command line has options
    model: Model,
    plan_file: Annotated[Path, typer.Argument(metavar="P.json", help="a plan from calibcast plan", callback=PLAN)],
    data: Data,
    transform: Transform = None,
    max_batches: MaxBatches = None,
    device: Annotated[
        str | None, typer.Option(help="where to run: cpu, cuda, cuda:1; default: where the model is")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="how many nodes of each list")] = 12,
) -> None:
    """Which layer is it? Run MODEL and its cast graph side by side, and show where error enters and what to do.

    No engine is built. Example: calibcast diagnose net.pt2 plan.json --data loaders.py:held_out --max-batches 4
    """
    check_inputs(model, data, transform)
    check_device(device)
    from calibcast.engines.review.diagnosis import diagnosis_text
    from calibcast.passes.cast_insertion import insert_casts
    from calibcast.passes.comparison import compare
    from calibcast.passes.plan import PrecisionPlan

    program, batches, function = inputs(model, data, transform)
    plan = PrecisionPlan.load(plan_file)
    mixed = insert_casts(program, plan)
    comparison = compare(program, mixed, batches, transform=function, max_batches=max_batches, device=device)
    say(diagnosis_text(program, plan, comparison, rows))
