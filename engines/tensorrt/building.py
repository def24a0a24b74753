"""From a request to an engine's files: taken from the cache, or built, with remedies where a build fails."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
from calibcast.calib.artifacts import load_json, parsed, save_json
from calibcast.calib.artifacts import versions as own_versions
from calibcast.calib.errors import BuildError
from calibcast.calib.marks import inserted_nodes
from calibcast.calib.program_digests import node_digests, weights_hash
from calibcast.engines.ledger.inspection import EngineLayer, parse_inspector, parse_listing
from calibcast.engines.ledger.ledger import ledger_of, plan_of, readers_of
from calibcast.engines.runtimes import BuildRequest
from calibcast.engines.tensorrt.attempts import Attempts, Trial
from calibcast.engines.tensorrt.builder.job import BuilderJob, BuilderResult, encoded
from calibcast.engines.tensorrt.cache import EngineCache, cache_key, default_folder
from calibcast.engines.tensorrt.engine_files import WIRING, engine_paths
from calibcast.engines.tensorrt.widening import restated, widened
from calibcast.passes.plan import PrecisionPlan
from torch.export import ExportedProgram

_log = logging.getLogger("calibcast")
LAYERS, _KIND = "layers.json", "layers"


def build_files(
    request: BuildRequest, job: BuilderJob, folder: Path, versions: Mapping[str, str], trial: Trial
) -> tuple[ExportedProgram, dict[str, Any]]:
    """Put the engine's files into `folder`. Returns the program that was built, and its record for the manifest.

    trial: the test that an engine must pass.

    Raises BuildError that names the nodes at which the builder failed, and what can be done.
    """
    if request.on_failure not in {"error", "fallback"}:
        raise BuildError(f"on_failure={request.on_failure!r}: known are 'error' and 'fallback'")
    cache = cache_of(request)
    key = key_of(request, job, versions)
    with cache.locked(key) if cache is not None else nullcontext():
        found = None if cache is None else cache.find(key, folder)
        if found is not None:
            _log.info("engine %s comes from the cache", key[:12])
            if found["trial_problem"]:
                _log.warning(
                    "engine %s: %s, and no remedy was found: verify it before use", key[:12], found["trial_problem"]
                )
            program = widened(request.program, found["widened"]) if found["widened"] else request.program
            program = restated(program)
            return program, {**found, "cache": {"key": key, "hit": True}}
        program, record = _built(request, job, folder, trial)
        if cache is not None:
            cache.keep(key, folder, record)
    return program, {**record, "cache": {"key": key, "hit": False} if cache is not None else None}


def cache_of(request: BuildRequest) -> EngineCache | None:
    """The cache that a request names; None where it wants none."""
    if request.cache is False:
        return None
    folder = default_folder() if request.cache is True else Path(request.cache)
    return EngineCache(folder, request.cache_size)


def key_of(request: BuildRequest, job: BuilderJob, versions: Mapping[str, str]) -> str:
    """The cache's key of a request: any difference that could change the engine gives another key."""
    plan = request.plan
    return cache_key(
        {
            "graph": node_digests(request.program),
            "weights": weights_hash(request.program),
            "plan": None if plan is None else [[d.node, d.precision] for d in plan.decisions],
            "low_type": None if plan is None else str(plan.low_precision_type),
            "settings": {name: _plain(name, value) for name, value in sorted(job.settings.items())},
            "job": {**asdict(job), "settings": None},
            "on_failure": request.on_failure,
            "versions": {**own_versions(), **versions},
        }
    )


def _plain(name: str, value: Any) -> Any:
    try:
        return encoded(name, value)
    except BuildError:  # only a build in this process can have such a setting
        return repr(value)


def _built(
    request: BuildRequest, job: BuilderJob, folder: Path, trial: Trial
) -> tuple[ExportedProgram, dict[str, Any]]:
    build = Attempts(request, job, folder, trial).run()
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
        "applied_settings": {name: _plain(name, value) for name, value in build.job.settings.items()},
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
    return [layer for _, path in engine_paths(folder) for layer in parse_listing(path.read_bytes())]
