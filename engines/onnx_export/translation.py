"""From an exported program to an ONNX model in memory, through `torch.onnx`, and the clearing up after it.

`torch.onnx.export(optimize=True)` is never used: its optimiser deletes `+ 1e-8`, in fp32 too, and so makes a division
by zero of `x / (norm + 1e-8)`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import string
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from calibcast.calib.errors import BuildError, first_line
from calibcast.engines.onnx_export.readying import readied, translations
from calibcast.engines.tensorrt.builder.network_layers import stamp, stamped_name
from calibcast.engines.tensorrt.builder.preparing import COPY
from calibcast.engines.tensorrt.program_device import copied
from torch.export import ExportedProgram

INSTALL = "pip install 'calibcast[onnx]'"
# Of torch.onnx: in the metadata of each ONNX node, the line of the graph that it was made from, and a stack trace.
_LINE, _TRACE = "pkg.torch.onnx.fx_node", "pkg.torch.onnx.stack_trace"
_PROMOTION = "prims.convert_element_type"


@dataclass(frozen=True)
class Translation:
    """An ONNX model in memory (`onnx_ir.Model`), and what of the program it is made from.

    origins: ONNX node -> name of the program's node. mutations: written buffer -> the ONNX value of its next content.
    written_inputs: the same by placeholder of a user input.
    """

    model: Any
    origins: dict[str, str]
    mutations: dict[str, Any]
    written_inputs: dict[str, Any]


def translated(program: ExportedProgram, own: Mapping[Any, Callable[..., Any]] | None = None) -> Translation:
    """Translate `program`, which is not changed. own: ONNX functions of the caller's, by operator.

    Raises BuildError that says which operator ONNX does not have.
    """
    for package in ("onnx", "onnxscript"):
        _required(package)
    marked = copied(program)
    stamp(marked)
    try:
        with _quiet():
            marked, written = readied(marked)
            table = {**translations(), **(own or {})}
            made = torch.onnx.export(marked, dynamo=True, optimize=False, verbose=False, custom_translation_table=table)
    except Exception as error:  # torch.onnx and onnxscript each raise their own
        raise BuildError(f"ONNX cannot have this program: {_reason(error)}") from error
    assert made is not None
    assert made.exported_program is not None
    names = {node.name: stamped_name(node) for node in made.exported_program.graph.nodes}
    model = made.model
    _named(model)
    fold_sizes(model, {one.name for one in written})
    contents = _contents(model, len(written))
    contents = _drop_copies(model, contents)
    drop_promotions(model)
    _drop_zero_biases(model)
    _in_small_letters(model)
    origins = {node.name: names.get(graph_name(node), "") for node in every_node(model)}
    for node in every_node(model):
        node.metadata_props.pop(_TRACE, None)  # it tells where on the exporting machine files are
    origins = {node: origin for node, origin in origins.items() if origin}
    buffers, inputs = (
        {one.name: value for one, value in zip(written, contents, strict=True) if one.is_input is is_input}
        for is_input in (False, True)
    )
    return Translation(model, origins, buffers, inputs)


def every_node(model: Any) -> Iterator[Any]:
    """The nodes of the model's graph and of the graphs within."""
    yield from importlib.import_module("onnx_ir").traversal.RecursiveGraphIterator(model.graph)


def graph_name(node: Any) -> str:
    """The name of the torch node that an ONNX node was made from; "" where it does not say."""
    found = re.match(r"%(\w+)", node.metadata_props.get(_LINE, ""))
    return found.group(1) if found else ""


def fold_sizes(model: Any, written: Set[str]) -> None:
    """Compute now what is known now of sizes, axes and indices, and make plain outputs of lists of tensors.

    TensorRT's parser asks for axes and sizes that are constants, and knows no sequences. Only whole numbers and
    booleans are computed here, by onnxscript: no floating-point operation is taken away. written: buffers that a call
    changes, and which are constants only until they become inputs.
    """

    def folds(node: Any) -> bool | None:
        """None leaves it to onnxscript, by size. A value to which torch.onnx gives no type has that of its inputs."""
        values = [value for value in (*node.inputs, *node.outputs) if value is not None]
        kinds = [value.dtype for value in values if value.dtype is not None]
        whole = bool(kinds) and not any(kind.is_floating_point() for kind in kinds)
        return None if whole and written.isdisjoint(value.name for value in values) else False

    lines = {value.name: node.metadata_props.get(_LINE) for node in every_node(model) for value in node.outputs}
    importlib.import_module("onnxscript.optimizer").fold_constants(model, should_fold=folds)
    for node in every_node(model):
        if _LINE not in node.metadata_props and (line := _line_of(node, lines)):
            node.metadata_props[_LINE] = line
    _named(model)


def _line_of(node: Any, lines: Mapping[str, str | None]) -> str | None:
    """The line of the graph that a node which folding made stands for: of its outputs, or of what reads them."""
    for output in node.outputs:
        if line := lines.get(output.name):
            return line
    readers = [use.node for output in node.outputs for use in output.uses()]
    return next((line for reader in readers if (line := _line_of(reader, lines))), None)


def drop_promotions(model: Any) -> None:
    """Take out the pairs of casts with which torch.onnx has a node compute in fp32 that the graph has in fp16.

    It does so for some operators (abs, sum): fp16 -> Cast -> ReduceSum -> Cast -> fp16. In a strongly typed network
    these would run in fp32, against the plan. The graph's own casts are another operator and stay.
    """
    for node in list(every_node(model)):
        if node.op_type != "Cast" and _computes_elsewhere(node):
            _retyped(node)


def _computes_elsewhere(node: Any) -> bool:
    """Whether every floating input comes through a promotion, and every output goes back through one, of one type."""
    floating = [value for value in node.inputs if value is not None and value.dtype and value.dtype.is_floating_point()]
    sources = [_promoted_from(value) for value in floating]
    outs = [use.node for output in node.outputs for use in output.uses()]
    if not sources or None in sources or not outs or any(output.is_graph_output() for output in node.outputs):
        return False
    backs = [_is_promotion(user) and user.outputs[0].dtype for user in outs]
    return len({*sources, *backs}) == 1


def _promoted_from(value: Any) -> Any:
    maker = value.producer()
    return maker.inputs[0].dtype if maker is not None and _is_promotion(maker) else None


def _is_promotion(node: Any) -> bool:
    return node.op_type == "Cast" and _PROMOTION in node.metadata_props.get(_LINE, "")


def _retyped(node: Any) -> None:
    low = None
    for index, value in enumerate(node.inputs):
        if value is not None and value.producer() is not None and _is_promotion(value.producer()):
            cast = value.producer()
            low = cast.inputs[0].dtype
            node.replace_input_with(index, cast.inputs[0])
            if not value.uses() and not value.is_graph_output():
                cast.graph.remove(cast, safe=True)
    for output in node.outputs:
        output.dtype = low
        for cast in [use.node for use in output.uses()]:
            _replaced(cast.outputs[0], output)
            cast.graph.remove(cast, safe=True)


def _drop_copies(model: Any, contents: list[Any]) -> list[Any]:
    """Take out what came of copies that `readied` put in. Not onnx_ir's pass for it, which breaks the bodies of loops.

    contents: values that are no outputs yet; returned with what was copied in place of copies.
    """
    for node in list(model.graph):
        copied_here = node.op_type == "Identity" and str(COPY) in node.metadata_props.get(_LINE, "")
        if copied_here and not node.outputs[0].is_graph_output():
            contents = [node.inputs[0] if value is node.outputs[0] else value for value in contents]
            _replaced(node.outputs[0], node.inputs[0])
            model.graph.remove(node, safe=True)
    return contents


def _drop_zero_biases(model: Any) -> None:
    """Let convolutions without bias have none: onnxscript makes one of zeros, for `conv3d` of a wrong shape."""
    for node in every_node(model):
        bias = node.inputs[2] if node.op_type in {"Conv", "ConvTranspose"} and len(node.inputs) > 2 else None
        maker = None if bias is None else bias.producer()
        if maker is not None and maker.op_type == "Expand" and graph_name(maker) == graph_name(node):
            node.replace_input_with(2, None)


def _in_small_letters(model: Any) -> None:
    """Write the equations of einsum in small letters without spaces: TensorRT's parser takes no others."""
    ir = importlib.import_module("onnx_ir")
    for node in every_node(model):
        if node.op_type == "Einsum":
            equation = small_letters(node.attributes["equation"].as_string())
            node.attributes["equation"] = ir.AttrString("equation", equation)


def small_letters(equation: str) -> str:
    """The same equation in small letters; with its capitals where it has more than 26 letters."""
    equation = equation.replace(" ", "")
    capitals = "".join(sorted({letter for letter in equation if letter.isupper()}))
    free = "".join(letter for letter in string.ascii_lowercase if letter not in equation)[: len(capitals)]
    return equation.translate(str.maketrans(capitals, free)) if len(free) == len(capitals) else equation


def drop_unused(model: Any) -> None:
    """Take out nodes and weights that nothing reads. Not before what becomes of state is an output."""
    importlib.import_module("onnx_ir").passes.common.RemoveUnusedNodesPass()(model)


def _replaced(old: Any, new: Any) -> None:
    """Let every reader of `old`, the graph's own outputs too, read `new`."""
    importlib.import_module("onnx_ir").convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _contents(model: Any, written: int) -> list[Any]:
    """The next contents of what the program writes to: the first outputs, which are taken out."""
    return [model.graph.outputs.pop(0) for _ in range(written)]  # onnx_ir takes no slice out


def _named(model: Any) -> None:
    """Give a name of its own to every node: those inside operators that become several have none, or the same."""
    importlib.import_module("onnx_ir").passes.common.NameFixPass()(model)


def _required(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise BuildError(f"a program leaves as ONNX with the packages onnx and onnxscript: {INSTALL}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx and onnxscript write about their own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.onnx._internal")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """What of an export's error a user can act on: the operator, or else the innermost message."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    texts = [str(cause) for cause in causes]
    for text in reversed(texts):
        found = re.search(r"No (?:ONNX function|decompositions?)[^\n]*", text)
        if found:
            return (
                f"{found.group(0).strip()} Keep that part outside, write it in operators that ONNX has, or give an "
                "ONNX function for the operator (export_onnx(translations=)): ONNX has no complex numbers and knows no "
                "operator of your own."
            )
    return f"{type(causes[-1]).__name__}: {first_line(causes[-1])[:400]}"
