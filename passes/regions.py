"""Which nodes a plan may not change."""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem

import torch
from calibcast.calib.flat_regions import flat_regions
from calibcast.calib.flattening import flatten as flatten
from calibcast.calib.flattening import qualified_name as qualified_name
from calibcast.calib.graph import (
    AUTOCAST_REGION,
    argument_of,
    base_op,
    child_of,
    is_bitcast,
    is_measurable,
    op_name,
    tensor_values,
    walk,
)
from calibcast.calib.operators import ASSERTS, CONVERTS
from calibcast.passes.verdict import Verdict
from torch import fx
from torch.export import ExportedProgram


@dataclass(frozen=True, slots=True)
class Candidate:
    """A `call_function` node that a plan has a row for. `inside`: in an autocast region.

    kept: why a plan may not set its type, or None where it may.
    """

    name: str
    node: fx.Node
    inside: bool
    kept: Verdict | None


def candidates(program: ExportedProgram) -> list[Candidate]:
    """The nodes that a plan decides on, in the order in which they run: of the flattened graph, and of autocast
    regions."""
    found: list[Candidate] = []
    graph = flatten(program.graph_module).graph
    flat = flat_regions(graph)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = qualified_name(node)
        region = child_of(node)
        if region is not None:
            inside = walk(region[1], f"{region[0]}.")  # qualified already: `_copy` prefixes what `get_attr` names
            found.extend(Candidate(s.name, s.node, True, _INSIDE) for s in inside if s.node.op == "call_function")
        found.append(Candidate(name, node, False, _in_flat_region(flat[node]) if node in flat else _kept(node)))
    return found


def _in_flat_region(region: str) -> Verdict:
    return Verdict("flat_region", f"it is inside a {region} region, which runs as the user wrote it")


_INSIDE = Verdict("autocast_region", "it is inside a torch.autocast region, which runs as the user wrote it")


def _kept(node: fx.Node) -> Verdict | None:
    return _kept_by_kind(node) or _kept_by_operator(node) or _kept_by_types(node)


def _kept_by_kind(node: fx.Node) -> Verdict | None:
    if node.target is getitem:
        return Verdict("getitem", "it only picks one of several outputs")
    if node.target is AUTOCAST_REGION:
        return Verdict("autocast_region", "a torch.autocast region runs as the user wrote it")
    if not isinstance(node.target, torch._ops.OpOverload):
        return Verdict("higher_order", f"{op_name(node.target)} is no tensor operator that can be typed")
    return None


def _kept_by_operator(node: fx.Node) -> Verdict | None:
    if base_op(node.target) in ASSERTS:
        return Verdict("assertion", "it only checks a type")
    if is_bitcast(node.target):
        return Verdict("bitcast", "it reads the bits of its input as another type")
    return None


def _kept_by_types(node: fx.Node) -> Verdict | None:
    # A dict keeps the order, as the message names the first low type.
    types = dict.fromkeys(value.dtype for n in (node, *node.all_input_nodes) for _, value in tensor_values(n))
    if any(dtype.is_complex for dtype in types):
        return Verdict("complex", "it has a complex tensor")
    if torch.float64 in types:
        return Verdict("float64", "it has a float64 tensor, which the user asked for")
    if not any(is_measurable(dtype) for dtype in types):
        return Verdict("integer", "it has no floating-point tensor")
    if base_op(node.target) in CONVERTS and _states_type(node):
        return Verdict("stated_type", "the user's own conversion keeps the type that it states")
    low = [dtype for dtype in types if is_measurable(dtype) and dtype != torch.float32]
    if low:
        return Verdict("already_low", f"the program already has it in {str(low[0]).removeprefix('torch.')}")
    return None


def _states_type(node: fx.Node) -> bool:
    return isinstance(argument_of(node, "dtype"), torch.dtype)
