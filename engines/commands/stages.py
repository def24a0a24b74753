"""The stages as commands: calibrate, plan, verify (build is in `engine.py`), and the demo of all stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from calibcast.calib.errors import BatchError, CalibcastError
from calibcast.engines.commands.options import (
    RANGES,
    CarryState,
    Data,
    MaxBatches,
    Model,
    Transform,
    check_choice,
    check_device,
    check_engine,
    check_file,
    check_inputs,
    check_writable_folder,
    inputs,
    note,
    say,
    transform_at,
)
from calibcast.engines.commands.rescaling import write_rescaled
from calibcast.engines.judging.bounds import Bounds
from calibcast.engines.usage import UsageError


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
    on_nonfinite: Annotated[
        str, typer.Option(metavar="warn|skip|stop", help="what to do with a batch that gives NaN or Inf")
    ] = "warn",
    rounding_batches: Annotated[
        int, typer.Option(min=0, help="also measure on so many batches what rounding does to the outputs; 0: not")
    ] = 4,
    carry_state: CarryState = False,
) -> None:
    """Run data through MODEL and write the range of every tensor.

    Example: calibcast calibrate net.pt2 --data loaders.py:calibration -o ranges.parquet
    """
    check_choice("--on-nonfinite", on_nonfinite, ("warn", "skip", "stop"))
    check_inputs(model, data, transform)
    check_file(output)
    check_device(device)
    from calibcast.calib.calibration import calibrate as run

    program, batches, function = inputs(model, data, transform)
    try:
        ranges = run(
            program, batches, transform=function, max_batches=max_batches, histogram=not no_histogram,
            device=device, on_nonfinite=on_nonfinite, rounding_batches=rounding_batches, carry_state=carry_state,
        )  # fmt: skip
    except BatchError as error:
        if error.ranges is not None:
            partial = output.with_suffix(f".partial{output.suffix}")
            error.ranges.save(partial)
            note(f"what was measured before is in {partial}: {error.ranges}")
        raise
    ranges.save(output)
    say(f"{ranges}\nwrote {output}")


def plan(  # noqa: PLR0913
    model: Model,
    ranges: Annotated[
        Path | None, typer.Argument(metavar="R.parquet", help="ranges from calibcast calibrate", callback=RANGES)
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the plan to write, JSON")] = None,
    low_precision_type: Annotated[str, typer.Option(metavar="fp16|bf16", help="what runs low")] = "fp16",
    min_sqnr_db: Annotated[
        float | None,
        typer.Option(help="budget: least SQNR of each output channel, dB; default: 40 in fp16, 26 in bf16"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="LOC", help="run the plan on the first batches, and mend it until it meets the budget"),
    ] = None,
    transform: Transform = None,
    max_batches: Annotated[int, typer.Option(min=1, help="batches of --data to run")] = 8,
    carry_state: CarryState = False,
    data_max: Annotated[
        float | None,
        typer.Option(
            help="largest magnitude of inputs and activations; inf: no limit; default: 512 where rounding was not "
            "measured, else none"
        ),
    ] = None,
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
    wide_accumulation: Annotated[
        list[str] | None,
        typer.Option(help="operator that the backend sums up in fp32 anyway, such as layer_norm; repeatable"),
    ] = None,
    rescale: Annotated[
        bool,
        typer.Option("--rescale", help="make it fit by powers of two first; program and ranges go beside -o"),
    ] = False,
    rows: Annotated[int, typer.Option(min=0, help="how many of the nodes that stay to show; 0: all")] = 20,
) -> None:
    """Decide the type of every node of MODEL from its ranges, and say why.

    Without ranges only the rules that need none apply. With --data the plan is run, and exit code 3 says that none
    meets the budget. Example: calibcast plan net.pt2 ranges.parquet --data loaders.py:calibration -o plan.json
    """
    check_inputs(model, data, transform)
    check_file(output)
    from calibcast.calib.ranges import RangeTable
    from calibcast.engines.locations import load_model
    from calibcast.engines.review.plan_table import high_nodes

    if rescale and (ranges is None or output is None):
        raise UsageError(
            "--rescale needs ranges, and -o: the plan is of the rescaled program, which is written beside it"
        )
    if data is not None and ranges is None:
        raise typer.BadParameter("the plan is mended by what calibration measured: give R.parquet", param_hint="--data")
    program, table = load_model(model), None if ranges is None else RangeTable.load(ranges)
    settings: dict[str, Any] = dict(
        low_precision_type=low_precision_type,
        min_sqnr_db=min_sqnr_db,
        data_max=data_max,
        init_max=init_max,
        max_depth_of_reduction=max_depth_of_reduction,
        nodes_to_exclude=nodes_to_exclude or (),
        targets_to_exclude=targets_to_exclude or (),
        nodes_to_include=nodes_to_include or (),
        targets_to_include=targets_to_include or (),
        range_quantile=range_quantile,
        wide_accumulation=wide_accumulation or (),
    )
    runs = None if data is None else _Runs(data, transform, carry_state)
    if rescale and table is not None and output is not None:
        more = {} if runs is None else runs.arguments()
        program, table = write_rescaled(program, table, output.with_suffix(".pt2"), settings | more)
    decided = _decided(program, table, settings, runs, max_batches)
    say(f"{decided}\n{high_nodes(decided, rows or None)}")
    if output is not None:
        decided.save(output)
        say(f"wrote {output}")


class _Runs(NamedTuple):
    """Where the batches come from on which a plan is run."""

    data: str
    transform: str | None
    carry_state: bool

    def arguments(self) -> dict[str, Any]:
        """Arguments of `tune` and `rescale`. The loader is made again for each, since it may be an iterator."""
        from calibcast.engines.locations import load_data

        function = transform_at(self.transform)
        return {"dataloader": load_data(self.data), "transform": function, "carry_state": self.carry_state}


def _decided(program: Any, table: Any, settings: dict[str, Any], runs: _Runs | None, max_batches: int) -> Any:
    """The plan by the table alone, or run on data and mended."""
    from calibcast.passes.classification import classify
    from calibcast.passes.tuning import tune

    if runs is None or table is None:
        return classify(program, table, **settings)
    return tune(program, table, **runs.arguments(), max_batches=max_batches, **settings)


def verify(  # noqa: PLR0913
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="an engine's folder")],
    model: Model,
    data: Data,
    transform: Transform = None,
    max_batches: MaxBatches = None,
    min_sqnr_db: Annotated[float | None, typer.Option(help="gate: least SQNR of each output, dB")] = None,
    min_variation_db: Annotated[
        float | None,
        typer.Option(help="gate: the same, against each output's variation, its channels' means apart"),
    ] = None,
    min_channel_db: Annotated[float | None, typer.Option(help="gate: least SQNR of any channel, dB")] = None,
    min_channel_variation_db: Annotated[
        float | None, typer.Option(help="gate: the same, against the channel's variation")
    ] = None,
    min_equal: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="gate: least share of equal elements of each integer or boolean output"),
    ] = None,
    carry_state: CarryState = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the report to write, JSON")] = None,
) -> None:
    """Compare an engine with the fp32 MODEL on data that calibration did not see. Exit code 3 when the gate says no.

    Example: calibcast verify engine net.pt2 --data loaders.py:held_out --min-sqnr-db 40
    """
    check_inputs(model, data, transform)
    check_engine(folder)
    check_file(output)
    bounds = {
        "min_sqnr_db": min_sqnr_db, "min_variation_db": min_variation_db, "min_channel_db": min_channel_db,
        "min_channel_variation_db": min_channel_variation_db, "min_equal": min_equal,
    }  # fmt: skip
    Bounds.of(bounds)  # before torch is imported
    from calibcast.engines.engine import Engine
    from calibcast.engines.judging.report_file import save_report
    from calibcast.engines.judging.verification import verify as run

    program, batches, function = inputs(model, data, transform)
    engine = Engine.load(folder)
    report = run(
        engine, program, batches, transform=function, max_batches=max_batches, bounds=bounds, carry_state=carry_state
    )
    say(str(report))
    if output is not None:
        save_report(output, report)
        say(f"wrote {output}")
    if report.bounds.set():
        report.require()
    elif not report.passed:
        raise CalibcastError("the engine fails: it is NaN or Inf where the fp32 model is finite")


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the artifacts")] = Path("calibcast-demo"),
) -> None:
    """The whole path on real handwritten digits, with a network that fp16 cannot run. Under a minute, no GPU needed."""
    check_writable_folder(output)
    from calibcast.engines.demo import run_demo

    run_demo(output, say)
