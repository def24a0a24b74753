"""From a request to an engine's files: out of the cache, or built, with what a failure calls for."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
from torch.export import ExportedProgram

from calib.artifacts import load_json, parsed, save_json
from calib.artifacts import versions as own_versions
from calib.errors import BuildError
from calib.fingerprint import node_digests, weights_hash
from engines.builder_isolation import RUNNING, BuilderError, build_isolated, failure_of
from engines.builder_job import BuilderJob, BuilderResult, encoded
from engines.builder_process import compile_job
from engines.engine_cache import EngineCache, cache_key, default_folder
from engines.engine_files import WIRING, engine_paths
from engines.inspection import EngineLayer, parse_inspector, parse_listing
from engines.ledger import ledger_of, plan_of, readers_of
from engines.remedies import advice, remedies
from engines.remedy_search import MOST_BUILDS, can_search, operator_groups, smallest_choice
from engines.runtimes import BuildRequest
from engines.widening import restated, widened
from passes.plan import PrecisionPlan

_log = logging.getLogger("calibcast")
LAYERS, _KIND = "layers.json", "layers"


# What is wrong with the engine in a folder, which was made of this program; None if nothing, or if it cannot be run.
Trial = Callable[[Path, ExportedProgram], str | None]


def build_files(
    request: BuildRequest, job: BuilderJob, folder: Path, versions: Mapping[str, str], trial: Trial
) -> tuple[ExportedProgram, dict[str, Any]]:
    """Put the engine's files into `folder`; the program that was built, and the record of it for the manifest.

    trial: what an engine has to stand that was made by a remedy.

    Raises BuildError that names the nodes at which the builder failed, and what can be done.
    """
    if request.on_failure not in {"error", "fallback"}:
        raise BuildError(f"on_failure={request.on_failure!r}: known are 'error' and 'fallback'")
    cache = _cache_of(request)
    key = _key(request, job, versions)
    with cache.locked(key) if cache is not None else nullcontext():
        found = None if cache is None else cache.find(key, folder)
        if found is not None:
            _log.info("engine %s comes from the cache", key[:12])
            program = widened(request.program, found["widened"]) if found["widened"] else request.program
            program = restated(program)
            return program, {**found, "cache": {"key": key, "hit": True}}
        program, record = _built(request, job, folder, trial)
        if cache is not None:
            cache.keep(key, folder, record)
    return program, {**record, "cache": {"key": key, "hit": False} if cache is not None else None}


def _cache_of(request: BuildRequest) -> EngineCache | None:
    if request.cache is False:
        return None
    folder = default_folder() if request.cache is True else Path(request.cache)
    return EngineCache(folder, request.cache_size)


def _key(request: BuildRequest, job: BuilderJob, versions: Mapping[str, str]) -> str:
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
    except BuildError:  # only a build in this process can have it
        return repr(value)


@dataclass(frozen=True)
class _Build:
    """A build that succeeded. remedies: what was done for it; widened: nodes that it keeps in fp32."""

    result: BuilderResult
    job: BuilderJob
    program: ExportedProgram
    remedies: tuple[str, ...] = ()
    widened: tuple[str, ...] = ()


def _built(
    request: BuildRequest, job: BuilderJob, folder: Path, trial: Trial
) -> tuple[ExportedProgram, dict[str, Any]]:
    """Build, and again with one remedy after another where that is allowed."""
    program = restated(request.program)
    try:
        build = _Build(_attempt(request, job, program, folder), job, program)
    except BuilderError as failure:
        if request.on_failure == "error":
            raise BuildError(_advice(failure, program, job.settings)) from failure
        build = _remedied(request, job, failure, folder, trial)
    result = build.result
    record = {
        "ahead_of_time": job.ahead_of_time,
        "isolated": request.isolate,
        "remedies": list(build.remedies),
        "widened": list(build.widened),
        "fallback_to_pytorch": dict(result.torch_nodes),
        "build_seconds": round(result.seconds, 3),
        "applied_settings": {name: _plain(name, value) for name, value in build.job.settings.items()},
    }
    if result.torch_nodes:
        shown = ", ".join(list(result.torch_nodes)[:8])
        _log.warning("%d nodes run in PyTorch, beside the engine: %s", len(result.torch_nodes), shown)
    _write_layers(folder, result)
    return build.program, record


def _advice(failure: BuilderError, program: ExportedProgram, settings: Mapping[str, Any]) -> str:
    text = advice(failure, program, settings)
    if remedies(failure, program, settings) or not can_search(failure) or not operator_groups(program):
        return text
    return (
        f"{text} on_failure='fallback' looks for the operators that it fails at, in at most {MOST_BUILDS} more builds."
    )


def _remedied(request: BuildRequest, job: BuilderJob, failure: BuilderError, folder: Path, trial: Trial) -> _Build:
    """Build with one known remedy after another; where none helps, look for the operators that the builder fails at."""
    first, program = failure, restated(request.program)
    widen: tuple[str, ...] = ()
    applied: list[str] = []
    for remedy in remedies(first, program, job.settings):
        _log.warning("%s; trying to %s", failure, remedy.text)
        applied.append(f"{remedy.text}, as {failure}")
        job = replace(job, settings={**job.settings, **remedy.settings})
        widen = remedy.widen or widen
        try:
            return _again(request, job, widen, applied, folder, trial)
        except BuilderError as next_failure:
            failure = next_failure
    if can_search(failure):
        found = _searched(request, job, failure, applied, folder, trial)
        if found is not None:
            return found
        applied.append("keep operators in fp32, none and all of those that can be")
    tried = "; ".join(applied) or "nothing that is known to help"
    text = advice(first, request.program, request.settings)
    raise BuildError(f"{text} on_failure='fallback' tried: {tried}. Last: {failure}") from failure


def _again(
    request: BuildRequest, job: BuilderJob, widen: tuple[str, ...], applied: Sequence[str], folder: Path, trial: Trial
) -> _Build:
    """Raises BuilderError."""
    _emptied(folder)
    program = restated(widened(request.program, widen) if widen else request.program)
    build = _Build(_attempt(request, job, program, folder), job, program, tuple(applied), widen)
    if (problem := trial(folder, program)) is not None:
        raise BuilderError("wrong", problem, RUNNING)
    return build


def _searched(
    request: BuildRequest, job: BuilderJob, failure: BuilderError, applied: Sequence[str], folder: Path, trial: Trial
) -> _Build | None:
    """The build with the fewest nodes in fp32 that was found, its files in `folder`; None if there is none."""
    builds: dict[tuple[str, ...], _Build] = {}
    asked: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as aside:

        def helps(names: tuple[str, ...]) -> bool:
            asked.append(names)
            _log.warning("%s; looking for its operators: %d nodes in fp32", failure, len(names))
            try:
                build = _again(request, job, names, applied, folder, trial)
            except BuilderError as error:
                _log.info("with %d nodes in fp32: %s", len(names), error)
                return False
            folder.rename(Path(aside) / str(len(builds)))
            folder.mkdir()
            builds[names] = build
            return True

        names = smallest_choice(operator_groups(restated(request.program)), helps)
        if names is None:
            return None
        _emptied(folder)
        shutil.copytree(Path(aside) / str(list(builds).index(names)), folder, dirs_exist_ok=True)
    remedy = f"keep {len(names)} nodes like {names[0]} in fp32, found in {len(asked)} builds, as {failure}"
    return replace(builds[names], remedies=(*applied, remedy))


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _attempt(request: BuildRequest, job: BuilderJob, program: ExportedProgram, folder: Path) -> BuilderResult:
    if request.isolate or job.ahead_of_time:
        return build_isolated(job, program, folder, request.build_timeout, request.progress)
    heard: dict[str, str] = {}

    def event(content: Mapping[str, Any]) -> None:
        if content["stage"] == "convert":
            heard["node"] = content["node"]

    try:
        return compile_job(job, program, folder, event)
    except BuildError:
        raise
    except Exception as error:  # the builder, its converters and the partitioner each raise their own
        raise failure_of(type(error).__name__, str(error), node=heard.get("node", "")) from error


def _write_layers(folder: Path, result: BuilderResult) -> None:
    """What the ledger is made from, beside the engine: the networks' layers, and what the engines said of theirs."""
    save_json(
        folder / LAYERS,
        _KIND,
        {"made": list(result.layers), "torch_types": dict(result.torch_types), "inspected": list(result.inspected)},
    )


def ledger_in(folder: Path, plan: PrecisionPlan | None, program: ExportedProgram) -> pl.DataFrame:
    """The ledger of the engine whose files are in `folder`."""
    content = load_json(folder / LAYERS, _KIND)
    with parsed(folder / LAYERS, _KIND):
        made, torch_types = content["made"], content["torch_types"]
    return ledger_of(plan_of(plan, program), made, layers_of(folder), torch_types, readers_of(program))


def layers_of(folder: Path) -> list[EngineLayer]:
    """The layers of the engines in `folder`: as the inspector told them at build time, else from their own listing."""
    inspected = load_json(folder / LAYERS, _KIND).get("inspected")
    if inspected:
        return [layer for text in inspected for layer in parse_inspector(text)]
    if not (folder / WIRING).is_file():
        return []
    return [layer for _, path in engine_paths(folder) for layer in parse_listing(path.read_bytes())]
