"""What is done to a copy of the program before `torch.onnx` sees it, so that it becomes ONNX whole."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from calibcast.calib.pt2.serialiser import SERIALISING
from calibcast.engines.tensorrt.builder.preparing import COPY, constants_apart, contents_apart
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, OutputSpec
from torch.utils import _pytree as pytree

VIEW = torch.ops.aten.view.default
PRODUCT = torch.ops.prims.prod.default
_WRITES = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)


@dataclass(frozen=True)
class Written:
    """A buffer, or the placeholder of a user input, that the program writes to."""

    name: str
    is_input: bool


def readied(program: ExportedProgram) -> tuple[ExportedProgram, tuple[Written, ...]]:
    """`program` without writes, and what it writes to: the next content of each is an output before its own.

    Else torch.onnx drops what nothing but a buffer's next content needs, and what is written to a user input. `program`
    is a copy already.
    """
    contents_apart(program.graph)
    program, _ = constants_apart(program)
    with SERIALISING:
        functional = program.run_decompositions({})  # takes no operator apart: it only has writes become outputs
    _laid_out(functional.graph)
    outputs = functional.graph_signature.output_specs
    written = tuple(
        Written(str(spec.target), spec.kind == OutputKind.USER_INPUT_MUTATION)
        for spec in outputs
        if spec.kind in _WRITES
    )
    return (_all_given(functional), written) if written else (functional, ())


def _laid_out(graph: fx.Graph) -> None:
    """Have every tensor lie in order before it is viewed: decomposing attention gives other strides in fp16 than the
    export saw, and a view of these is refused. ONNX knows no strides, and no copy is left in it."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is VIEW:
            source = node.args[0]
            with graph.inserting_before(node):
                copy = graph.call_function(COPY, (source,), {"memory_format": torch.contiguous_format})
            copy.meta = {"val": source.meta.get("val")}
            node.replace_input_with(source, copy)


def _all_given(functional: ExportedProgram) -> ExportedProgram:
    """The same, in which what is written is an output like others."""
    signature = functional.graph_signature
    given = [
        OutputSpec(OutputKind.USER_OUTPUT, spec.arg, None) if spec.kind in _WRITES else spec
        for spec in signature.output_specs
    ]
    calls = list(functional.module_call_graph)
    if calls[0].signature is not None:
        flat = pytree.tree_structure((0,) * sum(spec.kind == OutputKind.USER_OUTPUT for spec in given))
        own = replace(calls[0].signature, out_spec=flat, outputs=[spec.arg for spec in given])
        calls[0] = replace(calls[0], signature=own)
    return ExportedProgram(
        root=functional.graph_module,
        graph=functional.graph,
        graph_signature=replace(signature, output_specs=given),
        state_dict=functional.state_dict,
        range_constraints=functional.range_constraints,
        module_call_graph=calls,
        constants=functional.constants,
        verifiers=functional.verifiers,
    )


def translations() -> dict[Any, Callable[..., Any]]:
    """ONNX functions for operators that torch.onnx has none for: what its own decompositions end in."""
    op = importlib.import_module("onnxscript").opset18

    def product(inp: Any, dims: Sequence[int], output_dtype: int = -1) -> Any:
        return op.ReduceProd(inp, op.Constant(value_ints=list(dims)), keepdims=0)

    return {PRODUCT: product}
