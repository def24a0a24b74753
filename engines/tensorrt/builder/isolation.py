"""Running a builder process: it shows progress, survives the builder's crash, hang or lack of memory, and returns a
failure as data."""

from __future__ import annotations

import json
import queue
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from calibcast.calib.artifacts import save_program
from calibcast.calib.child_process import PACKAGE_ROOT, module_search_path
from calibcast.calib.errors import ArtifactError, BuildError
from calibcast.calib.pt2.containers import with_plain_containers
from calibcast.engines.tensorrt.builder import torch_tensorrt_adapter as adapter
from calibcast.engines.tensorrt.builder import worker
from calibcast.engines.tensorrt.builder.job import BUILT, INDUCTOR, PROGRAM, BuilderJob, BuilderResult, custom_modules
from calibcast.engines.tensorrt.builder.worker import Worker
from torch.export import ExportedProgram
from tqdm.auto import tqdm

_ROOT = PACKAGE_ROOT
_TAIL = 20_000  # characters of a builder's own output that are searched for names
LOADING, CONVERTING = "loading the program", "converting the graph"
BUILDING, WRITING, RUNNING = "building the engine", "writing the engine", "running the engine"
_STAGES = {"lower": "lowering the graph", "build": BUILDING, "write": WRITING, "load": LOADING,
           "run": RUNNING}  # fmt: skip
_CONTEXT_WORDS = ("execution context", "createexecutioncontext", "create_execution_context", "exec_ctx")
_MEMORY_WORDS = ("out of memory", "outofmemory", "bad_alloc", "cannot allocate memory")


@dataclass(eq=False)  # not frozen: Python sets the traceback of an exception
class BuilderError(Exception):
    """A build that failed. kind: crash, hang, memory, unsupported, context, refused; or wrong, when the engine ran and
    failed its trial.

    message: the error's text. stage: how far the build came. node: the last node that was converted. log: the end of
    what the builder and its libraries printed. layers: name and node of each layer of the networks made so far.
    """

    kind: str
    message: str
    stage: str = ""
    node: str = ""
    log: str = ""
    layers: tuple[Mapping[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.message


@dataclass
class _Progress:
    """The latest news of a builder."""

    bar: Any
    stage: str = "starting"
    node: str = ""
    phases: dict[str, int] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)

    def pass_time(self) -> None:
        """Add the time since the last call to the current stage."""
        now = time.perf_counter()
        self.seconds[self.stage] = round(self.seconds.get(self.stage, 0.0) + now - self.since, 4)
        self.since = now

    def hear(self, event: Mapping[str, Any]) -> None:
        self.pass_time()
        stage = event["stage"]
        if stage == "convert":
            self.stage, self.node = CONVERTING, event["node"]
            self.bar.set_description_str(f"convert {event['node'][:40]}", refresh=False)
        elif stage == "phase":
            self.phases[event["phase"]] = event["steps"]
            self.bar.set_description_str(event["phase"][:48], refresh=False)
        elif stage == "step" and event["phase"] in self.phases:
            self.bar.set_postfix_str(f"{event['step']}/{self.phases[event['phase']]}", refresh=False)
        elif stage in _STAGES:
            self.stage = _STAGES[stage]
            self.layers += event.get("layers", [])
        self.bar.update()


def prepare_builder() -> None:
    """Start a builder, unless one is there, for a build that is sure to come, so that it can import meanwhile."""
    worker.prepare(module_search_path(_ROOT))


def build_isolated(
    job: BuilderJob,
    program: ExportedProgram,
    folder: Path,
    timeout: float | None,
    progress: bool = True,
    meanwhile: Callable[[], None] = lambda: None,
) -> BuilderResult:
    """Build in a process of its own; the engine's files come to `folder`.

    timeout: seconds after which the builder process counts as hung and is ended; None waits for ever. meanwhile: called
    here while the builder works. Raises BuilderError for anything that goes wrong in the builder, and BuildError for a
    setting that cannot be passed to it.
    """
    # The builder can import what the caller can, from the same places: importing their modules registers custom
    # operators.
    imports = custom_modules(program)
    # Torch-TensorRT takes seconds to import, and changes how torch compiles.
    wanted = module_search_path(_ROOT), imports, job.compiler == INDUCTOR
    builder = worker.take(*wanted)
    good = False
    try:
        with tempfile.TemporaryDirectory(prefix="calibcast-build-") as name:
            work = Path(name)
            replace(job, imports=imports).save(work)
            # While a builder that was just started imports.
            save_program(with_plain_containers(program), work / PROGRAM, checked=False)
            with tqdm(desc="build", unit=" events", disable=None if progress else True, leave=False) as bar:
                heard = _Progress(bar)
                runs_here = not job.ahead_of_time and job.compiler != INDUCTOR and adapter.absent() is None
                aside: list[Callable[[], object]] = [*([adapter.load_package] if runs_here else []), meanwhile]
                code = _run(builder, work, heard, timeout, aside)
                if code == worker.NO_CUDA:
                    builder.end()
                    builder = worker.take(*wanted)  # none is kept now, so this one has a Python of its own
                    code = _run(builder, work, heard, timeout)
            result = _answer(work, code, heard, _log_of(builder, work), timeout)
            for path in (work / BUILT).iterdir():
                shutil.move(path, folder / path.name)
            good = True
            return replace(result, stages=heard.seconds)
    finally:
        if good:
            worker.keep(builder)
        else:
            builder.end()


def _log_of(builder: Worker, work: Path) -> str:
    own = work / worker.LOG
    text = own.read_text(encoding="utf-8", errors="replace") if own.is_file() else ""
    return (builder.said_at_start() + text)[-_TAIL:]


def _run(
    builder: Worker, work: Path, heard: _Progress, timeout: float | None, aside: Sequence[Callable[[], object]] = ()
) -> int | None:
    """0 when the builder has answered, else its exit status, or None when it took longer than `timeout`.

    aside: called while the builder works. An engine that will run here needs Torch-TensorRT imported.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    builder.ask(work)  # if the builder has ended meanwhile, `lines` ends with None
    for work_here in aside:
        work_here()
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            line = builder.lines.get(timeout=left)
        except queue.Empty:
            return None
        if line is None:
            return builder.process.wait()
        event = json.loads(line)
        if event["stage"] == worker.ANSWERED:
            heard.pass_time()
            return 0
        heard.hear(event)


def _answer(work: Path, code: int | None, heard: _Progress, log: str, timeout: float | None) -> BuilderResult:
    place: dict[str, Any] = {"stage": heard.stage, "node": heard.node, "log": log, "layers": tuple(heard.layers)}
    if code is None:
        raise BuilderError("hang", f"the builder did not end within {timeout:g} s and was stopped", **place)
    try:
        result = BuilderResult.load(work)
    except ArtifactError:
        raise _crash(code, place) from None
    if result.error is not None:
        if result.error[0] == BuildError.__name__:  # already an error of ours, such as an unknown setting
            raise BuildError(result.error[1])
        raise failure_of(*result.error, **place)
    return result


def _crash(code: int, place: dict[str, Any]) -> BuilderError:
    if code == -signal.SIGKILL:
        return BuilderError(
            "memory", "the builder was killed from outside, most likely because memory ran out", **place
        )
    if code < 0:
        return BuilderError("crash", f"the builder crashed with {signal.Signals(-code).name}", **place)
    last = next((line for line in reversed(place["log"].splitlines()) if line.strip()), "nothing")
    return BuilderError("crash", f"the builder ended with status {code}; it last said: {last.strip()[:300]}", **place)


def failure_of(
    kind: str,
    message: str,
    stage: str = "",
    node: str = "",
    log: str = "",
    layers: tuple[Mapping[str, Any], ...] = (),
) -> BuilderError:
    """The BuilderError, with its kind, for an exception of the builder, given by class name (`kind`) and text."""
    text = f"{message}\n{_errors_of(log[-4000:])}".lower()
    found = "refused"
    if any(word in text for word in _MEMORY_WORDS):
        found = "memory"
    elif kind == "UnsupportedOperatorException" or "not currently supported" in message:
        found = "unsupported"
    elif any(word in text for word in _CONTEXT_WORDS):
        found = "context"
    said = _no_engine(kind, message, log) or f"{kind}: {message.partition(_TRACED)[0][:800]}"
    if found == "context":
        said = f"TensorRT made an engine that cannot be set up on this GPU (no execution context): {said}"
    return BuilderError(found, said, stage, node, log, layers)


# After this text, FX's interpreter describes the node as it is after lowering; the errors here use the exported name.
_TRACED = "\n\nWhile executing "

# Lines that only warn: TensorRT skips a tactic that needs more memory than there is, and takes another.
_WARNINGS = re.compile(r"\[(?:W|I|V|D)\]|\b(?:WARNING|INFO|DEBUG|VERBOSE)\b|skipping tactic", re.IGNORECASE)
# TensorRT had to skip all tactics.
_NO_TACTIC = "could not find any implementation"


def _errors_of(log: str) -> str:
    """The lines of a log that report errors; all lines where no tactic was left."""
    if _NO_TACTIC in log.lower():
        return log
    return "\n".join(line for line in log.splitlines() if not _WARNINGS.search(line))


def _no_engine(kind: str, message: str, log: str) -> str:
    """What TensorRT said when it returned None instead of an engine; empty otherwise. Torch-TensorRT itself gives no
    reason then: 2.11 fails on the type of None or with an empty assertion, 2.14 with a message that names no cause."""
    stumbled = message in {"", f"{kind}()"} or "NoneType" in message or "returned None" in message
    if not stumbled:
        return ""
    lines = re.findall(r"(?:Internal Error: |buildSerializedNetwork: )(.+)", log)
    return f"TensorRT gave no engine: {lines[-1].strip()[:800]}" if lines else ""
