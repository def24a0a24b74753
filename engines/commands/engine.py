"""Commands about engines: build an engine, and inspect one."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any

import typer
from calibcast.engines.commands.options import (
    PLAN,
    RANGES,
    Model,
    check_choice,
    check_engine,
    check_folder,
    check_inputs,
    say,
)
from calibcast.engines.early_builder import fork_builder
from calibcast.engines.usage import BACKEND_NAMES, LocationError, UsageError


def build(  # noqa: PLR0913 - a command line has options
    model: Model,
    plan_file: Annotated[Path, typer.Argument(metavar="P.json", help="a plan from calibcast plan")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the engine's folder")],
    ranges: Annotated[
        Path | None, typer.Option(help="kept with the engine, and gives the sizes of dynamic inputs")
    ] = None,
    backend: Annotated[str, typer.Option(metavar="auto|tensorrt|inductor|eager", help="what runs the engine")] = "auto",
    ahead_of_time: Annotated[
        bool, typer.Option("--ahead-of-time", help="build for a GPU elsewhere, without one here (TensorRT-RTX)")
    ] = False,
    strict_precision: Annotated[
        bool, typer.Option("--strict-precision", help="gate: exit code 3 when the engine contradicts the plan")
    ] = False,
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown", help="let --strict-precision pass nodes that could not be found")
    ] = False,
    on_failure: Annotated[
        str, typer.Option(metavar="error|fallback", help="when the builder fails: say so, or try a remedy")
    ] = "error",
    build_timeout: Annotated[float, typer.Option(min=1.0, help="seconds after which a builder counts as hung")] = 1800,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="neither look for the engine nor keep it")] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option("--setting", metavar="NAME=VALUE", help="of Torch-TensorRT, by its own name; repeatable"),
    ] = None,
) -> None:
    """Insert the casts of a plan into MODEL and build an engine.

    Example: calibcast build net.pt2 plan.json --ranges ranges.parquet -o engine --setting optimization_level=5
    """
    check_inputs(model)
    check_choice("--on-failure", on_failure, ("error", "fallback"))
    check_choice("--backend", backend, ("auto", *BACKEND_NAMES))
    PLAN(plan_file), RANGES(ranges)
    settings = dict(_setting(text) for text in setting or ())
    check_folder(output)
    fork_builder(backend, ahead_of_time, bool(settings.get("isolate", True)))
    from calibcast.calib.ranges import RangeTable
    from calibcast.engines.backends import chosen, start_early
    from calibcast.engines.building import build as run
    from calibcast.engines.ledger.ledger_text import summary
    from calibcast.engines.locations import load_model
    from calibcast.passes.cast_insertion import insert_casts
    from calibcast.passes.plan import PrecisionPlan

    _check_settings(chosen(backend, ahead_of_time)[0], settings, ahead_of_time)
    start_early(backend, ahead_of_time, bool(settings.get("isolate", True)))
    program, decided = load_model(model), PrecisionPlan.load(plan_file)
    table = None if ranges is None else RangeTable.load(ranges)
    if table is not None:
        table.check(program)
    engine = run(
        insert_casts(program, decided),
        decided,
        table,
        backend=backend,
        ahead_of_time=ahead_of_time,
        strict_precision=strict_precision,
        allow_unknown=allow_unknown,
        on_failure=on_failure,
        build_timeout=build_timeout,
        cache=not no_cache,
        **settings,
    )
    engine.save(output)
    say(f"{engine.plan}\nbackend {engine.backend} ({engine.why})\n{summary(engine.ledger)}")
    for line in record_lines(dict(engine.record)):
        say(line)
    say(f"wrote {output}")


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="an engine's folder")],
    rows: Annotated[int, typer.Option(min=0, help="how many nodes; 0: all")] = 0,
) -> None:
    """Show which engine layer each planned node went into, and in which types. Needs no GPU.

    Example: calibcast inspect engine --rows 20
    """
    check_engine(folder)
    from calibcast.engines.engine import read_ledger, read_manifest, read_plan
    from calibcast.engines.ledger.ledger_text import ledger_text

    manifest, ledger = read_manifest(folder), read_ledger(folder)
    plan = read_plan(folder)
    built = ", ".join(f"{name} {version}" for name, version in manifest.get("built_with", {}).items())
    say(f"{folder}: backend {manifest['backend']} ({manifest['why']}), built with {built}")
    for line in record_lines(manifest.get("build") or {}):
        say(line)
    if plan is not None and plan.exponents:
        say(f"a rescaled program: {len(plan.exponents)} tensors are stored as powers of two of themselves")
    say(ledger_text(ledger, rows or None))


def record_lines(record: dict[str, Any]) -> list[str]:
    """What a reader should know about how an engine was built, one fact a line."""
    lines = []
    if record.get("ahead_of_time"):
        lines.append("built ahead of time: for RTX GPUs of compute capability 8.6, 8.9, 12.0 and 12.1")
    if record.get("set_by_plan"):
        lines.append(f"set because of the plan: {record['set_by_plan']}")
    lines += [f"remedy applied: {remedy}" for remedy in record.get("remedies", [])]
    outside = record.get("fallback_to_pytorch") or {}
    if outside:
        lines.append(f"{len(outside)} nodes run in PyTorch:")
        lines += [f"  {node}: {why}" for node, why in outside.items()]
    if (record.get("cache") or {}).get("hit"):
        lines.append("the engine comes from the cache")
    return lines


def _check_settings(backend: Any, settings: dict[str, Any], ahead_of_time: bool) -> None:
    from calibcast.calib.errors import BuildError

    try:
        backend.check_settings(settings, ahead_of_time)
    except BuildError as error:
        raise UsageError(f"--setting: {error}") from error


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise LocationError(f"--setting {text!r}: expected NAME=VALUE, such as optimization_level=5")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a plain word, such as tiling_optimization_level=full
