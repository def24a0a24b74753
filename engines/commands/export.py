"""`calibcast export`: a model or an engine in a form that does not need calibcast."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from calibcast.engines.commands.options import PLAN, RANGES, check_engine, check_file, check_folder, check_inputs, say
from calibcast.engines.usage import UsageError


def export(
    source: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="an engine's folder, or a model")],
    onnx: Annotated[Path | None, typer.Option(metavar="F.onnx", help="a strongly typed ONNX model")] = None,
    engine: Annotated[
        Path | None, typer.Option(metavar="F", help="TensorRT's engine alone, into a folder or F.engine")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="P.json", help="with MODEL: the casts to insert; without, as it is", callback=PLAN),
    ] = None,
    ranges: Annotated[
        Path | None,
        typer.Option(
            metavar="R.parquet",
            help="with MODEL and --engine: build for the sizes that calibration saw",
            callback=RANGES,
        ),
    ] = None,
) -> None:
    """Write an ONNX model or a plain TensorRT engine, for software that does not know calibcast.

    The engine of a MODEL is built first: for the GPU of this machine, or ahead of time (TensorRT-RTX) without a GPU.
    For other settings, build a DIR with calibcast build first.

    Example: calibcast export engine --onnx model.onnx, then trtexec --stronglyTyped --onnx=model.onnx
    """
    if (onnx is None) == (engine is None):
        raise UsageError("say what to export to: --onnx F.onnx or --engine F")
    if plan is not None and Path(source).is_dir():
        raise UsageError(f"--plan goes with a MODEL; {source} is an engine's folder, which has its own")
    if ranges is not None and (onnx is not None or Path(source).is_dir()):
        raise UsageError("--ranges are the sizes that an engine is built for: it goes with a MODEL and --engine")
    if Path(source).is_dir():
        check_engine(Path(source))
    else:
        check_inputs(source)
    written = _onnx(source, onnx, plan) if onnx is not None else _engine(source, engine, plan, ranges)
    say(f"wrote {written}")


def _onnx(source: str, target: Path, plan_file: Path | None) -> Path:
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


def _engine(source: str, target: Path | None, plan_file: Path | None, ranges_file: Path | None) -> Path:
    from calibcast.engines.plain_engine import export_engine

    assert target is not None
    if Path(source).is_dir():
        return export_engine(source, target)
    check_folder(target)
    with tempfile.TemporaryDirectory(prefix="calibcast-export-") as name:
        folder = Path(name) / "engine"
        _build(source, plan_file, ranges_file, folder)
        return export_engine(folder, target)


def _build(source: str, plan_file: Path | None, ranges_file: Path | None, folder: Path) -> None:
    """Build the engine of a model with TensorRT, and save it."""
    import torch
    from calibcast.calib.ranges import RangeTable
    from calibcast.engines.building import build
    from calibcast.engines.locations import load_model
    from calibcast.passes.cast_insertion import insert_casts
    from calibcast.passes.plan import PrecisionPlan

    program = load_model(source)
    plan = None if plan_file is None else PrecisionPlan.load(plan_file)
    ranges = None if ranges_file is None else RangeTable.load(ranges_file)
    if ranges is not None:
        ranges.check(program)
    mixed = program if plan is None else insert_casts(program, plan)
    build(mixed, plan, ranges, backend="tensorrt", ahead_of_time=not torch.cuda.is_available()).save(folder)
