"""A compiled program as files: its engines as TensorRT wrote them, what runs in PyTorch as programs, and their wiring.

    wiring.json      which part is called with which values, in order
    NAME.engine      one serialised TensorRT engine
    NAME.pt2         nodes that TensorRT did not take, as an exported program

No part is pickled, and none knows the GPU or the process that it was built in.
"""

from __future__ import annotations

import importlib
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from calibcast.calib.artifacts import load_json, load_program, parsed, save_json, save_program, written_whole
from calibcast.calib.errors import ArtifactError, BuildError
from calibcast.engines.tensorrt.program_device import on_device
from torch import fx
from torch.utils import _pytree as pytree

WIRING, _KIND = "wiring.json", "wiring"


class WiringError(Exception):
    """A compiled graph with more in it than engines and PyTorch parts: it has no such files."""


def write_parts(module: fx.GraphModule, folder: Path) -> None:
    """Write a module compiled by Torch-TensorRT. Raises WiringError for one that cannot be taken apart."""
    steps: list[dict[str, Any]] = []
    parts: dict[str, dict[str, Any]] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            steps.append({"input": node.name})
        elif node.op == "call_function" and node.target is getitem:
            steps.append({"item": node.name, "of": _reference(node.args[0]), "index": node.args[1]})
        elif node.op == "call_module" and not node.kwargs:
            name = str(node.target)
            parts[name] = _written(name, module.get_submodule(name), folder)
            steps.append({"call": node.name, "part": name, "arguments": [_reference(a) for a in node.args]})
        elif node.op == "output":
            leaves = pytree.tree_leaves(node.args[0])
            steps.append({"outputs": [_reference(leaf) for leaf in leaves]})
        else:
            raise WiringError(f"{node.op} {node.target} stands between the engines")
    save_json(folder / WIRING, _KIND, {"steps": steps, "parts": parts})


def _reference(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"value": value.name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise WiringError(f"an argument is a {type(value).__name__}")


def _written(name: str, part: Any, folder: Path) -> dict[str, Any]:
    if isinstance(part, fx.GraphModule):
        save_program(_exported(name, part), folder / f"{name}.pt2")
        return {"kind": "torch"}
    if getattr(part, "aliased_io", None):
        raise WiringError(f"{name} updates a buffer inside the engine")
    with written_whole(folder / f"{name}.engine") as temporary:
        temporary.write_bytes(bytes(part.serialized_engine))
    return {
        "kind": "engine",
        "inputs": list(part.input_binding_names),
        "outputs": list(part.output_binding_names),
        "requires_output_allocator": bool(part.requires_output_allocator),
    }


def _exported(name: str, part: fx.GraphModule) -> torch.export.ExportedProgram:
    """A part that runs in PyTorch, exported on zeros of the sizes that it was compiled for."""
    values: list[Any] = [node.meta.get("val") for node in part.graph.nodes if node.op == "placeholder"]
    if not all(isinstance(value, torch.Tensor) for value in values):
        raise WiringError(f"{name} takes something other than tensors")
    examples = tuple(torch.zeros([_hint(s) for s in v.shape], dtype=v.dtype, device=v.device) for v in values)
    auto = torch.export.Dim.AUTO
    dynamic = tuple({i: auto for i, s in enumerate(v.shape) if not isinstance(s, int)} for v in values)
    with torch.no_grad():
        return torch.export.export(part, examples, dynamic_shapes=dynamic if any(dynamic) else None)


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else max(2, int(size.node.hint or 2))


def read_parts(folder: Path, device: torch.device) -> fx.GraphModule:
    """Make the parts ready on `device` and wire them: a module from flat inputs to a tuple of flat outputs.

    Needs a GPU. Raises ArtifactError when a file is missing or damaged, BuildError when TensorRT refuses an engine.
    """
    content = load_json(folder / WIRING, _KIND)
    with parsed(folder / WIRING, _KIND):
        root = torch.nn.Module()
        for name, part in content["parts"].items():
            root.add_module(name, _loaded(name, part, folder, device))
        return _wired(root, content["steps"])


def engine_paths(folder: Path) -> list[tuple[str, Path]]:
    """Name and file of every engine in the folder, in the order in which they were built."""
    content = load_json(folder / WIRING, _KIND)
    with parsed(folder / WIRING, _KIND):
        return [(n, folder / f"{n}.engine") for n, part in content["parts"].items() if part["kind"] == "engine"]


def _loaded(name: str, part: dict[str, Any], folder: Path, device: torch.device) -> torch.nn.Module:
    if part["kind"] == "torch":
        return on_device(load_program(folder / f"{name}.pt2"), device).module()
    path = folder / f"{name}.engine"
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: the engine was not saved whole")
    dynamo = importlib.import_module("torch_tensorrt.dynamo")
    settings = dynamo.CompilationSettings()
    settings.device = importlib.import_module("torch_tensorrt").Device(gpu_id=device.index or 0)
    try:
        module = importlib.import_module("torch_tensorrt.dynamo.runtime").TorchTensorRTModule(
            serialized_engine=path.read_bytes(),
            input_binding_names=part["inputs"],
            output_binding_names=part["outputs"],
            name=name,
            settings=settings,
            requires_output_allocator=part["requires_output_allocator"],
        )
    except Exception as error:  # TensorRT through a C++ extension
        raise BuildError(
            f"TensorRT does not take {path.name}: {type(error).__name__}: {str(error)[:500]}. The engine is damaged, "
            "or it fails to set itself up on this GPU (an execution context); for half-precision attention build with "
            "decompose_attention=True."
        ) from error
    return module  # type: ignore[no-any-return]


def _wired(root: torch.nn.Module, steps: list[dict[str, Any]]) -> fx.GraphModule:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def value(reference: Any) -> Any:
        return made[reference["value"]] if isinstance(reference, dict) else reference

    for step in steps:
        if "input" in step:
            made[step["input"]] = graph.placeholder(step["input"])
        elif "item" in step:
            made[step["item"]] = graph.call_function(getitem, (value(step["of"]), step["index"]))
        elif "call" in step:
            made[step["call"]] = graph.call_module(step["part"], tuple(value(a) for a in step["arguments"]))
        else:
            graph.output(tuple(value(reference) for reference in step["outputs"]))
    return fx.GraphModule(root, graph)
