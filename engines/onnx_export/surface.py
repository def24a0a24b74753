"""What a caller of an ONNX model sees: names of inputs, outputs, sizes and state, and the plan in its metadata."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from calibcast.calib.artifacts import versions
from calibcast.calib.flattening import inlined_name
from calibcast.calib.graph import dtype_name
from calibcast.engines.io_names import flat_output_names, input_names, size_names, tensor_outputs
from calibcast.engines.onnx_export.translation import Translation, every_node
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.verdict import HIGH, KEPT, LOW
from torch.export import ExportedProgram

PLAN, STATE, VERSIONS = "calibcast.plan", "calibcast.state", "calibcast.versions"
NODE, PRECISION, REASON = "calibcast.node", "calibcast.precision", "calibcast.reason"


def name_everything(translation: Translation, program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Give inputs, outputs and sizes the caller's names, and make state of written buffers.

    A written buffer is an input `NAME` and an output `NAME_next`, which the caller feeds back. Returned: the content of
    each at the start. An input that the program writes to has an output `NAME_next`, too.
    """
    model = translation.model
    graph = model.graph
    _copy_outputs(model)
    sizes = size_names(program)  # torch.onnx keeps the symbols of the program
    names = list(input_names(program).values())
    _free(model, names)
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name
    called = input_names(program)
    written = [called[placeholder] for placeholder in translation.written_inputs]
    graph.outputs.extend(translation.written_inputs.values())
    state = _with_state(translation, program, names)
    flat = flat_output_names(program, [*names, *state])
    wanted = [name for name, computed in zip(flat, tensor_outputs(program), strict=True) if computed]
    wanted += [f"{name}_next" for name in (*written, *state)]
    _free(model, wanted)
    for value, name in zip(graph.outputs, wanted, strict=True):
        value.name = name
    _rename_sizes(model, sizes)
    return state


def _free(model: Any, wanted: list[str]) -> None:
    """Rename inner values that have a name which is to be an input's or an output's."""
    taken = {*wanted}
    values = [v for node in every_node(model) for v in node.outputs] + list(model.graph.inputs)
    for value in [*values, *model.graph.initializers.values()]:
        if value.name in taken:
            value.name = f"{value.name}__inner"


def _copy_outputs(model: Any) -> None:
    """Put an Identity before every output that is an input, a weight, or an output already: each has its own name."""
    ir = importlib.import_module("onnx_ir")
    seen: set[int] = set()
    for index, value in enumerate(list(model.graph.outputs)):
        if value.producer() is None or id(value) in seen:
            node = ir.node("Identity", [value], name=f"output_{index}_identity")
            node.outputs[0].name = f"output_{index}_copy"
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            model.graph.append(node)
            model.graph.outputs[index] = node.outputs[0]
        seen.add(id(value))


def _with_state(translation: Translation, program: ExportedProgram, taken: list[str]) -> dict[str, torch.Tensor]:
    """Make an input and an output of every buffer that the program writes."""
    graph = translation.model.graph
    contents = {**dict(program.named_buffers()), **program.constants}
    state: dict[str, torch.Tensor] = {}
    for buffer, value in translation.mutations.items():
        name = re.sub(r"\W+", "_", buffer)
        name = f"{name}_state" if name in taken else name
        held = graph.initializers.pop(buffer, None) or _unread(contents[buffer])  # torch.onnx drops what nothing reads
        held.name, held.const_value = name, None
        graph.inputs.append(held)
        graph.outputs.append(value)
        state[name] = contents[buffer].detach()
    _copy_outputs(translation.model)
    return state


def _unread(content: torch.Tensor) -> Any:
    """A value for a buffer that the program overwrites, and never reads."""
    ir = importlib.import_module("onnx_ir")
    kind = ir.tensor_adapters.TorchTensor(content.detach().cpu()).dtype
    return ir.Value(name="", shape=ir.Shape(list(content.shape)), type=ir.TensorType(kind))


def _rename_sizes(model: Any, sizes: Mapping[str, str]) -> None:
    """Write the user's names of sizes for torch's symbols, also within expressions such as `2*s0`."""
    ir = importlib.import_module("onnx_ir")
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, sizes)) + r")\b") if sizes else None
    values = [*model.graph.inputs, *(value for node in every_node(model) for value in node.outputs)]
    for value in values:
        if pattern is None or value.shape is None or all(isinstance(size, int) for size in value.shape):
            continue
        dims = [
            size if isinstance(size, int) or size.value is None else pattern.sub(lambda m: sizes[m[1]], size.value)
            for size in value.shape
        ]
        value.shape = ir.Shape(dims)


def write_plan(translation: Translation, plan: PrecisionPlan | None, state: Mapping[str, torch.Tensor]) -> None:
    """Put the plan into the model's metadata, whole, and into each node's, its own part.

    Whole, it is JSON: by node of the program its precision, rule, reason and numbers, and the ONNX nodes that it went
    into (none where it was folded away).
    """
    model = translation.model
    model.metadata_props[VERSIONS] = json.dumps({**versions(), "torch": torch.__version__})
    model.producer_name = "calibcast"
    if state:
        pairs = [{"input": name, "output": f"{name}_next"} for name in state]
        model.metadata_props[STATE] = json.dumps(pairs)
    if plan is None:
        return
    made: dict[str, list[str]] = {}
    for node in every_node(model):
        made.setdefault(translation.origins.get(node.name, ""), []).append(node.name)
    types = {LOW: dtype_name(plan.low_precision_type), HIGH: "exported", KEPT: "kept"}
    rows = {}
    for decision in plan.decisions:
        row: dict[str, Any] = {
            "precision": decision.precision,
            "type": types[decision.precision],
            "rule": decision.rule,
        }
        row |= {"reason": decision.reason, "evidence": _number(decision.evidence), "limit": _number(decision.limit)}
        rows[decision.node] = {**row, "module": decision.module, "onnx": made.get(inlined_name(decision.node), [])}
    content = {"low_precision_type": dtype_name(plan.low_precision_type), "nodes": rows, "notes": list(plan.notes)}
    model.metadata_props[PLAN] = json.dumps(content)
    decisions = {inlined_name(decision.node): decision for decision in plan.decisions}
    for node in every_node(model):
        own = decisions.get(translation.origins.get(node.name, ""))
        if own is not None:
            node.metadata_props.update({NODE: own.node, PRECISION: own.precision, REASON: own.reason})


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity and no NaN."""
    return value if value is None or abs(value) < float("inf") else repr(float(value))
