"""The TensorRT backend, through whichever flavour of Torch-TensorRT is installed."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from calibcast.calib.artifacts import load_json, parsed, save_json
from calibcast.calib.batches import signature_of
from calibcast.calib.errors import ArtifactError, BuildError
from calibcast.calib.execution import input_structure
from calibcast.calib.pt2.check import check_program_file
from calibcast.calib.pt2.refusal import RefusedError, allowed_by_owner, how_to_allow
from calibcast.calib.tensor_files import load_tensors, save_tensors
from calibcast.engines.handover import EngineTrial, Trial, handed_over, key_of
from calibcast.engines.runtimes import BuildRequest, Built
from calibcast.engines.tensorrt.ahead_of_time import is_rtx, require_ahead_of_time
from calibcast.engines.tensorrt.builder import torch_tensorrt_adapter as adapter
from calibcast.engines.tensorrt.builder.compiling import WHOLE
from calibcast.engines.tensorrt.builder.job import BuilderJob, Profile
from calibcast.engines.tensorrt.building import layers_of, ledger_in, recipe_of
from calibcast.engines.tensorrt.compatibility import check_compatible, gpu_facts, gpu_warning
from calibcast.engines.tensorrt.engine_files import STATE, STATE_NOW, WIRING, read_parts, set_state, state_of
from calibcast.engines.tensorrt.limits import buildable
from calibcast.engines.tensorrt.profiles import check_profile, profiles
from calibcast.engines.tensorrt.remedies import FAILED, raised, settings_for
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

_log = logging.getLogger("calibcast")
_PROFILES, _KIND, _PARTS = "profiles.json", "profiles", "tensorrt"
_MOST_SIZES = 1024


class TensorrtRuntime:
    """Engines on a GPU and the PyTorch parts that run beside them. Without a GPU: only their files, which can be saved.

    files: the folder of what was built. It is kept, because `save` copies these files.
    """

    def __init__(
        self, files: tempfile.TemporaryDirectory[str] | Path, program: ExportedProgram, shapes: list[Profile]
    ) -> None:
        self._files, self._program, self._profiles = files, program, shapes
        self._signature = signature_of(program)
        self.device = torch.device("cuda")
        self._problem = adapter.missing()
        self._module = None if self._problem is not None else _loaded(self.folder, self.device)
        # Checked once: a call takes microseconds, and looking at files takes longer.
        self._flat = (self.folder / WIRING).is_file()
        self._plain = all(spec.is_leaf() for spec in self._signature.specs) and not self._signature.keywords
        self._accepted: set[tuple[Any, ...]] = set()
        self._outputs = program.call_spec.out_spec  # read once: this property takes 0.2 ms

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._files if isinstance(self._files, Path) else Path(self._files.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._module is None:
            raise BuildError(
                f"this engine runs on a GPU and cannot run here: {self._problem}. Save it, and load it there."
            )
        flat = args if not kwargs and self._known(args) else self._checked(args, kwargs)
        with torch.no_grad():
            if self._flat:
                return pytree.tree_unflatten(list(self._module(*flat)), self._outputs)
            args, kwargs = input_structure(self._program, flat)
            return self._module(*args, **kwargs)

    def _known(self, args: tuple[Any, ...]) -> bool:
        """Whether these are flat inputs on the GPU of sizes that were checked before, as in most calls of most
        engines."""
        return self._plain and _sizes(args) in self._accepted

    def _checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The flat inputs on the GPU. Raises BatchError for inputs that the engine was not built for."""
        flat = self._signature.flatten_call(args, kwargs)
        for leaf, value, profile in zip(self._signature.leaves, flat, self._profiles, strict=True):
            check_profile(leaf, value, profile)
        moved = [v.to(self.device) if isinstance(v, torch.Tensor) else v for v in flat]
        key = _sizes(moved)
        if key is not None and len(self._accepted) < _MOST_SIZES:
            self._accepted.add(key)
        return moved

    def owning(self, files: tempfile.TemporaryDirectory[str]) -> TensorrtRuntime:
        """This engine, which now owns the folder `files`: the folder is deleted with it."""
        self._files = files
        return self

    def reset(self) -> None:
        if self._flat and isinstance(self._module, GraphModule) and state_of(self._module):
            set_state(self._module, load_tensors(self.folder / STATE))

    def save(self, folder: Path) -> None:
        shutil.copytree(self.folder, folder / _PARTS, ignore=shutil.ignore_patterns(STATE_NOW))
        if self._flat and isinstance(self._module, GraphModule) and (state := state_of(self._module)):
            save_tensors(folder / _PARTS / STATE_NOW, state)
        save_json(folder / _PROFILES, _KIND, {"profiles": self._profiles})


def _sizes(values: Sequence[Any]) -> tuple[Any, ...] | None:
    """Shapes, types and layouts of tensors on a GPU; None if any value is something else."""
    if not all(isinstance(value, torch.Tensor) and value.is_cuda for value in values):
        return None
    return tuple([(value.shape, value.dtype, value.layout) for value in values])


# The name by which a model's owner allows engines that Torch-TensorRT saved itself, with pickled objects inside.
_WHOLE_ENGINE = "torch_tensorrt.runtime.TorchTensorRTModule"


def check_whole(folder: Path) -> None:
    """Raise ArtifactError for a program with TensorRT's objects inside, unless its owner has allowed it by name.

    Torch-TensorRT loads such a program with pickle. Engines that calibcast could take apart (`engine_files`) are never
    saved in this way.
    """
    path = folder / WHOLE
    if (folder / WIRING).is_file() or not path.is_file() or _WHOLE_ENGINE in allowed_by_owner():
        return
    try:
        check_program_file(path)
    except (RefusedError, OSError, ValueError, BadZipFile) as error:
        raise ArtifactError(
            f"{path} is not loaded, since loading it could run code: {error}. It is an engine that calibcast could not "
            f"take apart, or one that somebody has changed. {how_to_allow(_WHOLE_ENGINE)}"
        ) from error


def _loaded(folder: Path, device: torch.device) -> Any:
    if (folder / WIRING).is_file():
        return read_parts(folder, device)
    if not (folder / WHOLE).is_file():
        raise ArtifactError(f"{folder} holds neither {WIRING} nor {WHOLE}: the engine was not saved whole")
    try:
        return adapter.load_module(str(folder / WHOLE))
    except Exception as error:  # from torch_tensorrt.load and what it calls
        raise ArtifactError(f"{folder / WHOLE} cannot be loaded: {type(error).__name__}: {error}") from error


class TensorrtBackend:
    """Builds through `torch_tensorrt.dynamo.compile`, always explicitly typed unless asked otherwise."""

    name = "tensorrt"

    def unavailable(self) -> str | None:
        return adapter.missing()

    def require(self, ahead_of_time: bool) -> None:
        if ahead_of_time:
            require_ahead_of_time()
        elif (problem := adapter.absent()) is not None:  # it is imported while the builder works
            raise BuildError(
                f"backend='tensorrt' cannot be used here: {problem}. Or use backend='eager', or ahead_of_time=True."
            )

    def check_settings(self, settings: Mapping[str, Any], ahead_of_time: bool) -> None:
        _check_names(settings, ahead_of_time)

    def build(self, request: BuildRequest) -> Built:
        self.require(request.ahead_of_time)
        self.check_settings(request.settings, request.ahead_of_time)
        outside = None if request.ahead_of_time else _warned()
        settings = dict(request.settings)
        device = str(settings.pop("device", "cuda"))
        weakly_typed = settings.pop("weakly_typed", None)
        limited = buildable(request.program, request.plan, is_rtx())
        for name, reason in limited.kept.items():
            _log.info("%s runs in fp32: %s", name, reason)
        request = replace(request, program=limited.program, plan=limited.plan)
        by_plan, why = settings_for(request.plan, request.program, is_rtx())
        by_plan = {name: value for name, value in by_plan.items() if name not in settings}
        if by_plan:
            _log.info("set because of the plan: %s", why)
        shapes = profiles(signature_of(request.program), request.ranges)
        job = BuilderJob(
            profiles=tuple(shapes),
            settings={"min_block_size": 1, **by_plan, **settings},
            device=device,
            ahead_of_time=request.ahead_of_time,
            weakly_typed=None if weakly_typed is None else tuple(str(t).removeprefix("torch.") for t in weakly_typed),
        )
        files = tempfile.TemporaryDirectory(prefix="calibcast-engine-")
        request = replace(request, settings=settings)
        trial = _trial(request, shapes)
        key, recipe = key_of(request, job, self.versions()), recipe_of(request, job, trial)
        program, record = handed_over(request, key, Path(files.name), trial, recipe)
        layers = layers_of(Path(files.name))
        typed = [layer for layer in layers if layer.types]
        counts = {"typed_layers": len(typed), "half_layers": sum(layer.is_half for layer in typed)}
        record = {**record, **counts, "set_by_plan": why if by_plan else "", "kept_in_fp32": limited.kept}
        record["outside_of_support"] = outside
        plan = raised(request.plan, dict.fromkeys(record["widened"], FAILED))
        ledger = ledger_in(Path(files.name), plan, program, layers)
        tried = trial.last
        runtime = tried.owning(files) if isinstance(tried, TensorrtRuntime) else TensorrtRuntime(files, program, shapes)
        return Built(runtime, program, plan, ledger, record)

    def load(self, folder: Path, program: ExportedProgram, manifest: Mapping[str, Any]) -> TensorrtRuntime:
        if adapter.installed_flavour() is None:
            raise BuildError(f"this engine needs a GPU and TensorRT: {self.unavailable()}")
        check_whole(folder / _PARTS)
        check_compatible(
            manifest["built_with"], self.versions(), bool((manifest.get("build") or {}).get("ahead_of_time"))
        )
        problem = self.unavailable()
        if problem is not None:
            raise BuildError(f"this engine needs a GPU and TensorRT: {problem}")
        _warned()
        with parsed(folder / _PROFILES, _KIND):
            saved = load_json(folder / _PROFILES, _KIND)["profiles"]
            shapes: list[Profile] = [(tuple(low), tuple(usual), tuple(high)) for low, usual, high in saved]
        return TensorrtRuntime(folder / _PARTS, program, shapes)

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, **adapter.package_versions(), **gpu_facts()}


@cache
def _warned() -> str | None:
    """Warn once per process when the GPU is not one that the flavour supports; returns the warning."""
    outside = gpu_warning()
    if outside is not None:
        warnings.warn(outside, stacklevel=5)
    return outside


def _trial(request: BuildRequest, shapes: list[Profile]) -> Trial:
    """The trial of a request's engines."""
    why_not = "it was built ahead of time, to run elsewhere" if request.ahead_of_time else adapter.absent()
    return EngineTrial(
        request, shapes, torch.device("cuda"), lambda folder, program: TensorrtRuntime(folder, program, shapes), why_not
    )


def _check_names(settings: Mapping[str, Any], ahead_of_time: bool) -> None:
    """Check, before a process is started, that Torch-TensorRT has these settings. Without a GPU it cannot be asked
    here."""
    if settings.keys() <= {"device", "weakly_typed"}:
        return  # of calibcast, so it need not be imported to be asked
    if ahead_of_time and not torch.cuda.is_available():
        return  # the builder process checks them
    adapter.check_setting_names(settings, adapter.setting_names() | {"weakly_typed"})
