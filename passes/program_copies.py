"""A program with another graph: what the passes give back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputSpec, OutputSpec, TensorArgument

P = TypeVar("P", bound=ExportedProgram)


def with_graph(
    kind: type[P],
    program: ExportedProgram,
    source: fx.GraphModule,
    graph: fx.Graph,
    state_dict: Mapping[str, Any],
    constants: Mapping[str, Any],
) -> P:
    """A program of class `kind` like `program`, with this graph and these weights.

    graph: made from that of `source`, with the same inputs and outputs in order; its outputs may have new names.
    """
    made = kind(
        root=_children(source, graph),  # not a module: its code would be generated and compiled twice
        graph=graph,
        graph_signature=_signature(program.graph_signature, graph),
        state_dict=dict(state_dict),
        range_constraints=copy.copy(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=dict(constants),
        verifiers=program.verifiers,
    )
    made.graph_module.training = source.training
    made.graph_module.meta.update(source.meta)
    return made


def _children(source: fx.GraphModule, graph: fx.Graph) -> dict[str, Any]:
    """The modules that `get_attr` nodes name, under names without dots: `torch.export.save` finds no others."""
    children = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            child = source.get_submodule(str(node.target))
            node.target = str(node.target).replace(".", "__")
            children[node.target] = child
    return children


def _signature(old: ExportGraphSignature, graph: fx.Graph) -> ExportGraphSignature:
    """The program's signature with the outputs' new names: a cast may stand before an output."""
    output = next(iter(reversed(graph.nodes)))
    specs = [
        OutputSpec(spec.kind, TensorArgument(result.name), spec.target)
        if isinstance(spec.arg, TensorArgument) and isinstance(result, fx.Node)
        else spec
        for spec, result in zip(old.output_specs, output.args[0], strict=True)
    ]
    inputs = [InputSpec(spec.kind, spec.arg, spec.target, spec.persistent) for spec in old.input_specs]
    return ExportGraphSignature(input_specs=inputs, output_specs=specs)
