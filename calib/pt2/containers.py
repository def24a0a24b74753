"""The containers that a program takes and gives, such as dicts and the output classes of a library, in its file."""

from __future__ import annotations

import copy
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from calibcast.calib.plain_tensors import is_plain
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind
from torch.utils import _pytree as pytree

_PLAIN = (tuple, list, dict, OrderedDict)
_CLASS = re.compile(r'\\"type\\": \\"([^"\\]+)\\"')  # in JSON within JSON


def why_not_saved(program: ExportedProgram) -> str | None:
    """Why a program could not be saved and loaded again; None where it can be."""
    for spec in (program.call_spec.in_spec, program.call_spec.out_spec):
        try:
            pytree.treespec_dumps(spec)
        except NotImplementedError as error:
            named = re.search(r"<class '([^']+)'>", str(error))
            return (
                f"its inputs or outputs hold {named[1] if named else error}, for which torch has no name in files: let "
                "the model take or return a tuple or a dict in its place, as in tuple(x.topk(2)), or give the class a "
                "name (torch.export.register_dataclass(serialized_type_name=))"
            )
    outputs = [s.arg for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    for place, arg in enumerate(outputs):
        if isinstance(arg, ConstantArgument) and isinstance(arg.value, str):
            return f"its output {place} is the text {arg.value!r}, which torch writes and cannot read: leave it out"
    return None


def without_odd_examples(program: ExportedProgram) -> ExportedProgram:
    """The program without its example inputs where a tensor among them needs more than numbers in a file: a sparse one,
    or one of a class of its own. Nothing else needs these examples."""
    tensors = [leaf for leaf in pytree.tree_leaves(program.example_inputs) if isinstance(leaf, torch.Tensor)]
    if all(type(tensor) in (torch.Tensor, torch.nn.Parameter) and is_plain(tensor) for tensor in tensors):
        return program
    made = copy.copy(program)
    made._example_inputs = None
    return made


def unknown_classes(path: Path) -> list[str]:
    """The classes of containers in the file of a program that this process does not know."""
    try:
        with zipfile.ZipFile(path) as file:
            models = [entry for entry in file.infolist() if entry.filename.endswith("models/model.json")]
            plain = [entry for entry in models if entry.compress_type == zipfile.ZIP_STORED]  # no zip bomb
            found = {kind for entry in plain for kind in _CLASS.findall(file.read(entry).decode(errors="replace"))}
    except Exception:  # the zip reader raises whatever it meets: UnicodeDecodeError, NotImplementedError, ..
        return []
    return sorted(found - pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.keys())


def with_plain_containers(program: ExportedProgram) -> ExportedProgram:
    """The program with a dict or a list in place of each container of another class; itself where it has none.

    A process that has not imported the library of the class can load it. Names of inputs and outputs stay the same.
    """
    specs = (program.call_spec.in_spec, program.call_spec.out_spec)
    if all(kind in _PLAIN for kind in _classes(specs)):
        return program
    made = copy.copy(program)
    calls = list(program.module_call_graph)
    assert calls[0].signature is not None
    taken, given = (pytree.tree_structure(_plain(spec)) for spec in specs)
    calls[0] = replace(calls[0], signature=replace(calls[0].signature, in_spec=taken, out_spec=given))
    made._module_call_graph = calls
    made._example_inputs = None
    return made


def _classes(specs: Any) -> Iterator[Any]:
    for spec in specs:
        if not spec.is_leaf():
            yield spec.type
            yield from _classes(spec.children())


def _plain(spec: pytree.TreeSpec) -> Any:
    """A structure of plain containers with as many leaves as `spec`, and its keys where it has some."""
    if spec.is_leaf():
        return 0
    children, kind = [_plain(child) for child in spec.children()], spec.type
    if kind in (tuple, list):
        return kind(children)
    keys: Any = getattr(spec.context, "_fields", spec.context)
    named = isinstance(keys, (list, tuple)) and len(keys) == len(children) and all(isinstance(k, str) for k in keys)
    return dict(zip(keys, children, strict=True)) if named else children
