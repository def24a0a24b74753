"""`insert_casts`: rewrite a program so that each node runs in the type that a plan gives it.

The graph is copied node by node. Before each node stand the casts that its inputs need; after it, the types of its
outputs are found by running the operator on fake tensors, never asserted.
"""

from __future__ import annotations

import copy
import logging
from operator import getitem
from typing import Any

import torch
from calibcast.calib.aliasing import shared_arguments, written_arguments
from calibcast.calib.errors import PlanError, require_kind
from calibcast.calib.execution import require_program
from calibcast.calib.gc_pause import paused
from calibcast.calib.graph import REGION_CHILD, base_op, dtype_name, is_measurable, size_hint
from calibcast.passes.dtype_arguments import with_low_dtype
from calibcast.passes.low_types import fake_mode_of, retyped, types_of
from calibcast.passes.node_types import NodeTypes
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.regions import flatten
from calibcast.passes.weights import LowWeights, low_weights, masks_to_saturate, saturation
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx.passes.shape_prop import _extract_tensor_metadata

_log = logging.getLogger("calibcast")
CAST = torch.ops.aten._to_copy.default
CLAMP = torch.ops.aten.clamp.default


def insert_casts(program: ExportedProgram, plan: PrecisionPlan, keep_io_types: bool = True) -> ExportedProgram:
    """A copy of `program` in which each node runs in its planned type.

    The caller's program is untouched; unchanged weights are shared with it, and weights that only low nodes read are
    stored in the low type. Outputs keep their types with `keep_io_types`; without, they come as computed. Inputs
    always keep theirs. Integer and boolean tensors are never cast.

    Raises:
        MismatchError: the plan is of another program.
        PlanError: the program's metadata is missing, so that types cannot be derived.
    """
    require_program(program)
    remedy = "Give what classify returns, or PrecisionPlan.load(path)."
    require_kind(plan, PrecisionPlan, "plan", remedy, PlanError)
    plan.check(program)
    # Without a low node there is nothing to insert, and the graph stays as it was, `no_grad` regions included.
    source = flatten(program.graph_module) if plan.low_precision_nodes else program.graph_module
    with paused():
        types = NodeTypes.of(source, plan)
        masks = masks_to_saturate(program, source, plan.masks)
        weights = low_weights(program, source, types, masks)
        graph = _Emission(program, source, types, weights, keep_io_types, masks).run()
        return _assemble(program, source, graph, weights)


class _Emission:
    """One walk over the source graph. `self._made` maps its nodes to their copies."""

    def __init__(
        self,
        program: ExportedProgram,
        source: fx.GraphModule,
        types: NodeTypes,
        weights: LowWeights,
        keep_io_types: bool,
        masks: set[fx.Node],
    ) -> None:
        self._program, self._source, self._types, self._weights = program, source, types, weights
        self._keep_io_types = keep_io_types
        self._graph = fx.Graph()
        self._made: dict[fx.Node, fx.Node] = {}
        self._names = {node.name for node in source.graph.nodes}
        self._masks = masks
        self._made_masks: set[fx.Node] = set()
        self._casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self._sharing: dict[fx.Node, set[fx.Node]] = {}  # node of the copy -> nodes that share its storage
        self._fake_mode = fake_mode_of(source)

    def run(self) -> fx.Graph:
        for node in self._source.graph.nodes:
            if node.op == "output":
                self._emit_output(node)
            elif node.op == "call_function":
                self._emit_call(node)
            else:
                self._copy(node)
        return self._graph

    def _copy(self, node: fx.Node) -> None:
        made = self._node_copy(node, lambda n: self._made[n])
        if node.name in self._weights.placeholders:
            self._set_type(made, self._types.low_type)

    def _emit_call(self, node: fx.Node) -> None:
        if base_op(node.target) == "_assert_tensor_metadata" and self._changed(node.all_input_nodes[0]):
            return  # it would check the type that the plan has just changed
        wanted = self._types.of_inputs(node)
        made = self._cast_and_copy(node, wanted)
        if wanted == self._types.low_type:
            made.args, made.kwargs = with_low_dtype(node, made.args, made.kwargs, self._types.low_type)
        self._type(node, made)
        self._note_aliases(node, made)

    def _cast_and_copy(self, node: fx.Node, wanted: torch.dtype | str) -> fx.Node:
        def argument(n: fx.Node) -> fx.Node:
            if wanted == NodeTypes.ANY or not _is_float(n):
                return self._made[n]
            exported = n.meta["val"].dtype
            low = isinstance(wanted, torch.dtype) and exported == torch.float32
            return self._cast(self._made[n], wanted if low else exported)  # type: ignore[arg-type]

        return self._node_copy(node, argument)

    def _node_copy(self, node: fx.Node, argument: Any) -> fx.Node:
        made = self._graph.node_copy(node, argument)
        # fx renames copies that look like builtins: a placeholder `input` would become `input_1`.
        made.name, made.target = node.name, node.target
        made.meta = copy.copy(node.meta)
        self._made[node] = made
        if node in self._masks:
            self._made_masks.add(made)
        self._sharing[made] = {made}
        return made

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`node` in `dtype`: itself, a cast that is there already, or a new one."""
        if node.meta["val"].dtype == dtype:
            return node
        found = self._casts.get((node, dtype)) or self._undone(node, dtype)
        if found is None:
            wide = self._saturated(node) if node in self._made_masks and dtype == self._types.low_type else node
            found = self._insert(CAST, (wide,), {"dtype": dtype}, f"{node.name}_as_{dtype_name(dtype)}")
        self._casts[node, dtype] = found
        return found

    def _saturated(self, node: fx.Node) -> fx.Node:
        """A mask whose lowest values the low type holds, with room for the scores that they are added to."""
        return self._insert(CLAMP, (node, saturation(self._types.low_type)), {}, f"{node.name}_saturated")

    def _insert(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> fx.Node:
        node = args[0]
        found = self._graph.call_function(target, args, kwargs)
        found.name = self._new_name(name)
        found.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        with self._fake_mode:
            self._set_value(found, target(node.meta["val"], *args[1:], **kwargs))
        self._sharing[found] = {found}
        return found

    def _undone(self, node: fx.Node, dtype: torch.dtype) -> fx.Node | None:
        """What `node` was widened from, where casting back gives it bit for bit: fp16 -> fp32 -> fp16.

        Never the other way: fp32 -> fp16 -> fp32 is what rounds. Storage that is written to may have changed since.
        """
        if not self._types.never_written or base_op(node.target) not in {"to", "_to_copy"}:
            return None
        before = node.args[0]
        assert isinstance(before, fx.Node)
        narrow, wide = before.meta["val"], node.meta["val"]
        lossless = narrow.dtype == dtype and torch.promote_types(narrow.dtype, wide.dtype) != narrow.dtype
        return before if lossless and place_of(narrow) == place_of(wide) else None

    def _new_name(self, name: str) -> str:
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name

    def _type(self, node: fx.Node, made: fx.Node) -> None:
        """Give `made` the types that come of its inputs. What is not low takes and gives what it did at export."""
        if node.target is getitem:
            producer = made.args[0]
            assert isinstance(producer, fx.Node)
            if self._changed(node.all_input_nodes[0]):
                self._set_value(made, producer.meta["val"][node.args[1]])
        elif node in self._types.low and self._types.outputs[node] != types_of(node.meta["val"]):
            with self._fake_mode:
                self._set_value(made, retyped(node.meta["val"], self._types.outputs[node]))

    def _note_aliases(self, node: fx.Node, made: fx.Node) -> None:
        """Track shared storage, and forget the casts of what `node` has written into: a cast is of one version."""
        group = {made}
        for shared in shared_arguments(made):
            group |= self._sharing[shared]
        for member in group:
            self._sharing[member] = group
        written = [self._made[n] for n in written_arguments(node)]
        if written and node.target not in REGION_CHILD:
            written += written_arguments(made)  # may be a cast of it
        changed = set().union(*(self._sharing[n] for n in written))
        if changed:
            self._casts = {k: cast for k, cast in self._casts.items() if k[0] not in changed and cast not in changed}

    def _emit_output(self, node: fx.Node) -> None:
        specs = self._program.graph_signature.output_specs
        results = []
        for result, spec in zip(node.args[0], specs, strict=True):  # type: ignore[arg-type]
            if not isinstance(result, fx.Node):
                results.append(result)
                continue
            made = self._made[result]
            keeps = self._keep_io_types or spec.kind != OutputKind.USER_OUTPUT
            results.append(self._cast(made, result.meta["val"].dtype) if keeps and _is_float(result) else made)
        made = self._graph.output(tuple(results))
        made.meta = copy.copy(node.meta)

    def _changed(self, node: fx.Node) -> bool:
        """Whether the copy of `node` gives other types than `node`."""
        return types_of(self._made[node].meta.get("val")) != types_of(node.meta.get("val"))

    def _set_type(self, node: fx.Node, dtype: torch.dtype) -> None:
        with self._fake_mode:
            self._set_value(node, node.meta["val"].to(dtype))

    def _set_value(self, node: fx.Node, value: Any) -> None:
        node.meta["val"] = value
        if isinstance(value, torch.Tensor):
            node.meta["tensor_meta"] = _extract_tensor_metadata(value)
        else:
            node.meta.pop("tensor_meta", None)


def _assemble(
    program: ExportedProgram, source: fx.GraphModule, graph: fx.Graph, weights: LowWeights
) -> ExportedProgram:
    made = ExportedProgram(
        root=_children(source, graph),  # not a module of them, as its code would be written and compiled twice
        graph=graph,
        graph_signature=_signature(program.graph_signature, graph),
        state_dict=weights.state_dict,
        range_constraints=copy.copy(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=weights.constants,
        verifiers=program.verifiers,
    )
    made.graph_module.training = source.training
    made.graph_module.meta.update(source.meta)
    return made


def _children(source: fx.GraphModule, graph: fx.Graph) -> dict[str, Any]:
    """What the `get_attr` nodes name, under names without dots: `torch.export.save` looks for no others."""
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


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and is_measurable(value.dtype)


def place_of(value: torch.Tensor) -> tuple[torch.device, list[int]]:
    """Device and strides: a `.to` may change them along with the type. As numbers, since comparing symbols guards."""
    return value.device, [size_hint(stride) for stride in value.stride()]
