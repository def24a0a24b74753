"""`insert_casts`: rewrite a program so that each node runs in the type that a plan gives it.

`cast_sites` says where casts stand. The graph is copied node by node, with the casts before the nodes that need them;
the types of outputs are found by running the operator on fake tensors, never assumed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from operator import getitem
from typing import Any

import torch
from calibcast.calib.errors import PlanError, require_kind
from calibcast.calib.execution import require_program
from calibcast.calib.gc_pause import paused
from calibcast.calib.graph import base_op, dtype_name, size_hint
from calibcast.calib.host_kernels import CastProgram
from calibcast.calib.marks import mark_inserted
from calibcast.calib.operators import ASSERTS, MASK_CHOICE
from calibcast.calib.process_settings import FAKE_TENSORS
from calibcast.calib.rounding import rounded_number
from calibcast.calib.rounding_edges import literals_of, with_numbers
from calibcast.passes.cast_sites import CallTable, Cast, CastSites, Value, cast_sites
from calibcast.passes.dtype_arguments import with_low_dtype
from calibcast.passes.low_types import fake_mode_of, retyped, types_of
from calibcast.passes.node_types import NodeTypes
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.program_copies import with_graph
from calibcast.passes.regions import flatten
from calibcast.passes.weights import low_weights, masks_to_saturate, saturation
from torch import fx
from torch.export import ExportedProgram
from torch.fx.passes.shape_prop import _extract_tensor_metadata

CAST = torch.ops.aten._to_copy.default
CLAMP = torch.ops.aten.clamp.default


def insert_casts(program: ExportedProgram, plan: PrecisionPlan, keep_io_types: bool = True) -> ExportedProgram:
    """A copy of `program` in which each node runs in its planned type.

    The caller's program is untouched; unchanged weights are shared with it, and weights that only low nodes read are
    stored in the low type. Outputs keep their types with `keep_io_types`; without it, they have the types they are
    computed in. Inputs always keep theirs. Integer and boolean tensors are never cast.

    Raises:
        MismatchError: the plan is of another program.
        PlanError: the program's metadata is missing, so that types cannot be derived.
    """
    require_program(program)
    remedy = "Give what classify returns, or PrecisionPlan.load(path)."
    require_kind(plan, PrecisionPlan, "plan", remedy, PlanError)
    plan.check(program)
    # Without a low node, no cast is needed, and the graph stays as it was, `no_grad` regions included.
    source = flatten(program.graph_module) if plan.low_precision_nodes else program.graph_module
    with paused(), FAKE_TENSORS:
        types = NodeTypes.of(source, plan)
        masks = masks_to_saturate(program, source, plan.masks)
        weights = low_weights(program, source, types, masks)
        low = {node: types.outputs[node] for node in types.low}
        sites = cast_sites(CallTable(program, source, keep_io_types), low, weights.placeholders, types.low_type)
        graph = _Emission(source, types, sites, masks).run()
        return with_graph(CastProgram, program, source, graph, weights.state_dict, weights.constants)


class _Emission:
    """Writes the graph that the cast sites describe. `self._nodes` maps each of their values to its node."""

    def __init__(self, source: fx.GraphModule, types: NodeTypes, sites: CastSites, masks: set[fx.Node]) -> None:
        self._source, self._types, self._sites, self._masks = source, types, sites, masks
        self._calls = {site.call.node: site for site in sites.calls}
        self._graph = fx.Graph()
        self._nodes: dict[Value, fx.Node] = {}
        self._names = {node.name for node in source.graph.nodes}
        self._fake_mode = fake_mode_of(source)

    def run(self) -> fx.Graph:
        for node in self._source.graph.nodes:
            if node.op == "output":
                self._emit_output(node)
            elif node.op == "call_function":
                self._emit_call(node)
            else:
                self._emit_source(node)
        return self._graph

    def _emit_source(self, node: fx.Node) -> None:
        made, types = self._node_copy(node, {}), self._sites.values[node].types
        if types != types_of(node.meta.get("val")):  # a weight that is stored in the low type
            with self._fake_mode:
                _set_value(made, node.meta["val"].to(types[0]))

    def _emit_call(self, node: fx.Node) -> None:
        if base_op(node.target) in ASSERTS and self._changed(node.all_input_nodes[0]):
            return  # it checks the type that the plan has just changed
        site = self._calls[node]
        self._emit_casts(site.casts)
        made = self._node_copy(node, site.given)
        if node in self._types.low:
            made.args, made.kwargs = with_low_dtype(node, made.args, made.kwargs, self._types.low_type)
            made.args, made.kwargs = with_numbers(node.target, made.args, made.kwargs, self._low_numbers(node))
        self._type(node, made)

    def _low_numbers(self, node: fx.Node) -> dict[str, float]:
        """What replaces the numbers that a low node selects as elements and that its type does not hold.

        A half-precision kernel of PyTorch accepts `where(keep, scores, -3.4e38)`. An engine builder first makes a
        tensor of the number, which is an error. So the graph states the number that is stored, saturated where
        calibration saw a mask.
        """
        if base_op(node.target) not in MASK_CHOICE:
            return {}
        low_type, saturate = self._types.low_type, node in self._masks
        beyond = {k: v for k, v in literals_of(node).items() if torch.finfo(low_type).max < abs(v) < math.inf}
        return {name: rounded_number(number, low_type, saturate) for name, number in beyond.items()}

    def _node_copy(self, node: fx.Node, given: Mapping[fx.Node, Value]) -> fx.Node:
        made = self._graph.node_copy(node, lambda n: self._nodes[given.get(n, self._sites.values[n])])
        # fx renames copies that look like builtins: a placeholder `input` would become `input_1`.
        made.name, made.target = node.name, node.target
        made.meta = copy.copy(node.meta)
        self._nodes[self._sites.values[node]] = made
        return made

    def _emit_casts(self, casts: Iterable[Cast]) -> None:
        for cast in casts:
            node, dtype = self._nodes[cast.of], cast.made.types[0]
            assert dtype is not None
            is_mask = cast.operand.node in self._masks and dtype == self._types.low_type
            wide = self._saturated(node) if is_mask else node
            self._nodes[cast.made] = self._insert(
                CAST, (wide,), {"dtype": dtype}, f"{node.name}_as_{dtype_name(dtype)}"
            )

    def _saturated(self, node: fx.Node) -> fx.Node:
        """The mask with its lowest values raised, so that the low type holds them and their sums with scores."""
        return self._insert(CLAMP, (node, saturation(self._types.low_type)), {}, f"{node.name}_saturated")

    def _insert(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> fx.Node:
        node = args[0]
        found = self._graph.call_function(target, args, kwargs)
        found.name = self._new_name(name)
        found.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        mark_inserted(found)
        with self._fake_mode:
            _set_value(found, target(node.meta["val"], *args[1:], **kwargs))
        return found

    def _new_name(self, name: str) -> str:
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name

    def _type(self, node: fx.Node, made: fx.Node) -> None:
        """Infer the types of `made` from its inputs. A node that is not low reads and writes the types that it had at
        export.
        """
        if node.target is getitem:
            producer = made.args[0]
            assert isinstance(producer, fx.Node)
            if self._changed(node.all_input_nodes[0]):
                _set_value(made, producer.meta["val"][node.args[1]])
        elif node in self._types.low and self._changed(node):
            with self._fake_mode:
                _set_value(made, retyped(node.meta["val"], self._sites.values[node].types))

    def _emit_output(self, node: fx.Node) -> None:
        self._emit_casts(self._sites.outputs)
        results = [
            self._nodes[self._sites.results.get(result, self._sites.values[result])]
            if isinstance(result, fx.Node)
            else result
            for result in node.args[0]  # type: ignore[union-attr]
        ]
        made = self._graph.output(tuple(results))
        made.meta = copy.copy(node.meta)

    def _changed(self, node: fx.Node) -> bool:
        """Whether the copy of `node` gives other types than `node`."""
        return self._sites.values[node].types != types_of(node.meta.get("val"))


def _set_value(node: fx.Node, value: Any) -> None:
    node.meta["val"] = value
    if isinstance(value, torch.Tensor):
        node.meta["tensor_meta"] = _extract_tensor_metadata(value)
    else:
        node.meta.pop("tensor_meta", None)


def place_of(value: torch.Tensor) -> tuple[torch.device, list[int]]:
    """Device and strides: a `.to` may change them along with the type. As numbers: comparing symbols adds guards."""
    return value.device, [size_hint(stride) for stride in value.stride()]
