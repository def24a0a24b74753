"""The backend `inductor`: builds AOTInductor packages, loads them, and keeps their state."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch
from calibcast.calib.artifacts import load_json, parsed
from calibcast.calib.batches import signature_of
from calibcast.calib.errors import ArtifactError, BuildError, MismatchError, known
from calibcast.calib.execution import input_structure
from calibcast.calib.pt2.containers import with_plain_containers
from calibcast.calib.tensor_files import load_tensors, save_tensors
from calibcast.engines.handover import EngineTrial, Recipe, Trial, handed_over, key_of
from calibcast.engines.inductor.compiling import FACTS, FACTS_KIND, PACKAGE, STATE, STATE_NOW, compile_inductor
from calibcast.engines.ledger.ledger import plan_of, unknown_ledger
from calibcast.engines.runtimes import BuildRequest, Built
from calibcast.engines.tensorrt.builder.isolation import RUNNING, BuilderError, build_isolated
from calibcast.engines.tensorrt.builder.job import INDUCTOR, BuilderJob, BuilderResult, Profile
from calibcast.engines.tensorrt.compatibility import gpu_facts
from calibcast.engines.tensorrt.profiles import profiles
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

_log = logging.getLogger("calibcast")
_PARTS = "inductor"
COMPILER = "cpp.cxx"  # Inductor's setting: names of C++ compilers, of which it takes the first that there is
_COMPILERS = ("g++", "c++", "clang++")


class InductorRuntime:
    """A loaded package. Its code runs on the device that it was compiled for.

    files: the folder of what was built. It is kept, because `save` copies these files.
    """

    def __init__(
        self, files: tempfile.TemporaryDirectory[str] | Path, program: ExportedProgram, device: torch.device
    ) -> None:
        self._files, self.device = files, device
        self._signature, self._outputs = signature_of(program), program.call_spec.out_spec
        self._plain = with_plain_containers(program)  # as it was compiled
        facts = load_json(self.folder / FACTS, FACTS_KIND)
        with parsed(self.folder / FACTS, FACTS_KIND):
            self._updated, held = list(facts["updated"]), list(facts["held"])
        self._state: dict[str, torch.Tensor] = {}
        if held:
            now = self.folder / STATE_NOW
            begun = load_tensors(now if now.is_file() else self.folder / STATE)
            self._state = {name: begun[name].to(device, copy=True) for name in held}
        self._run = _loaded(self.folder / PACKAGE)

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._files if isinstance(self._files, Path) else Path(self._files.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self._signature.flatten_call(args, kwargs)
        moved = [v.to(self.device) if isinstance(v, torch.Tensor) else v for v in flat]
        args, kwargs = input_structure(self._plain, moved)
        with torch.no_grad():
            given = self._run(*args, *self._state.values(), **kwargs)
            if not self._state:
                return self._structured(given)
            outputs, new = given
            held = {value.data_ptr() for value in self._state.values()}
            outputs = pytree.tree_map_only(
                torch.Tensor, lambda t: t.clone() if t.data_ptr() in held else t, outputs
            )  # an output that is the state itself must not change with the next call
            for name, value in zip(self._updated, new, strict=True):
                self._state[name].copy_(value)
            return self._structured(outputs)

    def _structured(self, outputs: Any) -> Any:
        """The outputs in the program's own containers."""
        return pytree.tree_unflatten(pytree.tree_leaves(outputs), self._outputs)

    def owning(self, files: tempfile.TemporaryDirectory[str]) -> InductorRuntime:
        """This engine, which now owns the folder `files`: the folder is deleted with it."""
        self._files = files
        return self

    def reset(self) -> None:
        if self._state:
            for name, value in load_tensors(self.folder / STATE).items():
                self._state[name].copy_(value)

    def save(self, folder: Path) -> None:
        shutil.copytree(self.folder, folder / _PARTS, ignore=shutil.ignore_patterns(STATE_NOW))
        if self._state:
            save_tensors(folder / _PARTS / STATE_NOW, self._state)


def _loaded(package: Path) -> Any:
    if not package.is_file():
        raise ArtifactError(f"{package} is missing: the engine was not saved whole")
    try:
        return torch._inductor.aoti_load_package(str(package))
    except Exception as error:  # torch's loader, in C++
        raise ArtifactError(f"{package} cannot be loaded: {type(error).__name__}: {str(error)[:500]}") from error


class InductorBackend:
    """Builds through `torch._inductor.aoti_compile_and_package`, part of torch."""

    name = "inductor"

    def unavailable(self) -> str | None:
        """Why nothing can be compiled here; None when it can. Inductor generates Triton kernels for GPUs, C++ kernels
        for CPUs, and C++ code around both."""
        if shutil.which(_compiler()) is None:
            return "Inductor needs a C++ compiler (g++, or the one that CXX names), and there is none"
        if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
            return "Inductor needs the package triton for a GPU, and it is not installed"
        return None

    def require(self, ahead_of_time: bool) -> None:
        if ahead_of_time:
            raise BuildError("backend='inductor' compiles for the GPU it finds: build there, without ahead_of_time")
        if (problem := self.unavailable()) is not None:
            raise BuildError(f"backend='inductor' cannot be used here: {problem}. Or use backend='eager'.")

    def check_settings(self, settings: Mapping[str, Any], ahead_of_time: bool) -> None:
        names = importlib.import_module("torch._inductor.config").get_config_copy().keys() | {"device"}
        for name in settings:
            if name not in names:
                raise BuildError(f"torch._inductor.config has no setting {name!r}; {known(name, names)}")

    def build(self, request: BuildRequest) -> Built:
        self.require(request.ahead_of_time)
        self.check_settings(request.settings, request.ahead_of_time)
        settings = dict(request.settings)
        device = torch.device(settings.pop("device", "cuda" if torch.cuda.is_available() else "cpu"))
        shapes = _shapes(request)
        job = BuilderJob(tuple(shapes), settings, device=str(device), compiler=INDUCTOR)
        files = tempfile.TemporaryDirectory(prefix="calibcast-engine-")
        folder = Path(files.name)
        trial = EngineTrial(request, shapes, device, lambda place, program: InductorRuntime(place, program, device))
        recipe = Recipe(partial(_made, request, job, trial), lambda _: request.program)
        _, made = handed_over(request, key_of(request, job, self.versions()), folder, trial, recipe)
        record: dict[str, Any] = {
            "device": device.type, "isolated": request.isolate, **made,
            "applied_settings": {name: repr(value) for name, value in settings.items()},
            "kernel_types": load_json(folder / FACTS, FACTS_KIND)["kernels"],
        }  # fmt: skip
        tried = trial.last
        if not isinstance(tried, InductorRuntime):
            tried = InductorRuntime(folder, request.program, device)
        return Built(tried.owning(files), request.program, request.plan, _ledger(request), record)

    def load(self, folder: Path, program: ExportedProgram, manifest: Mapping[str, Any]) -> InductorRuntime:
        with parsed(folder / "manifest.json", "engine"):
            device = torch.device(manifest["build"]["device"])
        check_same_machine(manifest["built_with"], self.versions(), device.type)
        return InductorRuntime(folder / _PARTS, program, device)

    def versions(self) -> dict[str, str]:
        capability = torch.backends.cpu.get_cpu_capability()
        return {"torch": torch.__version__, "cpu": f"{platform.machine()} {capability}", **gpu_facts()}


def check_same_machine(built_with: Mapping[str, str], present: Mapping[str, str], device: str) -> None:
    """Raise MismatchError unless a package built with `built_with` runs on the machine that `present` describes. That
    takes the same torch and the same GPU or, for a package for the CPU, the same instruction set. Raises BuildError
    where the package needs a GPU and there is none."""
    if device == "cuda" and "gpu" not in present:
        raise BuildError("this engine was compiled for a GPU, and torch sees none here")
    for what in ("torch", "gpu" if device == "cuda" else "cpu"):
        ours, theirs = present.get(what), built_with.get(what)
        if ours != theirs:
            raise MismatchError(
                f"this engine was compiled by Inductor for {what} {theirs}, and here is {ours}: its code runs only "
                "there. Build it again here (calibcast build)."
            )


def _made(request: BuildRequest, job: BuilderJob, trial: Trial, folder: Path) -> tuple[ExportedProgram, dict[str, Any]]:
    """Compile a package into `folder` and try it out. Raises BuildError where nothing is compiled, or where the engine
    is wrong."""
    result = _compiled(job, request, folder)
    if (problem := trial(folder, request.program)) is not None:
        raise BuildError(f"the engine that Inductor compiled is wrong: {problem}")
    assert trial.judgement is not None
    return request.program, {"build_seconds": round(result.seconds, 3), "trial": trial.judgement.record()}


def _compiled(job: BuilderJob, request: BuildRequest, folder: Path) -> BuilderResult:
    """Compile, in a process of its own if isolated. Where the package crashes as it is loaded or run, once more with
    another C++ compiler: one that links a C++ library of its own makes packages that clash with torch's."""
    if not request.isolate:
        return compile_inductor(job, request.program, folder, lambda _: None)
    build = partial(build_isolated, program=request.program, folder=folder, timeout=request.build_timeout)
    try:
        return build(job, progress=request.progress)
    except BuilderError as error:
        other = other_compiler() if error.kind == "crash" and error.stage == RUNNING else None
        if other is None or COMPILER in job.settings:
            raise _no_package(error) from error
        _log.warning("the package that %s compiled crashes (%s); compiled again with %s", _compiler(), error, other)
        try:
            return build(replace(job, settings={**job.settings, COMPILER: (None, other)}), progress=request.progress)
        except BuilderError as second:
            raise _no_package(second, f" {_compiler()} and {other} were tried.") from second


def _no_package(error: BuilderError, more: str = "") -> BuildError:
    return BuildError(f"AOTInductor compiled no engine ({error.kind}, {error.stage}): {error}{more}")


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def other_compiler() -> str | None:
    """A C++ compiler on the path that is not the one that CXX names; None where there is none."""
    own = os.path.realpath(shutil.which(_compiler()) or "")
    found = (shutil.which(name) for name in _COMPILERS)
    return next((path for path in found if path is not None and os.path.realpath(path) != own), None)


def _ledger(request: BuildRequest) -> pl.DataFrame:
    return unknown_ledger(plan_of(request.plan, request.program))


def _shapes(request: BuildRequest) -> list[Profile]:
    """Example sizes for the compiler: those that calibration saw, else those of the export. The package is not limited
    to them."""
    if request.ranges is not None:
        return profiles(signature_of(request.program), request.ranges)
    nodes = {node.name: node.meta.get("val") for node in request.program.graph.nodes if node.op == "placeholder"}
    values = [nodes.get(name) for name in request.program.graph_signature.user_inputs if isinstance(name, str)]
    shapes = iter(tuple(map(_hint, v.shape)) for v in values if isinstance(v, torch.Tensor))
    leaves = signature_of(request.program).leaves
    return [(shape,) * 3 for shape in (next(shapes) if leaf.dtype is not None else () for leaf in leaves)]


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else max(2, int(size.node.hint or 2))
