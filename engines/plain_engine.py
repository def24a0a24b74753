"""Exports an engine's folder as plain TensorRT: the engine's bytes, its inputs and outputs, and a configuration for
Triton."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from calibcast.calib.artifacts import load_json, parsed
from calibcast.calib.batches import signature_of
from calibcast.calib.errors import BuildError, StorageError
from calibcast.calib.graph import dtype_name
from calibcast.calib.sealed_files import check_plain_part
from calibcast.calib.tensor_files import load_tensors
from calibcast.engines.engine import read_manifest, read_program
from calibcast.engines.io_names import flat_output_names, input_names, size_names
from calibcast.engines.runtime import IO, SCHEMA, STATE
from calibcast.engines.tensorrt.ahead_of_time import LEAST_CAPABILITY
from calibcast.engines.tensorrt.compatibility import LIBRARIES
from calibcast.engines.tensorrt.engine_files import WIRING, given_outputs
from calibcast.engines.triton_config import triton_config
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind

_FILES = "tensorrt"  # in an engine's folder
CONFIG = "config.pbtxt"


@dataclass(frozen=True)
class _Wired:
    """The one engine of a folder, and how its bindings belong to the program's values.

    inputs: the binding of each input of the program, in order; None where the engine does not read it. outputs: the
    binding of each output, in order. state: (name, input binding, output binding, whether updated in place) of each
    value that is kept between calls.
    """

    name: str
    inputs: Sequence[str | None]
    outputs: Sequence[str]
    state: Sequence[tuple[str, str, str | None, bool]]


def export_engine(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write the engine in `folder` (from `Engine.save`) as plain TensorRT. Returns the engine's file.

    target: a folder, which gets `model.engine`, or a file that ends in .engine or .plan. Beside the engine it writes
    `io.json` (names, types, sizes, profiles, pairs of state, versions, least compute capability), `state.safetensors`
    where the engine has state, and `config.pbtxt` where Triton can serve it: an engine of TensorRT, not TensorRT-RTX,
    without state. `engines.runtime.PlainEngine` runs it.

    Raises BuildError, which names the nodes outside, unless the whole program is one TensorRT network.
    """
    source, path = Path(folder), _file(Path(target))
    manifest = read_manifest(source)
    if manifest["backend"] != "tensorrt":
        raise BuildError(
            f"{source} was built by the backend {manifest['backend']}: only engines of TensorRT can be exported so"
        )
    program, _ = read_program(source)
    wired = _wired(source / _FILES, manifest)
    io = _io(source, program, manifest, wired, path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as name:
            made = Path(name)
            shutil.copyfile(source / _FILES / f"{wired.name}.engine", made / path.name)
            (made / IO).write_text(json.dumps(io, indent=1) + "\n", encoding="utf-8")
            if io["state"]:
                shutil.copyfile(source / _FILES / STATE, made / STATE)
            if (config := triton_config(io)) is not None:
                (made / CONFIG).write_text(config, encoding="utf-8")
            for old in (STATE, CONFIG):
                (path.parent / old).unlink(missing_ok=True)
            for file in sorted(made.iterdir(), key=lambda file: file.name == IO):
                os.replace(file, path.parent / file.name)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error
    return path


def _file(target: Path) -> Path:
    return target if target.suffix in {".engine", ".plan"} else target / "model.engine"


def _wired(folder: Path, manifest: Mapping[str, Any]) -> _Wired:
    """The one engine in `folder`. Raises BuildError that names the parts of the program outside of it."""
    outside = (manifest.get("build") or {}).get("fallback_to_pytorch") or {}
    if outside:
        nodes = "; ".join(f"{node}: {why}" for node, why in outside.items())
        raise BuildError(f"the engine is not one network: {len(outside)} nodes run in PyTorch ({nodes})")
    if not (folder / WIRING).is_file():
        raise BuildError(f"{folder} has no {WIRING}: Torch-TensorRT saved it whole, and it cannot be taken apart")
    content = load_json(folder / WIRING, "wiring")
    with parsed(folder / WIRING, "wiring"):
        if len(content["parts"]) != 1:
            raise BuildError(f"the program became {len(content['parts'])} networks ({', '.join(content['parts'])})")
        (name, part), steps = next(iter(content["parts"].items())), content["steps"]
        check_plain_part(name, folder / WIRING)
        if part["requires_output_allocator"]:
            raise BuildError("the sizes of its outputs depend on the data: TensorRT needs an output allocator for them")
        return _Wired(name, *_bound(part, steps))


def _bound(
    part: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]
) -> tuple[list[str | None], list[str], list[tuple[str, str, str | None, bool]]]:
    """The engine's bindings for the program's inputs, outputs and state, from the steps of the wiring."""
    call = next(step for step in steps if "call" in step)
    last = next(step for step in steps if "outputs" in step)
    read = dict(zip((_name(value) for value in call["arguments"]), part["inputs"], strict=True))
    made = {step["item"]: given_outputs(part)[step["index"]] for step in steps if "item" in step}
    made[call["call"]] = part["outputs"][0]
    aliased = {source: output for output, (source, _) in (part.get("aliased_io") or {}).items()}
    updates = {update["state"]: _name(update["to"]) for update in last.get("updates", ())}
    state: list[tuple[str, str, str | None, bool]] = []
    for name in (step["state"] for step in steps if "state" in step):
        if name not in read:
            raise BuildError(f"the engine does not read {name}, which the program keeps: it cannot be exported alone")
        output = made[updates[name]] if name in updates else aliased.get(read[name])
        state.append((name, read[name], output, name not in updates and output is not None))
    outputs = [_name(value) for value in last["outputs"] if isinstance(value, dict)]  # not the program's constants
    for value in outputs:
        if value not in made:
            raise BuildError(f"an output of the program is its {value}, unchanged: the engine does not compute it")
    return [read.get(step["input"]) for step in steps if "input" in step], [made[value] for value in outputs], state


def _name(value: Any) -> str:
    if not isinstance(value, dict):
        raise BuildError(
            f"the constant {value!r} goes into the engine or comes out of the program, and is not a tensor"
        )
    return str(value["value"])


def _io(
    source: Path, program: ExportedProgram, manifest: Mapping[str, Any], wired: _Wired, file: str
) -> dict[str, Any]:
    """The content of `io.json`."""
    built, made = manifest["built_with"], manifest.get("build") or {}
    ahead_of_time = bool(made.get("ahead_of_time"))
    sizes = manifest.get("size_names") or size_names(program)
    library = next((name for name in LIBRARIES if name in built), LIBRARIES[0])
    return {
        "kind": "calibcast engine",
        "schema": SCHEMA,
        "engine": file,
        "library": library,
        "versions": built,
        "ahead_of_time": ahead_of_time,
        "least_compute_capability": ".".join(map(str, LEAST_CAPABILITY)) if ahead_of_time else None,
        "gpu": None if ahead_of_time else built.get("gpu"),
        "inputs": _inputs(source, program, wired, sizes),
        "outputs": _outputs(program, wired, sizes),
        "state": _state(source, wired),
    }


def _inputs(source: Path, program: ExportedProgram, wired: _Wired, sizes: Mapping[str, str]) -> list[dict[str, Any]]:
    profiles = load_json(source / "profiles.json", "profiles")["profiles"]
    names = iter(input_names(program).items())
    nodes = {node.name: node for node in program.graph.nodes}
    found = []
    for leaf, binding, (low, usual, high) in zip(signature_of(program).leaves, wired.inputs, profiles, strict=True):
        node, name = next(names) if leaf.dtype is not None or leaf.sizes else ("", None)
        if name is not None and leaf.dtype is not None:
            given = nodes[node].meta["val"].shape
            shape = [size if isinstance(size, int) else _size(size, sizes) for size in given]
            tensor = {"name": name, "binding": binding, "dtype": dtype_name(leaf.dtype), "shape": shape}
            found.append({**tensor, "min": list(low), "opt": list(usual), "max": list(high)})
        elif binding is not None:
            raise BuildError(
                f"the engine takes the number {leaf.name}: only tensors can be inputs of an exported engine"
            )
    return found


def _outputs(program: ExportedProgram, wired: _Wired, sizes: Mapping[str, str]) -> list[dict[str, Any]]:
    names = flat_output_names(program, input_names(program).values())
    nodes = {node.name: node for node in program.graph.nodes}
    found = []
    specs = [spec for spec in program.graph_signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    computed = [(n, s) for n, s in zip(names, specs, strict=True) if not isinstance(s.arg, ConstantArgument)]
    for (name, spec), binding in zip(computed, wired.outputs, strict=True):
        value = nodes[spec.arg.name].meta["val"]
        if not isinstance(value, torch.Tensor):
            raise BuildError(f"the output {name} is a number, a size: an exported engine gives tensors only")
        shape = [size if isinstance(size, int) else _size(size, sizes) for size in value.shape]
        found.append({"name": name, "binding": binding, "dtype": dtype_name(value.dtype), "shape": shape})
    return found


def _size(size: Any, names: Mapping[str, str]) -> str:
    """A symbolic size in the user's names: `batch`, `2*length`."""
    return re.sub(r"\b\w+\b", lambda found: names.get(found[0], found[0]), str(size))


def _state(source: Path, wired: _Wired) -> list[dict[str, Any]]:
    held = load_tensors(source / _FILES / STATE) if wired.state else {}
    return [
        {
            "name": name, "input": binding, "output": output, "in_place": in_place,
            "dtype": dtype_name(held[name].dtype), "shape": list(held[name].shape),
        }
        for name, binding, output, in_place in wired.state
    ]  # fmt: skip
