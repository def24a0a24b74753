"""Reading an exported graph: which tensors a node gives, where they come from, what a region holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from operator import getitem
from typing import Any

import sympy
import torch
from calibcast.calib.dimension_names import dimension_names, named_size
from calibcast.calib.operators import canonical, operator_of
from calibcast.calib.operators.operator import TRANSPOSED
from calibcast.calib.plain_tensors import why_not_plain
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

_HOPS = torch.ops.higher_order
AUTOCAST_REGION = _HOPS.wrap_with_autocast
GRAD_REGION = _HOPS.wrap_with_set_grad_enabled
# Where the child graph and its operands stand among the arguments of a region node:
# wrap_with_autocast(device_type, dtype, enabled, cache_enabled, child, *operands)
# wrap_with_set_grad_enabled(enabled, child, *operands)
REGION_CHILD: dict[Any, int] = {AUTOCAST_REGION: 4, GRAD_REGION: 1}

KINDS = {
    InputKind.USER_INPUT: "input",
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a program: what is known about it before anything runs.

    `node` is qualified inside a region (`submod_1.linear`); `shape` names symbolic sizes.
    """

    node: str
    output: int
    op: str
    module: str
    source: str
    kind: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """A node of a program or of a region inside it, with its qualified name."""

    name: str
    node: fx.Node
    inside: bool


def child_of(node: fx.Node) -> tuple[str, fx.GraphModule] | None:
    """The name and graph of the region that `node` runs, or None where it runs none."""
    position = REGION_CHILD.get(node.target)
    if node.op != "call_function" or position is None:
        return None
    attribute = node.args[position]
    assert isinstance(attribute, fx.Node)
    name = str(attribute.target)
    owner = node.graph.owning_module
    assert owner is not None
    child = owner.get_submodule(name)
    assert isinstance(child, fx.GraphModule)
    return name, child


def walk(graph_module: fx.GraphModule, prefix: str = "") -> Iterator[Step]:
    """All nodes in the order in which they run, those of regions included."""
    for node in graph_module.graph.nodes:
        region = child_of(node)
        if region is not None:
            yield from walk(region[1], f"{prefix}{region[0]}.")
        yield Step(prefix + node.name, node, bool(prefix))


def size_hint(size: Any) -> int:
    """A size as a number; for a symbolic size its value at export, or 1 where there was none."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return 1 if hint is None else int(hint)


@cache
def base_op(target: Any) -> str:
    """The name in the operator table: `add` for `aten.add_.Tensor`, `div` for `aten.divide.Tensor`; "" if not ATen."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in {"aten", "prims"}:
        return ""
    name = target._schema.name.partition("::")[2]
    return canonical(name.rstrip("_") if name.endswith("_") and not name.endswith("__") else name)


def is_bitcast(target: Any) -> bool:
    """Whether an operator reads the bits of its input as another type: the values change, or how many there are."""
    return base_op(target) != "" and target._overloadname in operator_of(base_op(target)).bitcasts


def is_transposed(node: fx.Node) -> bool:
    """Whether `node` is a transposed convolution, by its operator or by an argument."""
    known = operator_of(base_op(node.target))
    if known.transposed_at is not None:
        return argument_at(node, known.transposed_at) is True
    return known.product == TRANSPOSED


def tensor_values(node: fx.Node) -> list[tuple[int, torch.Tensor]]:
    """The tensors that `node` gives, each with its position (0 for a single one), as recorded at export."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [(0, value)]
    if isinstance(value, (list, tuple)):
        return [(i, item) for i, item in enumerate(value) if isinstance(item, torch.Tensor)]
    return []


@cache
def _arguments(target: Any) -> dict[str, tuple[int, Any]]:
    """Position and default of each argument of an operator, by name. Cached, because reading a schema is slow."""
    return {argument.name: (i, argument.default_value) for i, argument in enumerate(target._schema.arguments)}


def argument_of(node: fx.Node, name: str) -> Any:
    """The value of the argument called `name` in the operator's schema; its default where it was left out."""
    place = _arguments(node.target).get(name) if isinstance(node.target, torch._ops.OpOverload) else None
    if place is None:
        return None
    position, default = place
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def argument_at(node: fx.Node, position: int) -> Any:
    """The value of the argument at a position in the operator's schema, also where it was given by name."""
    if position < len(node.args):
        return node.args[position]
    names = [] if not isinstance(node.target, torch._ops.OpOverload) else list(_arguments(node.target))
    return argument_of(node, names[position]) if position < len(names) else None


def as_list(value: Any) -> list[Any]:
    """A list from an argument that may be one number, several or none: `dim`, `kernel_size`."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def producer_of(node: fx.Node) -> tuple[fx.Node, int | None]:
    """The node that made a tensor, and which of its outputs the tensor is. For `getitem`: the node that it reads."""
    if node.target is getitem and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int):
        return node.args[0], node.args[1]
    return node, None


def is_measurable(dtype: torch.dtype) -> bool:
    """Whether tensors of `dtype` have a range: floating point, not complex."""
    return dtype.is_floating_point


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def op_name(target: Any) -> str:
    """`aten.conv2d.default` for an OpOverload; the plain name for anything else."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return str(getattr(target, "__name__", target))


def module_path(node: fx.Node) -> str:
    """The dotted path of the module that the node was traced in, as in `named_modules()`; "" for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0]
    # A module called twice is recorded as `layer@1`.
    return str(path).partition("@")[0]


def source_line(node: fx.Node) -> str:
    """`file.py:12` of the user's own code that made the node; "" when the export kept no trace."""
    found = ""
    for line in str(node.meta.get("stack_trace") or "").splitlines():
        line = line.strip()
        if not line.startswith('File "'):
            continue
        file, _, rest = line.removeprefix('File "').partition('"')
        number = rest.partition("line")[2].partition(",")[0].strip()
        place = f"{file}:{number}"
        # Frames inside torch.nn say only "linear.py"; the frame before them is the user's.
        if not found or "/torch/nn/" not in file:
            found = place
    return found


def input_kinds(program: ExportedProgram) -> dict[str, str]:
    """The kind of each placeholder, by its name."""
    return {spec.arg.name: KINDS.get(spec.kind, "other") for spec in program.graph_signature.input_specs}


def input_targets(program: ExportedProgram) -> dict[str, str]:
    """The name in the state dict or among the constants of each placeholder that is not a user input."""
    return {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.target is not None and spec.kind != InputKind.USER_INPUT
    }


def state_tensor(program: ExportedProgram, target: str) -> torch.Tensor | None:
    """The parameter, buffer or constant called `target`, or None where it is no tensor."""
    value = program.state_dict.get(target, program.constants.get(target))
    return value if isinstance(value, torch.Tensor) else None


def tensor_specs(program: ExportedProgram, wanted: Callable[[torch.dtype], bool] = is_measurable) -> list[TensorSpec]:
    """Every tensor of the program of a `wanted` type (floating point), in the order in which they are made.

    Inputs, parameters, buffers, constants, and each output of each node, inside regions too. `getitem` and region nodes
    have no spec: they only pass on tensors that have one. Nor have sparse, quantised and other tensors that do not hold
    plain numbers.
    """
    kinds, targets = input_kinds(program), input_targets(program)
    names = dimension_names(program)
    specs = (spec for step in walk(program.graph_module) for spec in _specs_of(step, kinds, targets, names))
    return [spec for dtype, spec in specs if wanted(dtype)]


def _specs_of(
    step: Step, kinds: dict[str, str], targets: dict[str, str], names: Mapping[sympy.Symbol, str]
) -> Iterator[tuple[torch.dtype, TensorSpec]]:
    node = step.node
    if node.op == "placeholder":
        if step.inside:
            return  # a region's operand, measured where it was made
        kind = kinds.get(node.name, "other")
        module = targets.get(node.name, "").rpartition(".")[0]
    elif node.op == "call_function" and node.target is not getitem and node.target not in REGION_CHILD:
        kind, module = "activation", module_path(node)
    else:
        return
    for output, value in tensor_values(node):
        spec = TensorSpec(
            node=step.name,
            output=output,
            op=op_name(node.target) if node.op == "call_function" else node.op,
            module=module,
            source=source_line(node),
            kind=kind,
            dtype=dtype_name(value.dtype),
            shape=tuple(named_size(size, names) for size in value.shape),
        )
        if why_not_plain(value) is None:
            yield value.dtype, spec


def where(node: fx.Node, name: str | None = None) -> str:
    """`node linear_3 (encoder.layers.0.linear1, model.py:31)`: how messages name a place."""
    places = [place for place in (module_path(node), source_line(node)) if place]
    return f"node {name or node.name}" + (f" ({', '.join(places)})" if places else "")


def program_device(program: ExportedProgram) -> torch.device:
    """The device of the program's first weight, else of its first tensor."""
    for tensor in [*program.state_dict.values(), *program.constants.values()]:
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
            return tensor.device
    for node in program.graph.nodes:
        for _, value in tensor_values(node):
            if value.device.type != "meta":
                return value.device
    return torch.device("cpu")


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether both are the same device: `cuda` means the current one, and `cuda:1` is not `cuda:0`."""
    return one.type == other.type and _index(one) == _index(other)


def _index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    # Asking for the current device starts CUDA; a process that has not started it is on the first.
    return torch.cuda.current_device() if device.type == "cuda" and torch.cuda.is_initialized() else 0
