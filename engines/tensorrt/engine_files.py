"""A compiled program as files: engines as TensorRT wrote them, PyTorch parts as exported programs, and their wiring.

    wiring.json      which part is called with which values, in order
    NAME.engine      one serialised TensorRT engine
    NAME.pt2         nodes that TensorRT did not take, as an exported program
    state.safetensors      the state kept between calls, at its initial values, and constants that the program returns
    state_now.safetensors  the same state when the engine was saved, if the engine had been called before

No part is pickled, and no part refers to the GPU or the process that it was built in.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from calibcast.calib.artifacts import load_json, load_program, parsed, save_json, save_program, written_whole
from calibcast.calib.errors import ArtifactError, BuildError
from calibcast.calib.sealed_files import check_plain_part
from calibcast.calib.tensor_files import load_tensors, save_tensors
from calibcast.engines.tensorrt.program_device import on_device
from torch import fx
from torch.utils import _pytree as pytree

WIRING, _KIND = "wiring.json", "wiring"
STATE, STATE_NOW = "state.safetensors", "state_now.safetensors"
# How the error about an engine that cannot be set up ends.
DAMAGED = (
    ". The engine is damaged, or it fails to set itself up on this GPU (an execution context); for half-precision "
    "attention build with decompose_attention=True."
)


class WiringError(Exception):
    """A compiled graph holds more than engines and PyTorch parts, so it cannot be written as such files."""


@dataclass(frozen=True)
class Made:
    """Facts about a compiled module that the module itself does not tell.

    places: for each engine, the index among its outputs of each value that the graph takes from it; outputs that are
    the same tensor share one index. held: placeholder -> value, for the placeholders after the program's inputs: the
    state that was lifted out. updated: names of the state that the last outputs of the graph are new values of, in
    order. constants: outputs of the program that no part gives, by place.
    """

    places: Mapping[str, Sequence[int]] = field(default_factory=dict)
    held: Mapping[str, torch.Tensor] = field(default_factory=dict)
    updated: Sequence[str] = ()
    constants: Mapping[int, Any] = field(default_factory=dict)


def write_parts(module: fx.GraphModule, folder: Path, made: Made | None = None) -> None:
    """Write a module compiled by Torch-TensorRT. Raises WiringError for a module that cannot be taken apart, and
    BuildError for a module that takes an output that its engine does not have."""
    writer = _Writer(module, folder, made or Made())
    for node in module.graph.nodes:
        writer.add(node)
    if writer.held:
        save_tensors(folder / STATE, writer.held)
    save_json(folder / WIRING, _KIND, {"steps": writer.steps, "parts": writer.parts})


class _Writer:
    """Writes one compiled module, node by node."""

    def __init__(self, module: fx.GraphModule, folder: Path, made: Made) -> None:
        self._module, self._folder, self._made = module, folder, made
        self._same: dict[str, Any] = {}  # a node's name -> the reference that stands for it
        self.steps: list[dict[str, Any]] = []
        self.parts: dict[str, dict[str, Any]] = {}
        self.held: dict[str, torch.Tensor] = {}

    def add(self, node: fx.Node) -> None:
        if node.op == "placeholder" and node.name in self._made.held:
            self._hold(node.name, self._made.held[node.name])
        elif node.op == "placeholder":
            self.steps.append({"input": node.name})
        elif node.op == "get_attr" and (held := _tensor_at(self._module, str(node.target))) is not None:
            self._hold(node.name, held)
        elif node.op == "call_function" and node.target is getitem:
            self._pick(node)
        elif node.op == "call_module" and not node.kwargs:
            name = str(node.target)
            self.parts[name] = _written(name, self._module.get_submodule(name), self._folder)
            self.steps.append({"call": node.name, "part": name, "arguments": [self._reference(a) for a in node.args]})
        elif node.op == "output":
            self._give(node)
        else:
            raise WiringError(f"{node.op} {node.target} stands between the engines")

    def _hold(self, name: str, value: torch.Tensor) -> None:
        self.held[name] = value
        self.steps.append({"state": name})

    def _pick(self, node: fx.Node) -> None:
        """Take one output of a part. An engine with one output returns the tensor itself, whose item 0 would be a
        row."""
        maker, index = node.args
        part = self.parts.get(str(maker.target)) if isinstance(maker, fx.Node) else None
        if part is None or part["kind"] != "engine" or not isinstance(index, int):
            self.steps.append({"item": node.name, "of": self._reference(maker), "index": index})
            return
        assert isinstance(maker, fx.Node)
        places = self._made.places.get(str(maker.target))
        given = given_outputs(part)
        place = index if places is None else places[index] if index < len(places) else -1
        if not 0 <= place < len(given):
            raise BuildError(
                f"the program takes output {index} of {maker.target}, which gives {len(given)}: {', '.join(given)}. "
                "Some of its outputs are one tensor: give each a value of its own, or leave it out."
            )
        if len(given) == 1:
            self._same[node.name] = self._reference(maker)
        else:
            self.steps.append({"item": node.name, "of": self._reference(maker), "index": place})

    def _give(self, node: fx.Node) -> None:
        leaves = [self._reference(leaf) for leaf in pytree.tree_leaves(node.args[0])]
        updated = list(self._made.updated)
        own = len(leaves) - len(updated)
        pairs = zip(updated, leaves[own:], strict=True)
        given = leaves[:own]
        for place, value in sorted(self._made.constants.items()):
            given.insert(place, self._reference(value))
        step: dict[str, Any] = {"outputs": given}
        if updated:
            step["updates"] = [{"state": name, "to": value} for name, value in pairs]
        self.steps.append(step)

    def _reference(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._same.get(value.name, {"value": value.name})
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise WiringError(f"an argument is a {type(value).__name__}")


def given_outputs(part: Mapping[str, Any]) -> list[str]:
    """The outputs that an engine returns to its caller: all but the last ones that are updated in place."""
    names, aliased = list(part["outputs"]), part.get("aliased_io") or {}
    while names and names[-1] in aliased:
        names.pop()
    return names


def _tensor_at(module: fx.GraphModule, target: str) -> torch.Tensor | None:
    value: Any = module
    for name in target.split("."):
        value = getattr(value, name, None)
    return value if isinstance(value, torch.Tensor) else None


def _written(name: str, part: Any, folder: Path) -> dict[str, Any]:
    if isinstance(part, fx.GraphModule):
        save_program(_exported(name, part), folder / f"{name}.pt2")
        return {"kind": "torch"}
    with written_whole(folder / f"{name}.engine") as temporary:
        temporary.write_bytes(part.serialized_engine)
    aliased = getattr(part, "aliased_io", None) or {}
    return {
        "kind": "engine",
        "inputs": list(part.input_binding_names),
        "outputs": list(part.output_binding_names),
        "requires_output_allocator": bool(part.requires_output_allocator),
        # An output that is an input updated in place: output -> [input, how].
        **({"aliased_io": {output: list(pair) for output, pair in aliased.items()}} if aliased else {}),
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
    """Load the parts on `device` and wire them up. The module takes flat inputs and returns a tuple of flat outputs.

    Needs a GPU. Raises ArtifactError when a file is missing or damaged, BuildError when TensorRT refuses an engine.
    """
    content = load_json(folder / WIRING, _KIND)
    with parsed(folder / WIRING, _KIND):
        root = torch.nn.Module()
        for name, part in content["parts"].items():
            check_plain_part(name, folder / WIRING)
            root.add_module(name, _loaded(name, part, folder, device))
        names = {step["state"] for step in content["steps"] if "state" in step}
        held = load_tensors(folder / STATE) if names else {}
        if names - held.keys():
            raise ArtifactError(f"{folder / STATE} lacks {', '.join(sorted(names - held.keys()))}")
        for name in names:
            root.register_buffer(name, held[name].to(device))
        module = _wired(root, content["steps"])
        if (folder / STATE_NOW).is_file():
            set_state(module, load_tensors(folder / STATE_NOW))
        return module


def set_state(module: fx.GraphModule, values: Mapping[str, torch.Tensor]) -> None:
    """Set the state of a module of `read_parts`, in place. Raises ArtifactError for values that do not fit."""
    for name, now in state_of(module).items():
        if name not in values or values[name].shape != now.shape or values[name].dtype != now.dtype:
            raise ArtifactError(f"the saved state has no {name} of {now.dtype}, {list(now.shape)}")
        now.copy_(values[name])


def state_of(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """What a module of `read_parts` keeps between calls, on its device: the tensors themselves, not copies."""
    return dict(module.named_buffers(recurse=False))


def engine_paths(folder: Path) -> list[tuple[str, Path]]:
    """Name and file of every engine in the folder, in the order in which they were built."""
    content = load_json(folder / WIRING, _KIND)
    with parsed(folder / WIRING, _KIND):
        engines = [name for name, part in content["parts"].items() if part["kind"] == "engine"]
        return [(name, folder / f"{check_plain_part(name, folder / WIRING)}.engine") for name in engines]


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
            **({"aliased_io": _pairs(part["aliased_io"])} if part.get("aliased_io") else {}),
        )
    except Exception as error:  # TensorRT's, through a C++ extension
        raise BuildError(
            f"TensorRT does not take {path.name}: {type(error).__name__}: {str(error)[:500].strip()}{DAMAGED}"
        ) from error
    return module  # type: ignore[no-any-return]


def _pairs(aliased: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, str]]:
    return {output: (str(source), str(how)) for output, (source, how) in aliased.items()}


def _wired(root: torch.nn.Module, steps: list[dict[str, Any]]) -> fx.GraphModule:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def value(reference: Any) -> Any:
        return made[reference["value"]] if isinstance(reference, dict) else reference

    for step in steps:
        if "input" in step:
            made[step["input"]] = graph.placeholder(step["input"])
        elif "state" in step:
            made[step["state"]] = graph.get_attr(step["state"])
        elif "item" in step:
            made[step["item"]] = graph.call_function(getitem, (value(step["of"]), step["index"]))
        elif "call" in step:
            made[step["call"]] = graph.call_module(step["part"], tuple(value(a) for a in step["arguments"]))
        else:
            given = [_kept(graph, value(reference)) for reference in step["outputs"]]
            for update in step.get("updates", ()):
                graph.call_function(torch.ops.aten.copy_.default, (made[update["state"]], value(update["to"])))
            graph.output(tuple(given))
    return fx.GraphModule(root, graph)


def _kept(graph: fx.Graph, given: Any) -> Any:
    """An output for the caller. If it is state itself, a copy of it: the caller's must not change with the next
    call."""
    is_state = isinstance(given, fx.Node) and given.op == "get_attr"
    return graph.call_function(torch.clone, (given,)) if is_state else given
