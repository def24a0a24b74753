"""One batch through a program, kept as a tape: each call with the values that it read and gave, and its gradient.

Nothing is written in place: a call that writes gets a copy, and everything that shares the storage is rebuilt from it.
So any call can be run again with other values, which is how rounding at one place is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import getitem
from typing import Any

import torch
from calibcast.calib.aliasing import Roots, shared_arguments, storage_roots, written_arguments
from calibcast.calib.execution import NodeError
from calibcast.calib.flat_regions import blocks, open_regions
from calibcast.calib.flattening import qualified_name
from calibcast.calib.graph import AUTOCAST_REGION, base_op
from calibcast.calib.operators import operator_of
from calibcast.calib.random_draws import may_draw, random_state, set_random_state
from calibcast.calib.rounding_edges import Source, is_mover
from torch import fx
from torch.utils import _pytree as pytree

SAME = torch.ops.aten.alias.default


class Value:
    """One version of a tensor.

    sources: the node outputs that made its fp32 elements. maker: the call that gave it; None for an input. position:
    which result of that call it is. computed: whether it depends on what a floating-point call gave. readers: the calls
    that take it.
    """

    __slots__ = ("computed", "maker", "position", "readers", "sources", "tensor")

    def __init__(self, tensor: torch.Tensor, sources: frozenset[Source], maker: Call | None = None) -> None:
        self.tensor, self.sources, self.maker, self.position = tensor, sources, maker, 0
        self.computed = maker is not None
        self.readers: list[Call] = []

    @property
    def differentiable(self) -> bool:
        return self.tensor.is_floating_point() or self.tensor.is_complex()


@dataclass(eq=False)
class Call:
    """One call of the tape.

    node: None for a region, and for a call that only rebuilds a view after a write. run: the operator. args: a `Value`
    stands for each tensor. written: the values that it writes into; their new versions come last in `outputs`. outputs:
    None for a result that is not a tensor. leaves, raw: until the sweep passes the call, the inputs and outputs of its
    own autograd graph; no leaves where the operator refused to make one.
    """

    name: str
    node: fx.Node | None
    run: Callable[..., Any]
    args: Any
    mover: bool
    written: tuple[Value, ...] = ()
    outputs: tuple[Value | None, ...] = ()
    leaves: dict[Value, torch.Tensor] = field(default_factory=dict)
    raw: tuple[Any, ...] = ()
    random_state: Any = None

    @cached_property
    def inputs(self) -> tuple[Value, ...]:
        leaves = pytree.tree_leaves(self.args)
        return tuple(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Value)))

    def perform(self, given: Mapping[Value, torch.Tensor], args: Any = None) -> tuple[Any, ...]:
        """Run the call with other tensors for some of its inputs: its results, then the tensors that it wrote into.

        args: other arguments, such as another number. Random numbers are those of the first run.
        """
        copies = {value: given.get(value, value.tensor).clone() for value in self.written}
        filled = {**given, **copies} if copies else given
        args, kwargs = _filled(self.args if args is None else args, filled)
        if self.random_state is not None:
            set_random_state(self.random_state)
        result = self.run(*args, **kwargs)
        return (*_flat(result), *copies.values())

    @property
    def differentiable(self) -> tuple[Value, ...]:
        """The inputs whose gradient is asked for: those that depend on a call."""
        return tuple(v for v in self.inputs if v.computed and v.differentiable)

    def with_gradients(self, inputs: Sequence[Value]) -> tuple[Any, ...] | None:
        """What the call gives, with an autograd graph that begins at `inputs`; None where the operator refuses one."""
        self.leaves = {v: v.tensor.detach().requires_grad_() for v in inputs}
        try:
            with torch.enable_grad():
                return self.perform(self.leaves)
        except RuntimeError:  # such as batch_norm, which has no gradient of running statistics
            self.leaves = {}
            return None


@dataclass(frozen=True)
class Tape:
    """calls: in the order in which they ran. made: the value of each source. outputs: of the program, flat."""

    calls: list[Call]
    made: dict[Source, Value]
    outputs: list[Value | None]

    @property
    def elements(self) -> int:
        """How many elements a run computes."""
        return sum(v.tensor.numel() for call in self.calls for v in call.outputs if v is not None)

    def forget(self) -> None:
        """Let go of all tensors: the tape is of no use then. Calls and values refer to each other, so without this a
        batch's activations would stay in memory until Python next collects cycles.
        """
        for call in self.calls:
            call.leaves, call.raw = {}, ()
            for value in (*call.inputs, *call.outputs):
                if value is not None and hasattr(value, "tensor"):
                    del value.tensor


def record(graph_module: fx.GraphModule, operands: Sequence[Any], device: torch.device | None = None) -> Tape:
    """Run a flat graph on the values of its placeholders, with gradients.

    device: where device arguments are moved to; None leaves them. Raises NodeError where a node raises.
    """
    recorder = _Recorder(graph_module, device)
    try:
        return recorder.run(operands)
    except BaseException:
        recorder.tape.forget()
        raise


class _Recorder:
    """One run of a graph. `env` maps its nodes to values, to tuples of them, or to what is not a tensor."""

    def __init__(self, graph_module: fx.GraphModule, device: torch.device | None) -> None:
        self._module, self._device = graph_module, device
        self._roots: Roots = storage_roots(graph_module)
        self._order = {node: position for position, node in enumerate(graph_module.graph.nodes)}
        self._env: dict[fx.Node, Any] = {}
        self.tape = Tape([], {}, [])

    def run(self, operands: Sequence[Any]) -> Tape:
        waiting = iter(operands)
        for block in blocks(self._module.graph.nodes):
            if block.region:
                self._region(block.nodes)
                continue
            [node] = block.nodes
            if node.op == "placeholder":
                self._env[node] = self._input(node, next(waiting))
            elif node.op == "get_attr":
                self._env[node] = self._input(node, _attribute(self._module, str(node.target)))
            elif node.op == "output":
                results = pytree.tree_leaves(fx.map_arg(node.args[0], self._env.__getitem__))
                self.tape.outputs.extend(r if isinstance(r, Value) else None for r in results)
            else:
                self._call(node)
        return self.tape

    def _input(self, node: fx.Node, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        source = (qualified_name(node), 0)
        made = Value(value.detach(), frozenset({source} if value.dtype == torch.float32 else ()))
        self.tape.made[source] = made
        return made

    def _call(self, node: fx.Node) -> None:
        args, kwargs = self._arguments(node, self._env)
        if node.target is getitem and isinstance(args[0], (tuple, list)):
            self._env[node] = args[0][args[1]]
            return
        targets = list(dict.fromkeys(written_arguments(node)))
        written = tuple(dict.fromkeys(self._env[n] for n in targets))
        call = Call(qualified_name(node), node, _target_of(node), (args, kwargs), is_mover(node), written)
        try:
            if call.inputs or _gives_tensor(node):
                self._env[node] = self._perform(call)
            else:  # sizes and the like
                self._env[node] = call.run(*args, **kwargs)
        except Exception as error:
            raise NodeError(call.name, node, error) from error
        news = dict(zip(written, call.outputs[len(call.outputs) - len(written) :], strict=True))
        for target, new in [(n, news[self._env[n]]) for n in targets]:
            self._rebind(target, new, node)

    def _arguments(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> tuple[Any, Any]:
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        if self._device is None:
            return args, kwargs
        if node.target is AUTOCAST_REGION:  # a region moves with its program
            args = (self._device.type, *args[1:])
        moved: tuple[Any, Any] = pytree.tree_map_only(torch.device, lambda _: self._device, (args, kwargs))
        return moved

    def _region(self, nodes: Sequence[fx.Node]) -> None:
        """A flat region as one call: its nodes run together, and its results are those that other nodes read."""
        inside = set(nodes)
        outer = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))
        given = [n for n in nodes if any(user not in inside for user in n.users)]

        def run(*operands: Any) -> Any:
            env = dict(zip(outer, operands, strict=True))
            with open_regions() as opened:
                for node in nodes:
                    args, kwargs = self._arguments(node, env)
                    env[node] = _target_of(node)(*args, **kwargs)
                    opened.note(node, env[node])
            return [env[node] for node in given]

        written = tuple(self._env[a] for n in nodes for a in written_arguments(n) if a not in inside)
        call = Call(qualified_name(nodes[0]), None, run, ([self._env[n] for n in outer], {}), False, written)
        try:
            self._perform(call)
        except Exception as error:
            raise NodeError(qualified_name(nodes[0]), nodes[0], error) from error
        for node, value in zip(given, call.outputs, strict=False):
            self._env[node] = value

    def _perform(self, call: Call) -> Any:
        """Run a call for the first time, with its own autograd graph, and note what it gave."""
        if _is_random(call):
            call.random_state = random_state()
        given = call.with_gradients(call.differentiable)
        call.raw = call.perform({}) if given is None else given
        plain = [r.detach() if isinstance(r, torch.Tensor) else r for r in call.raw]
        call.outputs = tuple(
            self._output(call, i, r) if isinstance(r, torch.Tensor) else None for i, r in enumerate(plain)
        )
        for value in call.inputs:
            value.readers.append(call)
        self.tape.calls.append(call)
        results = [v if v is not None else r for v, r in zip(call.outputs, plain, strict=True)]
        count = len(results) - len(call.written)
        if call.node is not None and not isinstance(call.node.meta.get("val"), (list, tuple)):
            return results[0] if count else None
        return tuple(results[:count])

    def _output(self, call: Call, position: int, tensor: torch.Tensor) -> Value:
        own = (call.name, position if position < len(call.raw) - len(call.written) else 0)
        sources: frozenset[Source] = frozenset()
        if tensor.dtype == torch.float32:
            sources = frozenset().union(*(v.sources for v in call.inputs)) if call.mover else frozenset({own})
        value = Value(tensor, sources, call)
        value.position = position
        value.computed = not call.mover or any(v.computed for v in call.inputs)
        if not call.mover:
            self.tape.made[own] = value
        return value

    def _rebind(self, target: fx.Node, new: Value | None, writer: fx.Node) -> None:
        """After `writer` wrote into `target`: update all nodes that share its storage and are read later."""
        old = self._env[target]
        assert isinstance(new, Value)
        aliases = [
            n for n in self._env if n is not target and self._shares(n, target, old) and self._read_after(n, writer)
        ]
        returned = target in shared_arguments(writer) and isinstance(self._env[writer], Value)
        if not aliases:
            self._env |= {target: new} | ({writer: new} if returned else {})
            return
        whole = self._env[next(iter(self._roots[target]))] if self._roots[target] else old
        spread = self._view_call(torch.as_strided_scatter, whole, new, old)
        for node in [*aliases, target]:
            self._env[node] = self._view_call(torch.as_strided, spread, None, self._env[node])
        if returned:
            self._env[writer] = self._env[target]

    def _view_call(self, operator: Callable[..., Any], whole: Value, part: Value | None, like: Value) -> Value:
        geometry = (tuple(like.tensor.shape), like.tensor.stride(), like.tensor.storage_offset())
        args = (whole, *geometry) if part is None else (whole, part, *geometry)
        call = Call("", None, operator, (args, {}), True)
        self._perform(call)
        [made] = call.outputs
        assert made is not None
        return made

    def _shares(self, node: fx.Node, target: fx.Node, old: Value) -> bool:
        value = self._env[node]
        if not isinstance(value, Value) or not self._roots[node] & self._roots[target]:
            return False
        return value.tensor.untyped_storage().data_ptr() == old.tensor.untyped_storage().data_ptr()

    def _read_after(self, node: fx.Node, writer: fx.Node) -> bool:
        return any(self._order[user] > self._order[writer] for user in node.users)


def _filled(part: Any, given: Mapping[Value, torch.Tensor]) -> Any:
    """Arguments with a tensor in place of each `Value`. `tree_map` would take longer than most kernels."""
    if isinstance(part, Value):
        return given.get(part, part.tensor)
    if isinstance(part, dict):
        return {key: _filled(value, given) for key, value in part.items()}
    if isinstance(part, (tuple, list)):
        return type(part)([_filled(value, given) for value in part])
    return part


def _target_of(node: fx.Node) -> Callable[..., Any]:
    """What to call: an alias in place of `detach`, which does nothing in inference and would cut the gradient."""
    if operator_of(base_op(node.target)).writes_nothing:
        return SAME
    assert callable(node.target)
    return node.target


def _gives_tensor(node: fx.Node) -> bool:
    return any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(node.meta.get("val")))


def _attribute(module: torch.nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _flat(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, (list, tuple)) else () if result is None else (result,)


def _is_random(call: Call) -> bool:
    """A flat region, which is a call with a name and no node, may draw as well."""
    return bool(call.name) if call.node is None else may_draw(call.node)
