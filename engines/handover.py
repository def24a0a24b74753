"""Which engine a request gets: one from the cache, or a new one. The engines of all backends pass through here.

Nothing is handed over unjudged. An engine that can run here was run on this request's batches, and held to its plan's
proof: before it was handed over, or before it was put into the cache, if that was with the same batches, proof and
reference. Where none can run, `record["trial"]["why_not"]` says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from calibcast.calib.artifacts import versions as own_versions
from calibcast.calib.errors import ArtifactError, BuildError
from calibcast.calib.program_digests import inputs_hash, node_digests, weights_hash
from calibcast.calib.sequences import FlatInputs, begins_anew
from calibcast.engines.runtimes import BuildRequest, Runtime
from calibcast.engines.tensorrt.builder.job import BuilderJob, Profile, encoded
from calibcast.engines.tensorrt.cache import EngineCache, cache_key, default_folder, emptied
from calibcast.engines.tensorrt.trial_run import Judgement, in_fp32, judged, trial_inputs
from calibcast.passes.proof import Proof
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

_log = logging.getLogger("calibcast")


class Trial(Protocol):
    """Says what is wrong with the engine in a folder that was built from a program; None if nothing is, or if it cannot
    be run.

    possible: whether engines can run here. basis: a digest of what engines are judged by. judgement: what was measured
    of the last engine. last: the last engine, for reuse, because setting one up takes time and memory.
    """

    possible: bool
    judgement: Judgement | None
    last: Runtime | None

    @property
    def basis(self) -> str: ...

    def prepare(self, program: ExportedProgram) -> None:
        """Do what can be done before there is an engine of this program, such as while it is built."""

    def __call__(self, folder: Path, program: ExportedProgram) -> str | None: ...


@dataclass(frozen=True)
class Recipe:
    """How a backend makes an engine's files.

    make: writes them into a folder. It tries them out, and returns the program that was built and a record with what
    the trial measured under "trial". program_of: the program that was built, from the record of an engine in the cache.
    """

    make: Callable[[Path], tuple[ExportedProgram, dict[str, Any]]]
    program_of: Callable[[Mapping[str, Any]], ExportedProgram]


def handed_over(
    request: BuildRequest, key: str, folder: Path, trial: Trial, recipe: Recipe
) -> tuple[ExportedProgram, dict[str, Any]]:
    """Put an engine's files into `folder`. Returns the program that was built, and its record for the manifest.

    key: from `key_of`. A cached engine that was judged by other data is tried out again, and built again if it fails.
    Raises BuildError as `recipe.make` does.
    """
    cache = cache_of(request)
    with cache.locked(key) if cache is not None else nullcontext():
        known = None if cache is None else _known(cache, key, folder, trial, recipe)
        program, record = known or recipe.make(folder)
        assert record["trial"] is not None, "nothing is handed over unjudged"
        if cache is not None and known is None:
            cache.keep(key, folder, record)
    return program, {**record, "cache": None if cache is None else {"key": key, "hit": known is not None}}


def _known(
    cache: EngineCache, key: str, folder: Path, trial: Trial, recipe: Recipe
) -> tuple[ExportedProgram, dict[str, Any]] | None:
    """The engine in the cache; None where there is none, or where it fails on the data of this request."""
    found = cache.find(key, folder)
    if found is None:
        return None
    program, record = recipe.program_of(found), dict(found)
    if not _stands(record["trial"], trial):
        problem = trial(folder, program)
        if problem is not None and record.get("trial_problem") is None:
            _log.warning("the cached engine %s is built again: %s", key[:12], problem)
            trial.last = None
            emptied(folder)
            return None
        assert trial.judgement is not None
        record |= {"trial": trial.judgement.record(), "trial_problem": problem}
        if trial.judgement.why_not is None:
            cache.renew(key, record)
    _log.info("engine %s comes from the cache", key[:12])
    if record.get("trial_problem"):
        _log.warning("engine %s: %s, and no remedy was found: verify it before use", key[:12], record["trial_problem"])
    return program, record


def _stands(seen: Mapping[str, Any], trial: Trial) -> bool:
    """Whether what an earlier trial measured is all that a trial here could say."""
    return not trial.possible or (seen["why_not"] is None and seen["basis"] == trial.basis)


class EngineTrial:
    """A `Trial` of a request's engines: on its batches, or on inputs made up from its ranges and sizes.

    load: sets up the engine in a folder that was built from a program. shapes: the sizes of the inputs. why_not: why
    engines cannot run here.
    """

    def __init__(
        self,
        request: BuildRequest,
        shapes: list[Profile],
        device: torch.device,
        load: Callable[[Path, ExportedProgram], Runtime],
        why_not: str | None = None,
    ) -> None:
        self._request, self._shapes, self._device, self._load, self._why_not = request, shapes, device, load, why_not
        self.possible = why_not is None
        self.judgement: Judgement | None = None
        self.last: Runtime | None = None
        self._prepared: tuple[ExportedProgram, ExportedProgram] | None = None

    def prepare(self, program: ExportedProgram) -> None:
        """Make the fp32 program that its engines are held against. It is not run yet: the builder may be timing kernels
        on the same GPU. Where it cannot be made, the trial says so.
        """
        if self.possible and self._reference(program) is None:
            with suppress(RuntimeError):
                self._prepared = program, in_fp32(program)

    def _reference(self, program: ExportedProgram) -> ExportedProgram | None:
        given, made = self._prepared or (None, None)
        return made if given is program else self._request.reference

    def __call__(self, folder: Path, program: ExportedProgram) -> str | None:
        self.judgement, self.last = Judgement(why_not=self._why_not), None
        if not self.possible:
            return None
        try:
            batches = [self._moved(flat) for flat in self._batches]
            runtime = self._load(folder, program)
        except torch.OutOfMemoryError as error:
            _log.warning("the engine was not tried out, because memory ran out: %s", error)
            self.judgement = Judgement(why_not=f"memory ran out: {error}")
            return None
        except (ArtifactError, BuildError) as error:
            self.judgement = Judgement(problem=str(error), set_up=False)
            return str(error)
        request = self._request
        found = judged(runtime, program, batches, self._reference(program), self._proven, request.carry_state)
        self.judgement = replace(found, made_up=not request.batches, basis=self.basis)
        if found.plan_problem is not None:
            _log.warning("the plan is to blame: %s", found.plan_problem)
        self.last = runtime
        return found.problem

    @cached_property
    def basis(self) -> str:
        reference = self._request.reference
        parts = [
            [[inputs_hash(flat), _plain_values(flat), flat.begins] for flat in self._batches],
            self._request.carry_state,
            None if self._proven is None else [self._proven.outputs, self._proven.places],
            None if reference is None else [node_digests(reference), weights_hash(reference)],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]

    @property
    def _proven(self) -> Proof | None:
        return None if self._request.plan is None else self._request.plan.proof

    @cached_property
    def _batches(self) -> list[FlatInputs]:
        given = [FlatInputs(flat, begins_anew(flat)) for flat in self._request.batches]
        request = self._request
        examples = pytree.tree_leaves(request.program.example_inputs)
        return given or [
            FlatInputs(trial_inputs(request.program, self._shapes, request.ranges, torch.device("cpu"), examples))
        ]

    def _moved(self, flat: FlatInputs) -> FlatInputs:
        moved = [v.to(self._device) if isinstance(v, torch.Tensor) else v for v in flat]
        return FlatInputs(moved, flat.begins)


def _plain_values(flat: FlatInputs) -> list[str]:
    """Shapes and types of tensors, and other values, as text."""
    return [f"{v.dtype} {tuple(v.shape)}" if isinstance(v, torch.Tensor) else repr(v) for v in flat]


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
            "settings": {name: plain_setting(name, value) for name, value in sorted(job.settings.items())},
            "job": {**asdict(job), "settings": None},
            "on_failure": request.on_failure,
            "versions": {**own_versions(), **versions},
        }
    )


def plain_setting(name: str, value: Any) -> Any:
    """A setting as plain data."""
    try:
        return encoded(name, value)
    except BuildError:  # only a build in this process can have such a setting
        return repr(value)
