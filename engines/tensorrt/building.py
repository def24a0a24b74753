"""How TensorRT engines are made: built, with remedies where a build or a trial fails; and their ledgers."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from calibcast.calib.artifacts import load_json, parsed, save_json
from calibcast.calib.errors import BuildError
from calibcast.calib.marks import inserted_nodes
from calibcast.engines.handover import Recipe, Trial, plain_setting
from calibcast.engines.ledger.inspection import EngineLayer, parse_inspector, parse_listing
from calibcast.engines.ledger.ledger import ledger_of, plan_of, readers_of
from calibcast.engines.runtimes import BuildRequest
from calibcast.engines.tensorrt.attempts import Attempts
from calibcast.engines.tensorrt.builder.job import BuilderJob, BuilderResult
from calibcast.engines.tensorrt.engine_files import WIRING, engine_paths
from calibcast.engines.tensorrt.widening import restated, widened
from calibcast.passes.plan import PrecisionPlan
from torch.export import ExportedProgram

_log = logging.getLogger("calibcast")
LAYERS, _KIND = "layers.json", "layers"


def recipe_of(request: BuildRequest, job: BuilderJob, trial: Trial) -> Recipe:
    """How the engine of a request is made: with remedies where a build fails, or where its engine fails the trial.

    Raises BuildError that names the nodes at which the builder failed, and what can be done.
    """
    if request.on_failure not in {"error", "fallback"}:
        raise BuildError(f"on_failure={request.on_failure!r}: known are 'error' and 'fallback'")

    def program_of(record: Mapping[str, Any]) -> ExportedProgram:
        wide = record["widened"]
        return restated(widened(request.program, wide) if wide else request.program)

    return Recipe(partial(_built, request, job, trial), program_of)


def _built(
    request: BuildRequest, job: BuilderJob, trial: Trial, folder: Path
) -> tuple[ExportedProgram, dict[str, Any]]:
    build = Attempts(request, job, folder, trial).run()
    if build.remedies:
        trial.last = None  # it may be of another attempt
    result = build.result
    record = {
        "ahead_of_time": job.ahead_of_time,
        "isolated": request.isolate,
        "remedies": list(build.remedies),
        "widened": list(build.widened),
        "trial_problem": build.problem,
        "trial": build.seen,
        "fallback_to_pytorch": dict(result.torch_nodes),
        "build_seconds": round(result.seconds, 3),
        "stage_seconds": dict(result.stages),
        "applied_settings": {name: plain_setting(name, value) for name, value in build.job.settings.items()},
    }
    if result.torch_nodes:
        shown = ", ".join(list(result.torch_nodes)[:8])
        _log.warning("%d nodes run in PyTorch, beside the engine: %s", len(result.torch_nodes), shown)
    _write_layers(folder, result)
    return build.program, record


def _write_layers(folder: Path, result: BuilderResult) -> None:
    """Write what the ledger is made from beside the engine: the networks' layers, and the layers that the engines
    report."""
    save_json(
        folder / LAYERS,
        _KIND,
        {"made": list(result.layers), "torch_types": dict(result.torch_types), "inspected": list(result.inspected)},
    )


def ledger_in(
    folder: Path, plan: PrecisionPlan | None, program: ExportedProgram, layers: Sequence[EngineLayer]
) -> pl.DataFrame:
    """The ledger of the engine whose files are in `folder`. layers: what `layers_of` gives for this folder."""
    content = load_json(folder / LAYERS, _KIND)
    with parsed(folder / LAYERS, _KIND):
        made, torch_types = content["made"], content["torch_types"]
    inserted = inserted_nodes(program.graph)
    return ledger_of(plan_of(plan, program), made, layers, torch_types, readers_of(program), inserted)


def layers_of(folder: Path) -> list[EngineLayer]:
    """The layers of the engines in `folder`: from the inspector's output at build time, else from the listing inside
    the engine files."""
    inspected = load_json(folder / LAYERS, _KIND).get("inspected")
    if inspected:
        return [layer for text in inspected for layer in parse_inspector(text)]
    if not (folder / WIRING).is_file():
        return []
    return [layer for _, path in engine_paths(folder) for layer in _listed_in(path)]


def _listed_in(engine: Path) -> list[EngineLayer]:
    """The layers that an engine's file lists. The file is as large as the weights, so it is mapped, not read."""
    with engine.open("rb") as stream:
        if not os.fstat(stream.fileno()).st_size:  # nothing to map
            return []
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return parse_listing(mapped)
