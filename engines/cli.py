"""The command line: thin layers over the Python calls, reading files and writing files.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done; 2 a bad command line; 3 a gate that the
user set said no; 130 and 143 for signals; 1 everything else.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from calib.errors import BatchError, CalibcastError, GateError
from engines.locations import LocationError

app = typer.Typer(
    name="calibcast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Calibration-driven autocast for Torch-TensorRT: your data decides which nodes stay in fp32.\n\n"
    "The stages: calibrate MODEL on data, plan from the ranges, build an engine, verify it on other data. "
    "MODEL is a .pt2 file, or file.py:function that returns an ExportedProgram or (module, args[, kwargs[, "
    "dynamic_shapes]]). Data is file.py:function that returns a dataloader. Start with: calibcast demo",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a .pt2 file, or file.py:function")]
Data = Annotated[str, typer.Option("--data", metavar="LOC", help="file.py:function that returns a dataloader")]
Transform = Annotated[
    str | None,
    typer.Option("--transform", metavar="LOC", help="file.py:function from a batch to the model's inputs"),
]
MaxBatches = Annotated[int | None, typer.Option("--max-batches", min=1, help="stop after so many batches")]


@app.command()
def calibrate(  # noqa: PLR0913 - a command line has options
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="the range table to write, Parquet")],
    transform: Transform = None,
    max_batches: MaxBatches = None,
    device: Annotated[
        str | None, typer.Option(help="where to run: cpu, cuda, cuda:1; default: where the model is")
    ] = None,
    no_histogram: Annotated[bool, typer.Option("--no-histogram", help="ranges only: faster")] = False,
    on_nonfinite: Annotated[str, typer.Option(help="NaN or Inf in a batch: warn, skip or stop")] = "warn",
) -> None:
    """Run data through MODEL and write the range of every tensor.

    Example: calibcast calibrate net.pt2 --data loaders.py:calibration -o ranges.parquet
    """
    from calib.calibration import calibrate as run

    program, batches, function = _inputs(model, data, transform)
    _check_folder(output)
    try:
        ranges = run(
            program, batches, transform=function, max_batches=max_batches, histogram=not no_histogram,
            device=device, on_nonfinite=on_nonfinite,
        )  # fmt: skip
    except BatchError as error:
        if error.ranges is not None:
            partial = output.with_suffix(f".partial{output.suffix}")
            error.ranges.save(partial)
            _note(f"what was measured before is in {partial}: {error.ranges}")
        raise
    ranges.save(output)
    typer.echo(f"{ranges}\nwrote {output}")


@app.command()
def plan(  # noqa: PLR0913
    model: Model,
    ranges: Annotated[Path | None, typer.Argument(metavar="R.parquet", help="ranges from calibcast calibrate")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the plan to write, JSON")] = None,
    low_precision_type: Annotated[str, typer.Option(help="fp16 or bf16")] = "fp16",
    data_max: Annotated[float, typer.Option(help="largest magnitude of inputs and activations; inf: no limit")] = 512.0,
    init_max: Annotated[
        float | None, typer.Option(help="largest magnitude of weights; default: the type's largest")
    ] = None,
    max_depth_of_reduction: Annotated[int | None, typer.Option(help="most terms summed into one element")] = None,
    nodes_to_exclude: Annotated[
        list[str] | None, typer.Option(help="regex on node name or module path; repeatable")
    ] = None,
    targets_to_exclude: Annotated[
        list[str] | None,
        typer.Option("--targets-to-exclude", "--op-types-to-exclude", help="such as aten.add.Tensor; repeatable"),
    ] = None,
    nodes_to_include: Annotated[list[str] | None, typer.Option(help="low whatever the rules say; repeatable")] = None,
    targets_to_include: Annotated[list[str] | None, typer.Option(help="low whatever the rules say; repeatable")] = None,
    range_quantile: Annotated[float, typer.Option(help="judge data_max by this share of the magnitudes")] = 1.0,
) -> None:
    """Decide the type of every node of MODEL from its ranges, and say why.

    Without ranges only the rules that need none apply. Example: calibcast plan net.pt2 ranges.parquet -o plan.json
    """
    from calib.ranges import RangeTable
    from engines.locations import load_model
    from passes.classification import classify

    if output is not None:
        _check_folder(output)
    decided = classify(
        load_model(model),
        None if ranges is None else RangeTable.load(ranges),
        low_precision_type=low_precision_type,
        data_max=data_max,
        init_max=init_max,
        max_depth_of_reduction=max_depth_of_reduction,
        nodes_to_exclude=nodes_to_exclude or (),
        targets_to_exclude=targets_to_exclude or (),
        nodes_to_include=nodes_to_include or (),
        targets_to_include=targets_to_include or (),
        range_quantile=range_quantile,
    )
    typer.echo(str(decided))
    for name in decided.high_precision_nodes:
        typer.echo(f"  {decided.explain(name)}")
    if output is not None:
        decided.save(output)
        typer.echo(f"wrote {output}")


@app.command()
def build(
    model: Model,
    plan_file: Annotated[Path, typer.Argument(metavar="P.json", help="a plan from calibcast plan")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the engine's folder")],
    ranges: Annotated[
        Path | None, typer.Option(help="kept with the engine, and gives the sizes of dynamic inputs")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, tensorrt or eager")] = "auto",
) -> None:
    """Insert the casts of a plan into MODEL and build an engine.

    Example: calibcast build net.pt2 plan.json --ranges ranges.parquet -o engine
    """
    from calib.ranges import RangeTable
    from engines.building import build as run
    from engines.locations import load_model
    from passes.cast_insertion import insert_casts
    from passes.plan import PrecisionPlan

    program, decided = load_model(model), PrecisionPlan.load(plan_file)
    table = None if ranges is None else RangeTable.load(ranges)
    if table is not None:
        table.check(program)
    engine = run(insert_casts(program, decided), decided, table, backend=backend)
    engine.save(output)
    typer.echo(f"{decided}\nbackend {engine.backend} ({engine.why})\nwrote {output}")


@app.command()
def verify(  # noqa: PLR0913
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="an engine's folder")],
    model: Model,
    data: Data,
    transform: Transform = None,
    max_batches: MaxBatches = None,
    min_sqnr_db: Annotated[float | None, typer.Option(help="gate: least SQNR of each output, dB")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the report to write, JSON")] = None,
) -> None:
    """Compare an engine with the fp32 MODEL on data that calibration did not see. Exit code 3 when the gate says no.

    Example: calibcast verify engine net.pt2 --data loaders.py:held_out --min-sqnr-db 40
    """
    from engines.engine import Engine
    from engines.verification import verify as run

    program, batches, function = _inputs(model, data, transform)
    if output is not None:
        _check_folder(output)
    report = run(Engine.load(folder), program, batches, transform=function, max_batches=max_batches)
    typer.echo(str(report))
    if output is not None:
        _write_report(output, report)
        typer.echo(f"wrote {output}")
    if min_sqnr_db is not None:
        report.require(min_sqnr_db=min_sqnr_db)
    elif not report.passed:
        raise CalibcastError("the engine fails: it is NaN or Inf where the fp32 model is finite")


@app.command()
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


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the artifacts")] = Path("calibcast-demo"),
) -> None:
    """The whole path on real handwritten digits, with a network that fp16 cannot run. Under a minute, no GPU needed."""
    from engines.demo import run_demo

    run_demo(output, typer.echo)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `calibcast`: every error as one message and an exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    warnings.showwarning = lambda message, *_, **__: _note(f"warning: {message}")
    # Of torch and its serialisers, on loading files; nothing that a user could act on.
    warnings.filterwarnings("ignore", module=r"torch\..*")
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        outcome = app(arguments, standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        _note("interrupted")
        return 130
    except CalibcastError as error:
        _note(str(error) if isinstance(error, GateError) else f"error: {error}")
        return _EXIT_CODES.get(type(error), 1)
    except Exception as error:
        # Click's usage errors know how to show themselves; typer does not export their base.
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):
            raise
        error.show()
        return int(error.exit_code)


_EXIT_CODES: dict[type[Exception], int] = {LocationError: 2, GateError: 3}


def _terminated(*_: Any) -> None:
    _note("terminated")
    sys.exit(143)


def _note(message: str) -> None:
    typer.echo(message, err=True)


def _inputs(model: str, data: str, transform: str | None) -> tuple[Any, Any, Any]:
    from engines.locations import load_data, load_function, load_model

    function = None if transform is None else load_function(transform)
    return load_model(model), load_data(data), function


def _check_folder(output: Path) -> None:
    """Before hours of work, not after: can the result be written?"""
    folder = output.parent
    if not folder.is_dir():
        raise LocationError(f"{output}: there is no folder {folder}")


def _write_report(path: Path, report: Any) -> None:
    from calib.artifacts import save_json

    # JSON has no inf and NaN; as text they survive every reader.
    rows = [
        {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        for row in report.frame.to_dicts()
    ]
    content = {
        "passed": report.passed,
        "batches": report.batches,
        "problems": list(report.problems),
        "reference_problem": report.reference_problem,
        "metrics": dict(report.metrics),
        "outputs": json.loads(json.dumps(rows)),
    }
    save_json(path, "verification", content)


if __name__ == "__main__":
    main()
