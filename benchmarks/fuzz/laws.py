"""The laws of cast insertion. Each is a function that takes a case and asserts."""

from __future__ import annotations

import dataclasses
import io

import torch
from calibcast.calib.aliasing import storage_roots, written_arguments
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.graph import REGION_CHILD, is_measurable, tensor_values
from calibcast.passes import PrecisionPlan, insert_casts
from calibcast.passes.dtype_arguments import dtype_position
from calibcast.passes.node_types import NodeTypes, refused_number
from calibcast.passes.regions import qualified_name
from calibcast.passes.ties import ties_of
from calibcast.passes.verdict import HIGH, LOW
from torch import fx
from torch.export.graph_signature import OutputKind

from benchmarks.fuzz.case import Case, fresh, run_checked, snapshot
from benchmarks.fuzz.count_laws import casts_are_counted_without_a_graph, what_if_is_classify_and_insert
from benchmarks.fuzz.oracle import CastingInterpreter, placeholder_values
from benchmarks.fuzz.rescaling_law import rescaling_keeps_every_bit


def float_types(node: fx.Node) -> list[torch.dtype]:
    return [value.dtype for _, value in tensor_values(node) if is_measurable(value.dtype)]


def arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, as often as they stand there."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)
    return found


def types_follow_the_plan(case: Case) -> None:
    """Low nodes take and give the low type where the program has fp32, high ones their exported types."""
    low_type, low = case.plan.low_precision_type, NodeTypes.of(case.source, case.plan).low
    tied = {node for tie in ties_of(case.source) for node in tie.nodes}
    planned = set(case.plan.low_precision_nodes)
    refused = {
        node
        for node in case.source.graph.nodes
        if refused_number(node, low_type) is not None
        or not (any(map(float_types, arguments(node))) or dtype_position(node))
    }
    assert {n for n in case.source.graph.nodes if qualified_name(n) in planned} - low <= tied | refused
    decided = planned | set(case.plan.high_precision_nodes)
    for source, made in case.pairs():
        if qualified_name(source) in decided:
            as_planned = {torch.float32: low_type} if source in low else {}
            for theirs, mine in zip(arguments(source), arguments(made), strict=True):
                wanted = [as_planned.get(dtype, dtype) for dtype in float_types(theirs)]
                assert float_types(mine) == wanted, f"{made.name} takes {mine.name} in {float_types(mine)}"
            # What has no float input, such as a division of integers, gives its exported type unless it has dtype=.
            follows = any(map(float_types, arguments(source))) or dtype_position(source) is not None
            gives = [as_planned.get(dtype, dtype) if follows else dtype for dtype in float_types(source)]
            assert float_types(made) == gives, f"{made.name} gives {float_types(made)}, not {gives}"


def regions_keep_their_types(case: Case) -> None:
    """What enters and leaves an autocast region has its exported type; the body stays as the user wrote it."""
    for source, made in case.pairs():
        if isinstance(source.target, torch._ops.HigherOrderOperator):
            assert list(map(float_types, arguments(made))) == list(map(float_types, arguments(source)))
            assert float_types(made) == float_types(source)
            assert _bodies(case.mixed.graph_module, made) == _bodies(case.source, source)


def _bodies(graph_module: fx.GraphModule, node: fx.Node) -> list[str]:
    return [str(graph_module.get_submodule(n.target).graph) for n in arguments(node) if n.op == "get_attr"]


def casts_are_shared(case: Case) -> None:
    """Each cast is of a float tensor to another float type; a version of a tensor is cast to a type only once."""
    classes, own = _storage_classes(case.mixed.graph_module), {node.name for node in case.source.graph.nodes}
    fresh: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node in case.mixed.graph.nodes:
        if node.name not in own:
            (before,), (after,) = float_types(node.args[0]), float_types(node)
            if node.target is torch.ops.aten.clamp.default:  # a mask, saturated on its way into a cast
                assert [user.target for user in node.users] == [torch.ops.aten._to_copy.default]
                continue
            assert node.target is torch.ops.aten._to_copy.default
            assert before != after
            assert (node.args[0], after) not in fresh, f"{node.name} repeats {fresh[node.args[0], after].name}"
            fresh[node.args[0], after] = node
        written = set().union(*(classes[n] for n in written_arguments(node)))
        fresh = {key: cast for key, cast in fresh.items() if not {key[0], cast} & written}


def _storage_classes(graph_module: fx.GraphModule) -> dict[fx.Node, set[fx.Node]]:
    """For each node, all that may share its storage, directly or through others."""
    classes: dict[fx.Node, set[fx.Node]] = {}
    for node, roots in storage_roots(graph_module).items():
        merged = {node}.union(*(classes.get(root, {root}) for root in roots))
        classes.update(dict.fromkeys(merged, merged))
    return classes


def integers_are_never_cast(case: Case) -> None:
    """Integer and boolean tensors have the types that they had."""
    for source, made in case.pairs():
        theirs = [(i, v.dtype) for i, v in tensor_values(source) if not is_measurable(v.dtype)]
        assert [(i, v.dtype) for i, v in tensor_values(made) if not is_measurable(v.dtype)] == theirs


def written_storage_has_one_type(case: Case) -> None:
    """All aliases of storage that is visibly written have one type, and no cast stands before such a write."""
    made = dict(case.pairs())
    for tie in ties_of(case.source):
        exported = [n for n in tie.nodes if n in made and float_types(n) == [torch.float32]]
        assert len({tuple(float_types(made[n])) for n in exported}) <= 1
        for node in tie.nodes & made.keys():
            targets = written_arguments(node)
            if set(targets) <= tie.nodes:
                assert [n.name for n in written_arguments(made[node])] == [n.name for n in targets]


def surface_stays(case: Case) -> None:
    """Inputs and outputs keep names, structure and types, and the signature and the symbols are the program's."""
    program, mixed = case.program, case.mixed
    assert mixed.call_spec == program.call_spec
    assert mixed.range_constraints == program.range_constraints
    ours, theirs = mixed.graph_signature, program.graph_signature
    entries = [[(s.kind, s.arg.name, s.target) for s in g.input_specs] for g in (ours, theirs)]
    assert entries[0] == entries[1]
    assert [(s.kind, s.target) for s in ours.output_specs] == [(s.kind, s.target) for s in theirs.output_specs]
    types = [
        {n.name: float_types(n) for n in p.graph.nodes if n.name in p.graph_signature.user_inputs}
        for p in (program, mixed)
    ]
    assert types[0] == types[1]


def outputs_may_come_as_computed(case: Case) -> None:
    """Without `keep_io_types`, no cast stands before a user's output; buffers keep their types all the same."""
    free = insert_casts(case.program, case.plan, keep_io_types=False)
    outputs, theirs = (next(iter(reversed(graph.nodes))).args[0] for graph in (free.graph, case.source.graph))
    kept = {node.name: float_types(node) for node in case.mixed.graph.nodes}
    for spec, mine, other in zip(case.program.graph_signature.output_specs, outputs, theirs, strict=True):
        if not isinstance(mine, fx.Node):
            assert mine == other
        elif spec.kind == OutputKind.USER_OUTPUT:
            assert (mine.name, float_types(mine)) == (other.name, kept[other.name])
        else:
            assert float_types(mine) == float_types(other)


def metadata_is_real(case: Case) -> None:
    """Run in PyTorch, each node's tensors have the types and sizes that its metadata says; so have the outputs."""
    for mine, theirs in zip(case.outputs, case.reference, strict=True):
        assert type(mine) is type(theirs)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == theirs.dtype
            assert mine.shape == theirs.shape or not case.smooth


def numbers_stay_close(case: Case) -> None:
    """Where no rounding can turn into another branch, outputs are finite and within 5% of the program's."""
    if not case.smooth:
        return
    for mine, theirs in zip(case.outputs, case.reference, strict=True):
        if isinstance(mine, torch.Tensor) and is_measurable(mine.dtype):
            assert mine.isfinite().all()
            error = (mine.double() - theirs.double()).norm()
            assert error <= 0.05 * theirs.double().norm() + 1e-3 * theirs.numel() ** 0.5
        elif isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs)
        else:
            assert mine == theirs


def casting_interpreter_agrees(case: Case) -> None:
    """Without writes in place, an interpreter that casts around each node of the program gives the same bits."""
    if any(written_arguments(node) for node in case.source.graph.nodes):
        return
    theirs = CastingInterpreter(case.source, case.plan).run(*placeholder_values(case.program, case.inputs))
    for mine, other in zip(case.outputs, theirs[-len(case.outputs) :], strict=True):
        assert not isinstance(mine, torch.Tensor) or torch.equal(mine, other)


def rewriting_again_adds_nothing(case: Case) -> None:
    """The types that a rewritten program has, inserted into it, leave it as it is."""
    again = insert_casts(case.mixed, PrecisionPlan.from_types(case.mixed))
    assert str(again.graph) == str(case.mixed.graph)
    assert {k: v.dtype for k, v in again.state_dict.items()} == {k: v.dtype for k, v in case.mixed.state_dict.items()}


def saving_changes_nothing(case: Case) -> None:
    """The rewritten program saves and loads, and gives the same bits."""
    if any(node.target in REGION_CHILD and not node.users for node in case.mixed.graph.nodes):
        return  # torch itself cannot load a program with a region that nobody reads
    stream = io.BytesIO()
    torch.export.save(case.mixed, stream)
    stream.seek(0)
    loaded = run_checked(torch.export.load(stream), *case.inputs)
    for mine, theirs in zip(loaded, case.outputs, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def caller_is_left_alone(case: Case) -> None:
    """Neither inserting casts nor running the result changes anything of the caller's program."""
    with torch.no_grad():
        fx.Interpreter(case.mixed.graph_module).run(*placeholder_values(case.mixed, case.inputs))
    assert snapshot(case.program) == case.before


def all_high_is_the_program(case: Case) -> None:
    """A plan without low nodes leaves names, targets, arguments and results as they were, to the bit."""
    decisions = (dataclasses.replace(d, precision=HIGH) if d.precision == LOW else d for d in case.plan.decisions)
    same = insert_casts(case.program, dataclasses.replace(case.plan, decisions=tuple(decisions)))
    nodes = [[(n.name, n.target, str(n.args), str(n.kwargs)) for n in p.graph.nodes] for p in (same, case.program)]
    assert nodes[0] == nodes[1]
    for mine, theirs in zip(ProgramRunner(same).run(fresh(case.inputs)), case.reference, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


LAWS = (
    types_follow_the_plan,
    regions_keep_their_types,
    casts_are_shared,
    integers_are_never_cast,
    written_storage_has_one_type,
    surface_stays,
    outputs_may_come_as_computed,
    metadata_is_real,
    numbers_stay_close,
    casting_interpreter_agrees,
    rewriting_again_adds_nothing,
    saving_changes_nothing,
    caller_is_left_alone,
    all_high_is_the_program,
    casts_are_counted_without_a_graph,
    what_if_is_classify_and_insert,
    rescaling_keeps_every_bit,
)
