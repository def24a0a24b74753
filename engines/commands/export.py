"""The way out of calibcast: `calibcast export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from calibcast.engines.commands.options import PLAN, check_file, check_inputs, say
from calibcast.engines.usage import UsageError


def export(
    source: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="an engine's folder, or a model")],
    onnx: Annotated[Path | None, typer.Option(metavar="F.onnx", help="a strongly typed ONNX model")] = None,
    engine: Annotated[
        Path | None, typer.Option(metavar="F", help="of DIR: TensorRT's engine alone, into a folder or F.engine")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="P.json", help="with MODEL: the casts to insert; without, as it is", callback=PLAN),
    ] = None,
) -> None:
    """Leave with an ONNX model or a plain TensorRT engine, for what does not know calibcast.

    Example: calibcast export engine --onnx model.onnx, then trtexec --stronglyTyped --onnx=model.onnx
    """
    if (onnx is None) == (engine is None):
        raise UsageError("say what to export to: --onnx F.onnx or --engine F")
    if plan is not None and Path(source).is_dir():
        raise UsageError(f"--plan goes with a MODEL; {source} is an engine's folder, which has its own")
    written = _onnx(source, onnx, plan) if onnx is not None else _engine(source, engine)
    say(f"wrote {written}")


def _onnx(source: str, target: Path, plan_file: Path | None) -> Path:
    if not Path(source).is_dir():
        check_inputs(source)
    check_file(target)
    from calibcast.engines.engine import read_program
    from calibcast.engines.locations import load_model
    from calibcast.engines.onnx_export.exporting import export_onnx
    from calibcast.passes.cast_insertion import insert_casts
    from calibcast.passes.plan import PrecisionPlan

    if Path(source).is_dir():
        return export_onnx(*read_program(source), target)
    program = load_model(source)
    plan = None if plan_file is None else PrecisionPlan.load(plan_file)
    return export_onnx(program if plan is None else insert_casts(program, plan), plan, target)


def _engine(source: str, target: Path | None) -> Path:
    from calibcast.engines.plain_engine import export_engine

    if not Path(source).is_dir():
        raise UsageError(f"--engine takes the folder of an engine, and {source} is none: calibcast build makes one")
    assert target is not None
    return export_engine(source, target)
