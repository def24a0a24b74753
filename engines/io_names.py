"""The caller's names for inputs and outputs, in the form that ONNX, TensorRT and Triton take: letters, digits, _."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from calibcast.calib.batches import signature_of
from calibcast.calib.execution import output_names
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind

_NAMES = "source_name_to_debug_name"  # of torch's ShapeEnv


def input_names(program: ExportedProgram) -> dict[str, str]:
    """Placeholder -> name, in order, of each flat user input that is a tensor or a number not fixed by the export:
    `batch['ids']` is `batch_ids`."""
    leaves = signature_of(program).leaves
    open_ones = [
        (spec.arg.name, leaf.name)
        for spec, leaf in zip(_user_inputs(program), leaves, strict=True)
        if not isinstance(spec.arg, ConstantArgument)
    ]
    names = _unique(name for _, name in open_ones)
    return {node: name for (node, _), name in zip(open_ones, names, strict=True)}


def flat_output_names(program: ExportedProgram, taken: Iterable[str] = ()) -> list[str]:
    """A name for each flat user output: the key of a dict, the field of a dataclass, `output`, or `output_0`, `_1`.

    taken: names that are in use already; an output with such a name gets the suffix `_out`.
    """
    paths = [name.removeprefix("output") for name in output_names(program)]
    words = [_plain(path) for path in paths]
    named = [word if word and not word[0].isdigit() else f"output_{word}".rstrip("_") for word in words]
    return _unique(named, taken)


def outputs_by_node(program: ExportedProgram) -> dict[str, str]:
    """Node -> name, for each user output that a node computes. A node that is two outputs gets the name of the
    first."""
    specs = [spec for spec in program.graph_signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    names = flat_output_names(program, input_names(program).values())
    pairs = [(s.arg.name, n) for s, n in zip(specs, names, strict=True) if not isinstance(s.arg, ConstantArgument)]
    return dict(reversed(pairs))


def tensor_outputs(program: ExportedProgram) -> list[bool]:
    """For each flat user output, whether it is computed. A constant, such as None, is not."""
    specs = [spec for spec in program.graph_signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    return [not isinstance(spec.arg, ConstantArgument) for spec in specs]


def size_names(program: ExportedProgram) -> dict[str, str]:
    """Symbol -> name of a dynamic size: the one that the user gave to `torch.export.Dim`, else input and dimension.

    torch keeps the names of `Dim` in memory and does not write them into a .pt2, so the sizes of a loaded program have
    names such as `image_dim0`.
    """
    names = input_names(program)
    found: dict[str, str] = {}
    for node, path, dimension, size in _open_sizes(program):
        if str(size) not in found:
            found[str(size)] = _dim_name(size, path, dimension) or f"{names[node]}_dim{dimension}"
    return found


def name_sizes(program: ExportedProgram, names: Mapping[str, str]) -> None:
    """Give the sizes of a program that was read from a .pt2 the names that `size_names` gave before it was written."""
    for _, path, dimension, size in _open_sizes(program):
        if str(size) in names:
            known = getattr(size.node.shape_env, _NAMES, {})
            known[_source(path, dimension)] = names[str(size)]


def _open_sizes(program: ExportedProgram) -> Iterator[tuple[str, str, int, torch.SymInt]]:
    """(placeholder, name of the input as a path, dimension, size) of each dynamic size of the inputs."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    names = input_names(program)
    for spec, leaf in zip(_user_inputs(program), signature_of(program).leaves, strict=True):
        value = nodes[spec.arg.name].meta.get("val") if spec.arg.name in names else None
        for dimension, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt):
                yield spec.arg.name, leaf.name, dimension, size


def _dim_name(size: torch.SymInt, path: str, dimension: int) -> str | None:
    """The name that was given to `torch.export.Dim`, which torch stores under the source of the size."""
    name = getattr(size.node.shape_env, _NAMES, {}).get(_source(path, dimension))
    return None if name is None else str(name)


def _source(path: str, dimension: int) -> str:
    """What torch calls a size of an input."""
    first, bracket, rest = path.partition("[")
    return f"L['{first}']{bracket}{rest}.size()[{dimension}]"


def _user_inputs(program: ExportedProgram) -> Sequence[torch.export.graph_signature.InputSpec]:
    kind = torch.export.graph_signature.InputKind.USER_INPUT
    return [spec for spec in program.graph_signature.input_specs if spec.kind == kind]


def _plain(path: str) -> str:
    return re.sub(r"\W+", "_", path).strip("_")


def _unique(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    others = set(taken)
    used = set(others)
    found: list[str] = []
    for wanted in (_plain(name) or "tensor" for name in names):
        name, count = (wanted if wanted not in others else f"{wanted}_out"), 1
        while name in used:
            count += 1
            name = f"{wanted}_{count}"
        used.add(name)
        found.append(name)
    return found
