"""Which shapes an output of a program may have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols


def sizes_by_data(program: ExportedProgram) -> list[set[int]]:
    """For each flat user output, the dimensions whose size depends on the data, not on the inputs' sizes alone."""
    nodes = {node.name: node for node in program.graph.nodes}
    outputs = [s.arg for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    values = [nodes[arg.name].meta.get("val") if isinstance(arg, TensorArgument) else None for arg in outputs]
    return [
        {i for i, size in enumerate(value.shape) if free_unbacked_symbols(size)}
        if isinstance(value, torch.Tensor)
        else set()
        for value in values
    ]


def may_be(ours: Sequence[int], theirs: Sequence[int], by_data: set[int]) -> bool:
    """Whether an output may have the shape `ours`: equal to the program's, except sizes that depend on the data."""
    same = all(a == b or i in by_data for i, (a, b) in enumerate(zip(ours, theirs, strict=False)))
    return len(ours) == len(theirs) and same
