"""Lifting the buffers that a program writes, for a Torch-TensorRT that does not lift them itself.

Version 2.14 does: written buffers become inputs of the engine, and their new values its last outputs. Version 2.11
makes a buffer a constant of the engine and loses what is written to it. So here the program is changed in the same way
before it is compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from calibcast.calib.aliasing import mutated_inputs
from calibcast.calib.graph import state_tensor
from calibcast.engines.tensorrt.program_device import copied
from torch import fx
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind, OutputSpec
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Lifted:
    """A program whose written buffers are positional inputs after its own, and their new values its last outputs.

    held: placeholder -> its value, in the order of the inputs. updated: placeholders, in the order of the outputs.
    behind: how many flat inputs come before the placeholders in `held`. A program without such buffers stays as it is.
    """

    program: ExportedProgram
    held: Mapping[str, torch.Tensor] = field(default_factory=dict)
    updated: tuple[str, ...] = ()
    behind: int = 0


def writes_buffers(program: ExportedProgram) -> bool:
    """Whether a call of the program changes one of its buffers."""
    return bool(mutated_inputs(program) & program.graph_signature.inputs_to_buffers.keys())


def lifted(program: ExportedProgram) -> Lifted:
    """`program` with its written buffers as inputs and outputs; its weights are shared."""
    functional = program.run_decompositions({})
    signature = functional.graph_signature
    written = set(signature.buffers_to_mutate.values())
    holders = {buffer: name for name, buffer in signature.inputs_to_buffers.items() if buffer in written}
    held = {name: state_tensor(functional, buffer) for buffer, name in holders.items()}
    graph = copied(functional).graph
    inputs = _moved_inputs(graph, functional, holders.values())
    outputs, updated = _moved_outputs(graph, functional)
    made = ExportedProgram(
        root=fx.GraphModule(functional.graph_module, graph),
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={name: value for name, value in functional.state_dict.items() if name not in written},
        range_constraints=dict(functional.range_constraints),
        module_call_graph=_calls(functional, len(holders), len(updated)),
        example_inputs=None,
        constants={name: value for name, value in functional.constants.items() if name not in written},
        verifiers=functional.verifiers,
    )
    values = {name: value.detach() for name, value in held.items() if value is not None}
    behind = functional.call_spec.in_spec.child(0).num_leaves
    return Lifted(made, values, tuple(holders[buffer] for buffer in updated), behind)


def _moved_inputs(graph: fx.Graph, program: ExportedProgram, state: Collection[str]) -> list[InputSpec]:
    """Move the placeholders `state` behind those of the positional arguments, and make them user inputs."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    user = [name for name, spec in specs.items() if spec.kind == InputKind.USER_INPUT]
    positional = program.call_spec.in_spec.child(0).num_leaves
    lifted_in = [name for name in specs if name not in user and name not in state]
    order = [*lifted_in, *user[:positional], *state, *user[positional:]]
    first = next(iter(graph.nodes))
    for name in reversed(order):
        if nodes[name] is not first:
            first.prepend(nodes[name])
            first = nodes[name]
    return [
        InputSpec(InputKind.USER_INPUT, specs[name].arg, None, None) if name in state else specs[name] for name in order
    ]


def _moved_outputs(graph: fx.Graph, program: ExportedProgram) -> tuple[list[OutputSpec], list[str]]:
    """Put the new values of buffers last, as user outputs. Returns the output specs, and the buffers of these
    values."""
    output = graph.output_node()
    given: Any = output.args[0]
    pairs = list(zip(given, program.graph_signature.output_specs, strict=True))
    own = [(value, spec) for value, spec in pairs if spec.kind == OutputKind.USER_OUTPUT]
    new = [(value, spec) for value, spec in pairs if spec.kind == OutputKind.BUFFER_MUTATION]
    output.args = (tuple(value for value, _ in (*own, *new)),)
    specs = [spec for _, spec in own] + [OutputSpec(OutputKind.USER_OUTPUT, spec.arg, None) for _, spec in new]
    return specs, [str(spec.target) for _, spec in new]


def _calls(program: ExportedProgram, more_inputs: int, more_outputs: int) -> list[ModuleCallEntry]:
    """The call signature of the whole program, with `more_inputs` and `more_outputs` added to its positional inputs and
    outputs."""

    def flat(spec: pytree.TreeSpec) -> Any:
        return pytree.tree_unflatten([0] * spec.num_leaves, spec)

    args, kwargs = flat(program.call_spec.in_spec)
    entry = copy.deepcopy(program.module_call_graph[0])
    assert entry.signature is not None
    entry.signature.in_spec = pytree.tree_structure(((*args, *[0] * more_inputs), kwargs))
    entry.signature.out_spec = pytree.tree_structure((flat(program.call_spec.out_spec), [0] * more_outputs))
    entry.signature.forward_arg_names = None
    return [entry]
