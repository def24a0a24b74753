"""The job that a builder process gets, and its answer: plain files in one folder."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from calibcast.calib.artifacts import load_json, parsed, save_json
from calibcast.calib.errors import BuildError
from calibcast.calib.graph import walk
from torch.export import ExportedProgram

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]  # smallest, most frequent, largest

# The two compilers.
TENSORRT, INDUCTOR = "tensorrt", "inductor"
PROGRAM, JOB, RESULT, BUILT = "program.pt2", "job.json", "result.json", "built"
_KIND, _RESULT = "builder job", "builder result"


@dataclass(frozen=True)
class BuilderJob:
    """One build. profiles: one for each flat input. device: where the engine will run. settings: those of the compiler.
    imports: modules that register the program's custom operators. in_pytorch: nodes of the program that stay out of
    TensorRT. compiler: TENSORRT or INDUCTOR."""

    profiles: tuple[Profile, ...]
    settings: Mapping[str, Any]
    device: str = "cuda"
    ahead_of_time: bool = False
    weakly_typed: tuple[str, ...] | None = None
    imports: tuple[str, ...] = ()
    in_pytorch: tuple[str, ...] = ()
    compiler: str = TENSORRT

    def save(self, folder: Path) -> None:
        """Write the job. Raises BuildError for a setting that cannot be passed to another process."""
        content = {**asdict(self), "settings": {name: encoded(name, value) for name, value in self.settings.items()}}
        save_json(folder / JOB, _KIND, content)

    @classmethod
    def load(cls, folder: Path) -> BuilderJob:
        """Read the job back."""
        content = load_json(folder / JOB, _KIND)
        with parsed(folder / JOB, _KIND):
            low = content["weakly_typed"]
            return cls(
                profiles=tuple((tuple(a), tuple(b), tuple(c)) for a, b, c in content["profiles"]),
                settings={name: decoded(value) for name, value in content["settings"].items()},
                device=content["device"],
                ahead_of_time=content["ahead_of_time"],
                weakly_typed=None if low is None else tuple(low),
                imports=tuple(content["imports"]),
                in_pytorch=tuple(content["in_pytorch"]),
                compiler=content["compiler"],
            )


def custom_modules(program: ExportedProgram) -> tuple[str, ...]:
    """The modules that define custom operators of `program` with `torch.library.custom_op`."""
    definitions = importlib.import_module("torch._library.custom_ops").OPDEFS
    targets = {step.node.target for step in walk(program.graph_module)}
    names = {target._schema.name for target in targets if isinstance(target, torch._ops.OpOverload)}
    modules = {definitions[name]._init_fn.__module__ for name in names if name in definitions}
    return tuple(sorted(modules - {"__main__"}))


@dataclass(frozen=True)
class BuilderResult:
    """How a build went. error: None when it is done; else its kind (a class name) and message.

    layers: the networks' layers before fusion. torch_nodes: node -> why it runs in PyTorch. torch_types: the floating
    types of the results of each of these nodes. seconds: of the build alone. inspected: JSON of TensorRT's inspector
    for each engine, where there was a GPU. stages: seconds of each stage, measured by the process that waits for the
    builder.
    """

    error: tuple[str, str] | None = None
    layers: tuple[Mapping[str, Any], ...] = ()
    torch_nodes: Mapping[str, str] = field(default_factory=dict)
    torch_types: Mapping[str, list[str]] = field(default_factory=dict)
    inspected: tuple[str, ...] = ()
    seconds: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the answer."""
        save_json(folder / RESULT, _RESULT, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> BuilderResult:
        """Read the answer back."""
        content = load_json(folder / RESULT, _RESULT)
        with parsed(folder / RESULT, _RESULT):
            error = content["error"]
            return cls(
                error=None if error is None else (str(error[0]), str(error[1])),
                layers=tuple(content["layers"]),
                torch_nodes=content["torch_nodes"],
                torch_types=content["torch_types"],
                inspected=tuple(content["inspected"]),
                seconds=float(content["seconds"]),
            )


def encoded(name: str, value: Any) -> Any:
    """A setting as JSON; `decoded` gives it back. Raises BuildError for what has no plain form."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [encoded(name, item) for item in value]
        # A set has no order, but a cache key needs one.
        ordered = sorted(items, key=repr) if isinstance(value, (set, frozenset)) else items
        return {"kind": type(value).__name__, "items": ordered}
    if isinstance(value, torch.dtype):
        return {"kind": "dtype", "name": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"kind": "device", "name": str(value)}
    if isinstance(value, torch._ops.OpOverload):
        return {"kind": "op", "name": str(value)}
    raise BuildError(
        f"the setting {name}={value!r} ({type(value).__name__}) cannot be told to a builder process, which takes "
        "numbers, text, dtypes, devices, operators, and lists and sets of them. Pass isolate=False to build in this "
        "process, where a crash of the builder is a crash of yours."
    )


def decoded(value: Any) -> Any:
    """What `encoded` wrote."""
    if not isinstance(value, dict):
        return value
    kind = value["kind"]
    if kind in {"list", "tuple", "set", "frozenset"}:
        made: Any = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
        return made(decoded(item) for item in value["items"])
    if kind == "op":
        namespace, packet, overload = value["name"].split(".")
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    return getattr(importlib.import_module("torch"), value["name"]) if kind == "dtype" else torch.device(value["name"])
