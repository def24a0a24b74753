"""The way out of calibcast: `calibcast export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from calibcast.engines.commands.options import check_folder
from calibcast.engines.usage import UsageError


def export(
    source: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="an engine's folder, or a model")],
    onnx: Annotated[Path | None, typer.Option(metavar="F.onnx", help="a strongly typed ONNX model")] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="P.json", help="with MODEL: the casts to insert; without, it is left as it is"),
    ] = None,
) -> None:
    """Leave with an ONNX model, for what does not know calibcast.

    Example: calibcast export engine --onnx model.onnx, then trtexec --stronglyTyped --onnx=model.onnx
    """
    from calibcast.engines.engine import read_program
    from calibcast.engines.locations import load_model
    from calibcast.engines.onnx_export.exporting import export_onnx
    from calibcast.passes.cast_insertion import insert_casts
    from calibcast.passes.plan import PrecisionPlan

    if onnx is None:
        raise UsageError("nothing to export to: give --onnx F.onnx")
    check_folder(onnx)
    if Path(source).is_dir():
        if plan is not None:
            raise UsageError(f"--plan goes with a MODEL; {source} is an engine's folder, which has its own")
        mixed, decided = read_program(source)
    else:
        mixed = load_model(source)
        decided = None if plan is None else PrecisionPlan.load(plan)
        mixed = mixed if decided is None else insert_casts(mixed, decided)
    typer.echo(f"wrote {export_onnx(mixed, decided, onnx)}")
