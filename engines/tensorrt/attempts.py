"""Building an engine and, where remedies are allowed, building it again with one remedy after another."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from calibcast.calib.errors import BuildError
from calibcast.engines.handover import Trial
from calibcast.engines.runtimes import BuildRequest
from calibcast.engines.tensorrt.ahead_of_time import is_rtx
from calibcast.engines.tensorrt.builder.compiling import compile_job, write_in_pytorch
from calibcast.engines.tensorrt.builder.isolation import (
    BUILDING,
    CONVERTING,
    RUNNING,
    BuilderError,
    build_isolated,
    failure_of,
)
from calibcast.engines.tensorrt.builder.job import BuilderJob, BuilderResult
from calibcast.engines.tensorrt.cache import emptied
from calibcast.engines.tensorrt.engine_files import DAMAGED
from calibcast.engines.tensorrt.region_search import MOST_BUILDS as MOST_BISECTIONS
from calibcast.engines.tensorrt.region_search import computing_nodes, described, smallest_region, unconverted
from calibcast.engines.tensorrt.remedies import advice, remedies, settings_for
from calibcast.engines.tensorrt.remedy_search import MOST_BUILDS, can_search, operator_groups, smallest_choice
from calibcast.engines.tensorrt.widening import restated, widened, with_movement
from torch.export import ExportedProgram

_log = logging.getLogger("calibcast")

_WHOLE = ("the whole program in PyTorch",)


@dataclass(frozen=True)
class Build:
    """A build that succeeded.

    remedies: the remedies that it needed. widened: nodes that it keeps in fp32. problem: what its trial found wrong, if
    anything. seen: everything that its trial measured, as plain data.
    """

    result: BuilderResult
    job: BuilderJob
    program: ExportedProgram
    remedies: tuple[str, ...] = ()
    widened: tuple[str, ...] = ()
    problem: str | None = None
    seen: Mapping[str, Any] | None = None


class Attempts:
    """The builds of one request; the files of the best one end up in `folder`.

    trial: the test that an engine must pass. An engine that builds may still be wrong: some engines that TensorRT-RTX
    1.4 builds of a NAFNet in bf16 give NaN for every input.
    """

    def __init__(self, request: BuildRequest, job: BuilderJob, folder: Path, trial: Trial) -> None:
        self._request, self._job, self._folder, self._trial = request, job, folder, trial
        self._program = restated(request.program)
        self._kept: dict[tuple[str, ...], tuple[Build, Path]] = {}
        self._applied: list[str] = []

    def run(self) -> Build:
        """Raises BuildError that names the nodes at which the builder failed, and what can be done."""
        on_failure = self._request.on_failure
        with tempfile.TemporaryDirectory(dir=self._folder.parent, prefix=f"{self._folder.name}-") as aside:
            self._aside = Path(aside)
            try:
                build = self._attempt(self._job)
            except BuilderError as failure:
                if on_failure == "error":
                    raise BuildError(_advice(failure, self._program, self._job.settings)) from failure
                return self._remedied(failure)
            if (problem := self._trial(self._folder, build.program)) is None:
                return self._judged(build)
            wrong = self._failed(problem, build)
            if on_failure == "error":
                raise BuildError(_advice(wrong, self._program, self._job.settings)) from wrong
            if wrong.kind == "wrong":  # else there is no engine that could be handed over
                self._keep((), replace(self._judged(build), problem=problem))
            return self._remedied(wrong)

    def _attempt(self, job: BuilderJob, widen: tuple[str, ...] = ()) -> Build:
        """Build with these nodes in fp32. Raises BuilderError."""
        request, folder = self._request, self._folder
        emptied(folder)
        widen = with_movement(request.program, widen)
        program = self._program
        if widen:
            program = restated(widened(request.program, widen))
            # Attention among them is in fp32 now.
            asked = settings_for(request.plan, program, is_rtx())[0]
            job = replace(job, settings={**asked, **job.settings})
        if request.isolate or job.ahead_of_time:
            prepare = partial(self._trial.prepare, program)
            result = build_isolated(job, program, folder, request.build_timeout, request.progress, prepare)
        else:
            result = _build_here(job, program, folder)
        return Build(result, job, program, tuple(self._applied), widen)

    def _tried(self, job: BuilderJob, widen: tuple[str, ...]) -> Build:
        """Build and try the engine out. Raises BuilderError also where the builder refuses a job with BuildError: then
        only this remedy has failed, and engines that were built before are not lost."""
        try:
            build = self._attempt(job, widen)
        except BuildError as error:
            raise BuilderError("refused", str(error)) from error
        if (problem := self._trial(self._folder, build.program)) is not None:
            raise self._failed(problem, build)
        return self._judged(build)

    def _failed(self, problem: str, build: Build) -> BuilderError:
        """The failure of the engine that was tried out last. The builder does not set engines up: that is done once,
        where they run. One that cannot be set up is to blame on the build, like one that was not made.
        """
        judgement = self._trial.judgement
        if judgement is None or judgement.set_up:
            return BuilderError("wrong", problem, RUNNING)
        said = problem.removesuffix(DAMAGED)  # it was built a moment ago
        kind = failure_of(BuildError.__name__, said).kind
        message = f"TensorRT made an engine that cannot be set up on this GPU: {said}"
        return BuilderError(kind, message, BUILDING, layers=tuple(build.result.layers))

    def _judged(self, build: Build) -> Build:
        """The build together with what the last trial measured."""
        judgement = self._trial.judgement
        return build if judgement is None else replace(build, seen=judgement.record())

    def _remedied(self, first: BuilderError) -> Build:
        """Build with one known remedy after another; where none helps, search for the operators that the builder fails
        at."""
        job, failure, widen = self._job, first, tuple[str, ...]()
        for remedy in remedies(first, self._program, job.settings):
            _log.warning("%s; trying to %s", failure, remedy.text)
            self._applied.append(f"{remedy.text}, as {failure}")
            job = replace(job, settings={**job.settings, **remedy.settings})
            widen = remedy.widen or widen
            try:
                return self._tried(job, widen)
            except BuilderError as next_failure:
                failure = next_failure
        if can_search(failure):
            found = self._searched(job, failure) or self._bisected(failure)
            if found is not None:
                return found
        return self._left_out(job, failure) or self._given_up(first, failure)

    def _left_out(self, job: BuilderJob, failure: BuilderError) -> Build | None:
        """The build that keeps in PyTorch the nodes that converters fail at; None where a failure names no node, or
        where too many nodes fail."""
        for _ in range(MOST_BISECTIONS):
            nodes = unconverted(failure, self._program, job.in_pytorch)
            if not nodes:
                return None
            _log.warning("%s; trying to keep %s in PyTorch", failure, described(nodes))
            self._applied.append(f"keep {described(nodes)} in PyTorch, as {failure}")
            job = replace(job, in_pytorch=(*job.in_pytorch, *(node.name for node in nodes)))
            try:
                return self._tried(job, ())
            except BuilderError as next_failure:
                failure = next_failure
        return None

    def _bisected(self, failure: BuilderError) -> Build | None:
        """The build with the shortest stretch of nodes in PyTorch that was found, or with all nodes there. None where
        even the program in PyTorch fails the trial, or where the search found nothing and builds ahead of time."""
        if self._job.ahead_of_time and failure.kind == "wrong":
            return None  # no engine can be tried here, and a search would find nothing
        nodes = computing_nodes(self._program)
        whole = None if self._job.ahead_of_time else self._in_pytorch()
        if whole is None and not self._job.ahead_of_time:
            return None

        def helps(start: int, end: int) -> bool:
            names = tuple(node.name for node in nodes[start:end])
            _log.warning("%s; looking for its place: %s in PyTorch", failure, described(nodes[start:end]))
            try:
                self._keep(("in PyTorch", *names), self._tried(replace(self._job, in_pytorch=names), ()))
            except BuilderError as error:
                _log.warning("with %d nodes in PyTorch: %s", len(names), error)
                return False
            return True

        found, asked = smallest_region(len(nodes), helps)
        if found is None:
            told = f"run the whole program in PyTorch, as no part of it was found in {asked} builds, and {failure}"
            return whole and replace(self._restored(_WHOLE), remedies=(*self._applied, told))
        region = nodes[found[0] : found[1]]
        told = f"keep {described(region)} in PyTorch, found in {asked} builds, as {failure}"
        key = ("in PyTorch", *(node.name for node in region))
        return replace(self._restored(key), remedies=(*self._applied, told))

    def _in_pytorch(self) -> Build | None:
        """The whole program in PyTorch, without an engine; None if it fails the trial too."""
        emptied(self._folder)
        result = write_in_pytorch(self._program, self._folder, self._job)
        if self._trial(self._folder, self._program) is not None:
            return None
        build = self._judged(Build(result, self._job, self._program))
        self._keep(_WHOLE, build)
        return build

    def _searched(self, job: BuilderJob, failure: BuilderError) -> Build | None:
        """The build with the fewest nodes in fp32 that was found; None if there is none."""
        asked: list[str] = []

        def helps(names: tuple[str, ...]) -> bool:
            _log.warning("%s; looking for its operators: %d nodes in fp32", failure, len(names))
            try:
                self._keep(names, self._tried(job, names))
            except BuilderError as error:
                _log.warning("with %d nodes in fp32: %s", len(names), error)
                asked.append(str(error))
                return False
            asked.append("")
            return True

        names = smallest_choice(operator_groups(self._program), helps)
        if names is None:
            if asked:
                self._applied.append(f"keep operators in fp32, as {failure}; with all of those that can be: {asked[0]}")
            return None
        remedy = f"keep {len(names)} nodes like {names[0]} in fp32, found in {len(asked)} builds, as {failure}"
        return replace(self._restored(names), remedies=(*self._applied, remedy))

    def _given_up(self, first: BuilderError, last: BuilderError) -> Build:
        """The first engine, where there is one, although it failed its trial: `verify` will judge it on real data."""
        tried = "; ".join(self._applied) or "nothing that is known to help"
        if () in self._kept:
            _log.warning("%s, and no remedy was found (%s): verify it before use", first, tried)
            return self._restored(())
        text = advice(first, self._program, self._job.settings)
        raise BuildError(f"{text} on_failure='fallback' tried: {tried}. Last: {last}") from last

    def _keep(self, names: tuple[str, ...], build: Build) -> None:
        place = self._aside / str(len(self._kept))
        self._folder.rename(place)
        self._kept[names] = build, place

    def _restored(self, names: tuple[str, ...]) -> Build:
        build, place = self._kept[names]
        shutil.rmtree(self._folder, ignore_errors=True)
        place.rename(self._folder)
        return build


def _build_here(job: BuilderJob, program: ExportedProgram, folder: Path) -> BuilderResult:
    """Build in this process. Raises BuilderError."""
    heard: dict[str, str] = {}

    def event(content: Mapping[str, Any]) -> None:
        heard["stage"] = content["stage"]
        if content["stage"] == "convert":
            heard["node"] = content["node"]

    try:
        return compile_job(job, program, folder, event)
    except BuildError:
        raise
    except Exception as error:  # the builder, its converters and the partitioner each raise errors of their own
        stage = CONVERTING if heard.get("stage") == "convert" else ""
        raise failure_of(type(error).__name__, str(error), stage, heard.get("node", "")) from error


def _advice(failure: BuilderError, program: ExportedProgram, settings: Mapping[str, Any]) -> str:
    text = advice(failure, program, settings)
    if remedies(failure, program, settings) or not can_search(failure):
        return text
    if not operator_groups(program):
        return (
            f"{text} on_failure='fallback' looks for the smallest part of the program that has to stay in PyTorch, in "
            f"at most {MOST_BISECTIONS} more builds."
        )
    return (
        f"{text} on_failure='fallback' looks for the operators that it fails at, in at most {MOST_BUILDS} more builds, "
        f"and then for the smallest part of the program that has to stay in PyTorch, in at most {MOST_BISECTIONS}."
    )
