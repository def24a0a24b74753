"""What goes into an engine and comes out of it, each tensor with its row of the calibration's range table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from calibcast.calib.batches import signature_of
from calibcast.calib.execution import output_names
from calibcast.calib.graph import TensorSpec, dtype_name, is_measurable, producer_of, tensor_specs
from calibcast.calib.masks import mask_tensors
from calibcast.calib.range_statistics import specs_of
from calibcast.calib.ranges import RangeTable
from calibcast.passes.cast_insertion import CAST
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

_LOW_TYPES = (torch.float16, torch.bfloat16)
_Rows = dict[tuple[str, int], Any]


@dataclass(frozen=True)
class End:
    """One floating-point input or output of an engine.

    name: the caller's name for it, such as `image` or `output['logits']`. place: its index among the flat inputs, or
    the flat outputs. spec: that of its row in the range table. calibrated: that row; None where calibration has none.
    limit: the largest finite value of the low type in which it is computed, or to which its readers cast it; None where
    there is no such type. low_type: that type's name. is_mask: whether it is read as a mask only, so that values at or
    below -1e4 say what is left out, and have no size.
    """

    name: str
    place: int
    is_input: bool
    spec: TensorSpec
    calibrated: Mapping[str, Any] | None
    limit: float | None
    low_type: str
    is_mask: bool = False

    @property
    def what(self) -> str:
        """`input image`, `output['logits']`."""
        return f"input {self.name}" if self.is_input else self.name


@dataclass(frozen=True)
class _Known:
    """The rows that an end may have, by (node, output)."""

    specs: dict[tuple[str, int], TensorSpec]
    rows: _Rows
    added: Mapping[str, str]  # node of a rescaled program -> the network's node whose true value it has
    own: dict[tuple[str, int], TensorSpec]  # of the program itself

    def spec_of(self, node: fx.Node) -> TensorSpec | None:
        """The row of the tensor that `node` gives: its own, or for a cast without one, that of the tensor it casts."""
        at: fx.Node | None = node
        while at is not None:
            producer, index = producer_of(at)
            found = self.specs.get((self.added.get(producer.name, producer.name), index or 0))
            if found is not None:
                return found
            at = _cast_of(at)
        producer, index = producer_of(node)
        return self.own.get((producer.name, index or 0))


def ends_of(program: ExportedProgram, ranges: RangeTable | None) -> list[End]:
    """The floating-point inputs and outputs of the cast program, inputs first; no tensor twice.

    ranges: of the network itself (`RangeTable.true_values`). An end without a row there gets its row from `program`.
    """
    own = {(spec.node, spec.output): spec for spec in tensor_specs(program)}
    known = _known(ranges, own)
    nodes, masks = {node.name: node for node in program.graph.nodes}, mask_tensors(program)
    found: dict[tuple[str, int], End] = {}
    for is_input, place, name, node_name in _places(program):
        node = nodes[node_name]
        value = node.meta.get("val")
        spec = known.spec_of(node)
        if spec is None or not isinstance(value, torch.Tensor) or not is_measurable(value.dtype):
            continue
        key = (spec.node, spec.output)
        low = _low_type(node, is_input)
        limit = None if low is None else torch.finfo(low).max
        row, low_type = known.rows.get(key), "" if low is None else dtype_name(low)
        is_mask = node_name in masks or bool((row or {}).get("masked"))
        found.setdefault(key, End(name, place, is_input, spec, row, limit, low_type, is_mask))
    return list(found.values())


def _known(ranges: RangeTable | None, own: dict[tuple[str, int], TensorSpec]) -> _Known:
    if ranges is None:
        return _Known(own, {}, {}, own)
    record = ranges.calibration.rescaled
    table = ranges.true_values()
    rows = {(row["node"], row["output"]): row for row in table.frame.iter_rows(named=True)}
    specs = {(spec.node, spec.output): spec for spec in specs_of(table.frame)}
    return _Known(specs, rows, {} if record is None else record.added, own)


def _places(program: ExportedProgram) -> list[tuple[bool, int, str, str]]:
    """For each tensor that goes in or out: whether it goes in, its place, the caller's name, the node."""
    signature = program.graph_signature
    inputs = [spec for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT]
    outputs = [spec for spec in signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    named_in = zip(inputs, (leaf.name for leaf in signature_of(program).leaves), strict=True)
    named_out = zip(outputs, output_names(program), strict=True)
    return [
        (is_input, place, name, spec.arg.name)
        for is_input, named in ((True, named_in), (False, named_out))
        for place, (spec, name) in enumerate(named)
        if not isinstance(spec.arg, ConstantArgument)
    ]


def _cast_of(node: fx.Node) -> fx.Node | None:
    """The input of a cast that calibcast inserted; None for any other node."""
    if node.op != "call_function" or node.target is not CAST:
        return None
    return node.all_input_nodes[0]


def _low_type(node: fx.Node, is_input: bool) -> torch.dtype | None:
    """The low type in which an output was computed, or an input is read."""
    if is_input:
        read = [user for user in node.users if user.op == "call_function"]
        types = [_dtype(node), *(_dtype(user) for user in read if _cast_of(user) is not None)]
    else:
        source = _cast_of(node)
        types = [_dtype(node), *([] if source is None else [_dtype(source)])]
    return next((dtype for dtype in types if dtype in _LOW_TYPES), None)


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None
