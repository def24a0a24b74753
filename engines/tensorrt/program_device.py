"""Moving a program to a device without changing the caller's program."""

from __future__ import annotations

import copy

import torch
from calibcast.calib.graph import program_device
from calibcast.calib.pt2.serialiser import SERIALISING
from torch import fx
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass


def copied(program: ExportedProgram) -> ExportedProgram:
    """A copy of the program with its own graph; the weights are shared."""
    with SERIALISING:
        graph = copy.deepcopy(program.graph)
    for old, new in zip(program.graph.nodes, graph.nodes, strict=True):
        new.name, new.target = old.name, old.target  # a copied placeholder `input` would be called `input_1`
    return ExportedProgram(
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


def on_device(program: ExportedProgram, device: torch.device) -> ExportedProgram:
    """`program` itself where it is on `device`, else a copy there; the caller's program is not moved."""
    if program_device(program).type == device.type:
        return program
    return move_to_device_pass(copied(program), str(device))
