"""What the tests of `passes` share: exporting, hand-made plans, pictures of graphs, and the laws of cast insertion.

All fixtures are functions and live as long as the session, so that Hypothesis may use them.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import getitem
from typing import Any

import polars as pl
import pytest
import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from calib import calibrate
from calib.aliasing import shared_arguments, storage_roots, written_arguments
from calib.execution import ProgramRunner
from calib.fingerprint import fingerprint, node_digests, weights_hash
from calib.graph import (
    REGION_CHILD,
    base_op,
    dtype_name,
    is_measurable,
    op_name,
    size_hint,
    state_tensor,
    tensor_values,
)
from passes import PrecisionPlan, classify, insert_casts, what_if
from passes.cast_count import CastCounter
from passes.cast_insertion import CAST
from passes.flips import low_at
from passes.node_types import NodeTypes, dtype_position, needs_dtype, states_type
from passes.plan import HIGH, KEPT, LOW
from passes.regions import flatten, qualified_name
from passes.ties import ties_of

_SHORT = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}


class _Function(nn.Module):
    """A module that calls a function of its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *args: Any) -> Any:
        return self._function(*args)


@pytest.fixture(scope="session")
def export() -> Callable[..., ExportedProgram]:
    """export(module or function, *args, dynamic_shapes=None): its program, in eval mode."""

    def export(model: Any, *args: Any, dynamic_shapes: Any = None) -> ExportedProgram:
        module = model if isinstance(model, nn.Module) else _Function(model)
        return torch.export.export(module.eval(), args, dynamic_shapes=dynamic_shapes)

    return export


@pytest.fixture(scope="session")
def plan_of() -> Callable[..., PrecisionPlan]:
    """plan_of(program, low, low_type): the plan in which just the nodes in `low` are low, whatever any rule says.

    low: node names, or a function of the position among the nodes that can be decided, so that plans can be drawn.
    legal: but for legality, which custom and fft operators do not meet.
    """

    def plan_of(
        program: ExportedProgram,
        low: Collection[str] | Callable[[int], bool],
        low_type: torch.dtype = torch.float16,
        legal: bool = False,
    ) -> PrecisionPlan:
        plan = classify(program, None, low_precision_type=low_type)
        fixed = {KEPT} if not legal else {KEPT, "legality"}
        decided = [d.node for d in plan.decisions if not {d.precision, d.rule} & fixed]
        chosen = {name for i, name in enumerate(decided) if low(i)} if callable(low) else set(low)
        assert chosen <= set(decided), f"{chosen - set(decided)} cannot be planned; there are {decided}"
        by_hand = {n: (LOW, None) if n in chosen else (HIGH, "by_hand") for n in decided}
        decisions = (
            dataclasses.replace(d, precision=by_hand[d.node][0], rule=by_hand[d.node][1], reason="by hand")
            if d.node in by_hand
            else d
            for d in plan.decisions
        )
        return dataclasses.replace(plan, decisions=tuple(decisions))

    return plan_of


@pytest.fixture(scope="session")
def picture() -> Callable[[ExportedProgram], list[str]]:
    """picture(program): a line per computed node, `name: op types`, and the output, `output: names`.

    A cast that insertion added is `name: cast TYPE <- input`; `getitem` is left out.
    """

    def picture(program: ExportedProgram) -> list[str]:
        return [line for node in program.graph.nodes if (line := _line(node))]

    return picture


def _line(node: fx.Node) -> str | None:
    if node.op == "output":
        return f"output: {', '.join(str(result) for result in node.args[0])}"
    if node.op != "call_function" or node.target is getitem:
        return None
    types = " ".join(_SHORT.get(v.dtype, dtype_name(v.dtype)) for _, v in tensor_values(node))
    if node.name.endswith(("_as_float16", "_as_bfloat16", "_as_float32")):
        return f"{node.name}: cast {types} <- {node.args[0]}"
    return f"{node.name}: {base_op(node.target) or op_name(node.target)} {types}".rstrip()


@pytest.fixture(scope="session")
def run() -> Callable[..., list[Any]]:
    """run(program, *inputs): the flat outputs, having held each node's real tensors to its metadata."""
    return run_checked


def run_checked(program: ExportedProgram, *inputs: Any) -> list[Any]:
    wrong: list[str] = []

    def watch(name: str, node: fx.Node, result: Any, _: Any) -> None:
        real = result if isinstance(result, (list, tuple)) else [result]
        for position, value in tensor_values(node):
            tensor = real[position]
            if tensor is not None:
                sizes = [_size(size, came) for size, came in zip(value.shape, tensor.shape, strict=True)]
                if tensor.dtype != value.dtype or list(tensor.shape) != sizes:
                    wrong.append(f"{name}: is {tensor.dtype}{list(tensor.shape)}, says {value.dtype}{sizes}")

    outputs = ProgramRunner(program).run(_fresh(inputs), watch)
    assert not wrong
    return outputs


def _size(said: Any, came: int) -> int:
    """A size by the metadata, at the sizes of the export; what came, where it depends on data."""
    return came if isinstance(said, torch.SymInt) and said.node.hint is None else size_hint(said)


def _fresh(inputs: Sequence[Any]) -> list[Any]:
    return [v.clone() if isinstance(v, torch.Tensor) else v for v in inputs]


@dataclass(frozen=True)
class Case:
    """A program, a plan of it, and what insertion made of both.

    source: the flat graph that insertion has read. smooth: no rounding turns into another integer or branch.
    """

    program: ExportedProgram
    plan: PrecisionPlan
    mixed: ExportedProgram
    source: fx.GraphModule
    inputs: tuple[Any, ...]
    smooth: bool
    before: tuple[str, str, str]

    @cached_property
    def outputs(self) -> list[Any]:
        """What the rewritten program gives, held to its metadata."""
        return run_checked(self.mixed, *self.inputs)

    @cached_property
    def reference(self) -> list[Any]:
        """What the program gives."""
        return ProgramRunner(self.program).run(_fresh(self.inputs))

    def pairs(self) -> list[tuple[fx.Node, fx.Node]]:
        """Each computed node of the source with its counterpart."""
        made = {node.name: node for node in self.mixed.graph.nodes}
        return [(n, made[n.name]) for n in self.source.graph.nodes if n.op == "call_function" and n.name in made]


@pytest.fixture(scope="session")
def case_of() -> Callable[..., Case]:
    """case_of(program, plan, inputs, smooth): the case that the laws speak of."""

    def case_of(program: ExportedProgram, plan: PrecisionPlan, inputs: Sequence[Any], smooth: bool = True) -> Case:
        before = snapshot(program)
        mixed = insert_casts(program, plan)
        source = flatten(program.graph_module) if plan.low_precision_nodes else program.graph_module
        return Case(program, plan, mixed, source, tuple(inputs), smooth, before)

    return case_of


def snapshot(program: ExportedProgram) -> tuple[str, str, str]:
    """All that a caller may see of a program: its graph as digests and as text, and its weights."""
    return fingerprint(node_digests(program)), str(program.graph), weights_hash(program)


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
    assert {n for n in case.source.graph.nodes if qualified_name(n) in planned} - low <= tied
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
    theirs = CastingInterpreter(case.source, case.plan).run(*_values(case.program, case.inputs))
    for mine, other in zip(case.outputs, theirs[-len(case.outputs) :], strict=True):
        assert not isinstance(mine, torch.Tensor) or torch.equal(mine, other)


class CastingInterpreter(fx.Interpreter):
    """A plan carried out without rewriting anything: an independent account of what insertion should give."""

    def __init__(self, graph_module: fx.GraphModule, plan: PrecisionPlan) -> None:
        super().__init__(graph_module)
        self._low, self._low_type = set(plan.low_precision_nodes), plan.low_precision_type

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or n.target is getitem or states_type(n):
            return super().run_node(n)
        if base_op(n.target) == "_assert_tensor_metadata":
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if qualified_name(n) not in self._low:
            args, kwargs = self._as_exported(n)
        else:
            if needs_dtype(n) and dtype_position(n) is not None:
                kwargs = {"dtype": self._low_type, **kwargs}
            args, kwargs = pytree.tree_map(self._lowered, (args, kwargs))
        with torch.no_grad():
            return self.call_function(n.target, args, kwargs)

    def _lowered(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            return value.to(self._low_type)
        return self._low_type if value is torch.float32 else value

    def _as_exported(self, node: fx.Node) -> Any:
        def value(argument: Any) -> Any:
            if not isinstance(argument, fx.Node):
                return argument
            came, said = self.env[argument], argument.meta.get("val")
            is_float = isinstance(came, torch.Tensor) and is_measurable(came.dtype)
            return came.to(said.dtype) if is_float else came

        return pytree.tree_map(value, (tuple(node.args), dict(node.kwargs)))

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        node = next(n for n in self.module.graph.nodes if n.op == "output")
        return self._as_exported(node)[0][0]


def _values(program: ExportedProgram, inputs: Sequence[Any]) -> list[Any]:
    """The values of the placeholders, the program's own state and not a copy of it among them."""
    flat = iter(_fresh(inputs))
    return [
        next(flat) if spec.kind == InputKind.USER_INPUT else _state(program, spec.target)
        for spec in program.graph_signature.input_specs
    ]


def _state(program: ExportedProgram, target: str) -> Any:
    tensor = state_tensor(program, target)
    return program.constants.get(target) if tensor is None else tensor.detach()


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
        fx.Interpreter(case.mixed.graph_module).run(*_values(case.mixed, case.inputs))
    assert snapshot(case.program) == case.before


def all_high_is_the_program(case: Case) -> None:
    """A plan without low nodes leaves names, targets, arguments and results as they were, to the bit."""
    decisions = (dataclasses.replace(d, precision=HIGH) if d.precision == LOW else d for d in case.plan.decisions)
    same = insert_casts(case.program, dataclasses.replace(case.plan, decisions=tuple(decisions)))
    nodes = [[(n.name, n.target, str(n.args), str(n.kwargs)) for n in p.graph.nodes] for p in (same, case.program)]
    assert nodes[0] == nodes[1]
    for mine, theirs in zip(ProgramRunner(same).run(_fresh(case.inputs)), case.reference, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def casts_are_counted_without_a_graph(case: Case) -> None:
    """`CastCounter` says how many casts insertion makes, what they read, and what is in the low type then."""
    own = {node.name for node in case.source.graph.nodes}
    casts = [n for n in case.mixed.graph.nodes if n.target is CAST and n.name not in own]
    low_type = case.plan.low_precision_type
    count = CastCounter(case.program, masks=case.plan.masks).count(case.plan.low_precision_nodes, low_type)
    read = [n.args[0].meta["val"] for n in casts]
    assert count.casts == len(casts)
    assert count.bytes_cast == sum(math.prod(map(size_hint, v.shape)) * v.dtype.itemsize for v in read)
    written = [
        math.prod(map(size_hint, value.shape)) * was.dtype.itemsize
        for source, made in case.pairs()
        if source.target is not getitem and source.target not in REGION_CHILD and not shared_arguments(source)
        for (_, was), (_, value) in zip(tensor_values(source), tensor_values(made), strict=True)
        if value.dtype == low_type and was.dtype == torch.float32
    ]
    assert count.activation_bytes_low == sum(written)


def what_if_is_classify_and_insert(case: Case) -> None:
    """`what_if` gives the numbers of `classify` and `insert_casts` with the same arguments, at every limit."""
    ranges = calibrate(case.program, [tuple(_fresh(case.inputs))], progress=False)
    seen = ranges.frame.filter(pl.col("kind").is_in(["input", "activation"]))["absmax"].drop_nulls()
    limits = sorted({max(float(seen.quantile(q, "lower")), 1e-6) for q in (0.3, 0.7)} | {math.inf})
    low_type = case.plan.low_precision_type
    settings = {"nodes_to_include": ["^relu"] if any(d.node.startswith("relu") for d in case.plan.decisions) else []}
    frame = what_if(case.program, ranges, limits, low_type, [0.9, 1.0], **settings)
    base = set(classify(case.program, ranges, **settings).low_precision_nodes)
    own = {node.name for node in case.source.graph.nodes}
    for row in frame.iter_rows(named=True):
        limit, quantile = row["data_max"], row["range_quantile"]
        plan = classify(case.program, ranges, low_type, limit, range_quantile=quantile, **settings)
        low = plan.low_precision_nodes
        assert (row["nodes_low"], row["nodes_high"]) == (len(low), len(plan.high_precision_nodes))
        assert set(row["to_low"]) == set(low) - base
        assert set(row["to_high"]) == base - set(low)
        assert row["work_low"] == sum(plan[node].work for node in low)
        mixed = insert_casts(case.program, plan)
        added = [n for n in mixed.graph.nodes if n.target is CAST and n.name not in own]
        assert row["casts"] == len(added)
        if quantile == 1.0:
            assert low_at(plan.flips[dtype_name(low_type)], limit) == list(low)


LAWS = (
    types_follow_the_plan,
    regions_keep_their_types,
    casts_are_shared,
    integers_are_never_cast,
    written_storage_has_one_type,
    surface_stays,
    metadata_is_real,
    numbers_stay_close,
    casting_interpreter_agrees,
    rewriting_again_adds_nothing,
    saving_changes_nothing,
    caller_is_left_alone,
    all_high_is_the_program,
    casts_are_counted_without_a_graph,
    what_if_is_classify_and_insert,
)


@pytest.fixture(scope="session", params=LAWS, ids=lambda law: law.__name__)
def law(request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """One law of cast insertion: called with a case, it asserts."""
    return request.param


@pytest.fixture(scope="session")
def laws() -> tuple[Callable[[Case], None], ...]:
    """All laws of cast insertion."""
    return LAWS
