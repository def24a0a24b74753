"""`calibcast rescale`: writes a program that fits the low type, and its ranges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from calibcast.engines.commands.options import (
    RANGES,
    CarryState,
    Model,
    Transform,
    check_file,
    check_inputs,
    inputs,
    say,
)

if TYPE_CHECKING:
    from calibcast.calib.ranges import RangeTable
    from torch.export import ExportedProgram


def rescale(  # noqa: PLR0913 - a command line has options
    model: Model,
    ranges: Annotated[
        Path, typer.Argument(metavar="R.parquet", help="ranges from calibcast calibrate", callback=RANGES)
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="the program to write, .pt2; its ranges go beside it")],
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="LOC", help="run both programs on its first batches, as file.py:name"),
    ] = None,
    transform: Transform = None,
    carry_state: CarryState = False,
    data_max: Annotated[float | None, typer.Option(help="largest magnitude of inputs and activations")] = None,
) -> None:
    """Make MODEL fit fp16 by powers of two: its fp32 results keep their bits. Then plan and build the new program.

    Example: calibcast rescale net.pt2 ranges.parquet -o fitted.pt2
    """
    check_inputs(model, data, transform)
    check_file(output)
    from calibcast.calib.ranges import RangeTable
    from calibcast.engines.locations import load_model

    settings: dict[str, Any] = {"data_max": data_max}
    if data is None:
        program = load_model(model)
    else:
        program, settings["dataloader"], settings["transform"] = inputs(model, data, transform)
        settings["carry_state"] = carry_state
    write_rescaled(program, RangeTable.load(ranges), output, settings)


def write_rescaled(
    program: ExportedProgram, table: RangeTable, output: Path, settings: dict[str, Any]
) -> tuple[ExportedProgram, RangeTable]:
    """Rescale the program, print what was done, and write the new program to `output` and its ranges beside it."""
    from calibcast.calib.artifacts import save_program
    from calibcast.passes.rescaling.rescaling import rescale as run

    fitted = run(program, table, **settings)
    beside = output.with_suffix(".parquet")
    save_program(fitted.program, output)
    fitted.ranges.save(beside)
    say(f"{fitted}\nwrote {output} and {beside}")
    return fitted.program, fitted.ranges
