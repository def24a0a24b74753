"""The TensorRT backend, through whichever flavour of Torch-TensorRT is installed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from calib.artifacts import load_json, parsed, save_json
from calib.batches import Leaf, Signature, signature_of
from calib.errors import ArtifactError, BatchError, BuildError
from calib.execution import input_structure
from calib.graph import program_device
from calib.ranges import RangeTable
from engines import torch_tensorrt_adapter as adapter

_FILE, _PROFILES, _KIND = "engine.pt2", "profiles.json", "profiles"
Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]  # smallest, most frequent, largest


class TensorrtRuntime:
    """A compiled module on a GPU, and what it takes to save it."""

    def __init__(self, module: Any, program: ExportedProgram, shapes: list[Profile], device: torch.device) -> None:
        self._module, self._program, self._profiles = module, program, shapes
        self._signature = signature_of(program)
        self.device = device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self._signature.flatten((args, kwargs), 0)
        for leaf, value, profile in zip(self._signature.leaves, flat, self._profiles, strict=True):
            _check_profile(leaf, value, profile)
        moved = [v.to(self.device) if isinstance(v, torch.Tensor) else v for v in flat]
        args, kwargs = input_structure(self._program, moved)
        with torch.no_grad():
            return self._module(*args, **kwargs)

    def save(self, folder: Path) -> None:
        try:
            adapter.save_module(self._module, str(folder / _FILE))
        except Exception as error:  # serialisers of three packages
            raise BuildError(f"Torch-TensorRT cannot save this engine: {type(error).__name__}: {error}") from error
        save_json(folder / _PROFILES, _KIND, {"profiles": self._profiles})


class TensorrtBackend:
    """Builds through `torch_tensorrt.dynamo.compile`, always explicitly typed unless asked otherwise."""

    name = "tensorrt"

    def unavailable(self) -> str | None:
        return adapter.missing()

    def build(self, program: ExportedProgram, ranges: RangeTable | None, settings: dict[str, Any]) -> TensorrtRuntime:
        problem = self.unavailable()
        if problem is not None:
            raise BuildError(f"backend='tensorrt' cannot be used here: {problem}. Or use backend='eager'.")
        device = torch.device(settings.pop("device", "cuda"))
        weakly_typed = settings.pop("weakly_typed", None)
        signature = signature_of(program)
        shapes = profiles(signature, ranges)
        specs = [
            adapter.input_spec(profile, leaf.dtype) if leaf.dtype is not None else leaf.constant
            for leaf, profile in zip(signature.leaves, shapes, strict=True)
        ]
        args, kwargs = input_structure(program, specs)
        moved = on_device(program, device)
        try:
            module = adapter.compile_program(moved, args, kwargs, {"min_block_size": 1, **settings}, weakly_typed)
        except BuildError:
            raise
        except Exception as error:  # the builder, its converters and the partitioner each raise their own
            raise BuildError(
                f"Torch-TensorRT could not build the engine: {type(error).__name__}: {_short(error)}. If it names "
                "an operator, keep it out with torch_executed_ops={...}; if it names attention, try "
                "decompose_attention=True."
            ) from error
        return TensorrtRuntime(module, program, shapes, device)

    def load(self, folder: Path, program: ExportedProgram) -> TensorrtRuntime:
        problem = self.unavailable()
        if problem is not None:
            raise BuildError(f"this engine needs TensorRT: {problem}")
        path = folder / _FILE
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: the engine was not saved whole")
        try:
            module = adapter.load_module(str(path))
        except Exception as error:
            raise ArtifactError(f"{path} cannot be loaded: {type(error).__name__}: {_short(error)}") from error
        with parsed(folder / _PROFILES, _KIND):
            saved = load_json(folder / _PROFILES, _KIND)["profiles"]
            shapes: list[Profile] = [(tuple(low), tuple(usual), tuple(high)) for low, usual, high in saved]
        return TensorrtRuntime(module, program, shapes, torch.device("cuda"))

    def versions(self) -> dict[str, str]:
        gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
        return {"torch": torch.__version__, **adapter.package_versions(), **gpu}


def profiles(signature: Signature, ranges: RangeTable | None) -> list[Profile]:
    """(smallest, most frequent, largest) shape of each input: the sizes that calibration saw, else the exported range.

    Raises BuildError for a dynamic size that nothing bounds.
    """
    sizes = {} if ranges is None else ranges.calibration.input_sizes
    return [_profile(leaf, sizes.get(leaf.name), signature.bounds) for leaf in signature.leaves]


def _profile(
    leaf: Leaf, seen: Sequence[Mapping[str, int]] | None, bounds: Mapping[Any, tuple[int, int | None]]
) -> Profile:
    triples: list[tuple[int, int, int]] = []
    for dimension, size in enumerate(leaf.sizes):
        if isinstance(size, int):
            triple = (size, size, size)
        elif seen is not None:
            counts = {int(key): count for key, count in seen[dimension].items()}
            triple = (min(counts), max(counts, key=lambda key: counts[key]), max(counts))
        else:
            triple = _exported_range(leaf, dimension, size, bounds)
        triples.append(triple)
    return tuple(t[0] for t in triples), tuple(t[1] for t in triples), tuple(t[2] for t in triples)


def _check_profile(leaf: Leaf, value: Any, profile: Profile) -> None:
    low, _, high = profile
    if isinstance(value, torch.Tensor) and any(not a <= s <= b for a, s, b in zip(low, value.shape, high, strict=True)):
        raise BatchError(
            f"input {leaf.name} is {list(value.shape)}, but this engine was built for {list(low)} to {list(high)}: the "
            "sizes that calibration saw, or else the exported range. Build it with ranges= that saw this size."
        )


def _exported_range(
    leaf: Leaf, dimension: int, size: Any, bounds: Mapping[Any, tuple[int, int | None]]
) -> tuple[int, int, int]:
    low, high = bounds.get(size, (1, None))
    if high is None or high > 1 << 20:
        raise BuildError(
            f"input {leaf.name}: dimension {dimension} ({size}) has no upper bound, and TensorRT needs one. Pass "
            "ranges= (the sizes that calibration saw), or export with torch.export.Dim(name, min=.., max=..)."
        )
    return max(low, 1), high, high


def on_device(program: ExportedProgram, device: torch.device) -> ExportedProgram:
    """`program` itself where it is on `device`, else a copy there; the caller's program is not moved."""
    if program_device(program).type == device.type:
        return program
    graph = copy.deepcopy(program.graph)
    for old, new in zip(program.graph.nodes, graph.nodes, strict=True):
        new.name, new.target = old.name, old.target  # a copied placeholder `input` would be called `input_1`
    moved = ExportedProgram(
        root=fx.GraphModule(program.graph_module, graph),
        graph=graph,
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=dict(program.state_dict),
        range_constraints=dict(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=None,
        constants=dict(program.constants),
        verifiers=program.verifiers,
    )
    return move_to_device_pass(moved, str(device))


def _short(error: Exception) -> str:
    return (str(error).strip() or repr(error))[:800]
