"""Run an exported program node by node, with a hook after each node. The program's own state is not changed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from operator import getitem
from typing import Any, NamedTuple

import torch
from calibcast.calib.aliasing import mutated_inputs, written_arguments
from calibcast.calib.errors import BatchError, ProgramError, first_line, require_kind
from calibcast.calib.flat_regions import blocks, open_regions, unwrapped
from calibcast.calib.graph import (
    AUTOCAST_REGION,
    REGION_CHILD,
    child_of,
    program_device,
    same_device,
    state_tensor,
    where,
)
from calibcast.calib.host_kernels import call_anywhere
from calibcast.calib.plain_tensors import is_fake
from calibcast.calib.state_copies import copies_of_written
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

# watch(name, node, result, arguments): called after a node has run and before anything can change its result.
# `name` is qualified inside regions; `arguments` holds the tensors that it read, by node.
Watch = Callable[[str, fx.Node, Any, dict[fx.Node, Any]], None]
# around(name, node, values, call): runs a node in its own way, given the values of the nodes that it reads, and
# `call(args, kwargs)`, which runs the operator. Not called inside autocast regions.
Around = Callable[[str, fx.Node, dict[fx.Node, Any], Callable[[Any, Any], Any]], Any]


class NodeError(Exception):
    """A node raised while a program ran. `name` and `node` say which; the cause is chained."""

    def __init__(self, name: str, node: fx.Node, error: Exception) -> None:
        super().__init__(f"{where(node, name)} raised {type(error).__name__}: {first_line(error)}")
        self.name, self.node = name, node


class Ran(NamedTuple):
    """A node that has just run: its name (qualified inside regions), its result, and the values it read, by node."""

    name: str
    node: fx.Node
    result: Any
    arguments: dict[fx.Node, Any]


class _SteppedInterpreter(fx.Interpreter):
    """`fx.Interpreter` that enters regions, stops after each node, and can move device arguments.

    Each value is freed after its last reader has run. What a region sets for the thread (autocast) is set for one node
    at a time, so that two programs can be run in turns.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        device: torch.device | None,
        around: Around | None = None,
        prefix: str = "",
        regions: tuple[tuple[Any, ...], ...] = (),
    ) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self._device, self._around, self._prefix, self._regions = device, around, prefix, regions
        self._blocks = tuple(blocks(self.graph.nodes))

    def steps(self, *operands: Any) -> Generator[Ran, None, Any]:
        """Run the graph, and yield after each node. Returns the graph's result."""
        self.env, self.args_iter = {}, iter(operands)
        result = None
        for block in self._blocks:
            if block.region:
                yield from self._region_whole(block.nodes)
                continue
            for node in block.nodes:
                result = yield from self._step(node)
                self._keep(node, result)
        return result

    @cached_property
    def is_straight(self) -> bool:
        """Whether `through` can run the graph: it has no regions."""
        return not any(block.region for block in self._blocks) and not any(
            node.target in REGION_CHILD for node in self.graph.nodes
        )

    def through(self, *operands: Any) -> Any:
        """`steps` without stopping: most of an interpreter's time is spent between nodes."""
        env, given, result = dict[fx.Node, Any](), iter(operands), None
        for node in self.graph.nodes:
            try:
                result = self._value(node, env, given)
            except Exception as error:
                raise NodeError(self._prefix + node.name, node, error) from error
            if node.users:
                env[node] = result
            for used in self.user_to_last_uses.get(node, ()):
                del env[used]
        return result

    def _value(self, node: fx.Node, env: dict[fx.Node, Any], given: Iterator[Any]) -> Any:
        if node.op == "placeholder":
            return next(given)
        if node.op == "call_function":
            if self._around is not None:
                return self._around(self._prefix + node.name, node, env, partial(self.call_function, node.target))
            return self.call_function(node.target, *fx.map_arg((node.args, node.kwargs), env.__getitem__))
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        return getattr(self, node.op)(node.target, args, kwargs)

    def _keep(self, node: fx.Node, result: Any) -> None:
        if node.users:
            self.env[node] = result
        for used in self.user_to_last_uses.get(node, ()):
            del self.env[used]

    def _region_whole(self, nodes: Sequence[fx.Node]) -> list[Ran]:
        """Run a flat region in one step, since the thread state that it sets must not be seen outside.

        Results are plain tensors. What the nodes read is left out: inside the region, those tensors are wrapped.
        """
        written = any(written_arguments(node) for node in nodes)
        done: list[Ran] = []
        with open_regions() as opened:
            for node in nodes:
                result, ran = _exhausted(self._step(node))
                opened.note(node, result)
                done += [Ran(one.name, one.node, unwrapped(one.result, written), {}) for one in ran]
                self._keep(node, result)
        return done

    def _step(self, node: fx.Node) -> Generator[Ran, None, Any]:
        result = (yield from self._region_steps(node)) if node.target in REGION_CHILD else self.run_node(node)
        if node.op != "output":
            yield Ran(self._prefix + node.name, node, result, self.env)
        return result

    def run_node(self, n: fx.Node) -> Any:
        try:
            with torch.no_grad():
                if self._regions:
                    return self._in_regions(n)
                if self._around is None or n.op != "call_function":
                    return super().run_node(n)
                call = partial(self.call_function, n.target)
                return self._around(self._prefix + n.name, n, self.env, call)
        except Exception as error:
            raise NodeError(self._prefix + n.name, n, error) from error

    def _in_regions(self, node: fx.Node) -> Any:
        with ExitStack() as stack:
            for device_type, dtype, enabled, cache_enabled in self._regions:
                region = torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)
                stack.enter_context(region)
            return super().run_node(node)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._device is not None:
            args, kwargs = pytree.tree_map_only(torch.device, lambda _: self._device, (args, kwargs))
        return call_anywhere(target, args, kwargs)

    def _region_steps(self, node: fx.Node) -> Generator[Ran, None, Any]:
        region = child_of(node)
        assert region is not None
        name, child = region
        args, _ = self.fetch_args_kwargs_from_env(node)
        regions = self._regions
        if node.target is AUTOCAST_REGION:
            # If the program has moved to another device, so has the region.
            device_type = args[0] if self._device is None else self._device.type
            regions = (*regions, (device_type, *args[1:4]))
        inside = _SteppedInterpreter(child, self._device, self._around, f"{self._prefix}{name}.", regions)
        return (yield from inside.steps(*args[REGION_CHILD[node.target] + 1 :]))


def _exhausted(steps: Generator[Ran, None, Any]) -> tuple[Any, list[Ran]]:
    """Run all steps: what they return, and what they yield on the way."""
    ran: list[Ran] = []
    while True:
        try:
            ran.append(next(steps))
        except StopIteration as end:
            return end.value, ran


class ProgramRunner:
    """Runs a program on flat inputs, on its own device or on another, without gradient state.

    Every call starts from the program's saved state: buffers that the graph writes into are copied for each
    call. So no batch affects another, and shards of the data give the same results as the whole. around: a function
    that runs each operator in its own way.

    carry_state: instead, each call starts from what the previous call left in the buffers, until `reset`. The program's
    own buffers do not change.
    """

    def __init__(
        self,
        program: ExportedProgram,
        device: torch.device | str | None = None,
        around: Around | None = None,
        carry_state: bool = False,
    ) -> None:
        own = program_device(program)
        self.program, self._around = program, around
        self.device = torch.device(device) if device is not None else own
        self._moved = None if same_device(self.device, own) else self.device
        self._mutated = mutated_inputs(program)
        specs = [spec for spec in program.graph_signature.input_specs if spec.kind != InputKind.USER_INPUT]
        held = {spec.arg.name: t for spec in specs if (t := state_tensor(program, spec.target)) is not None}
        # Tensors that are on the device already are shared, not copied. What is written into is copied for each call.
        written = copies_of_written(held, self._mutated, self.device) if self._moved else {}
        self._state = {name: written.get(name, _moved(t.detach(), self.device)) for name, t in held.items()}
        self._objects = {spec.arg.name: program.constants.get(spec.target) for spec in specs}
        self._carried: dict[str, torch.Tensor] | None = {} if carry_state else None

    @property
    def carries_state(self) -> bool:
        """Whether a call starts from what the previous one left."""
        return self._carried is not None

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """What the calls so far have left in the buffers that the program writes to, by placeholder; {} at first."""
        return dict(self._carried or {})

    def reset(self) -> None:
        """Put the buffers back to the program's saved state."""
        if self._carried is not None:
            self._carried = {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` gave. Without `carry_state`, this does nothing."""
        if self._carried is not None:
            self._carried = copies_of_written(self._state, self._mutated)
            for name, value in state.items():
                self._carried[name].copy_(value)

    def to_device(self, flat: Sequence[Any]) -> list[Any]:
        """Move the tensors among flat inputs to the device that the program runs on."""
        return [v.to(self.device, non_blocking=True) if isinstance(v, torch.Tensor) else v for v in flat]

    def operands(self, flat: Sequence[Any], state: Mapping[str, torch.Tensor] = {}) -> list[Any]:
        """The values of the program's placeholders: flat user inputs, copied where they are written into, and state.

        state: tensors that replace those of the program's saved state, by placeholder.
        """
        inputs, held = iter(flat), self._state | dict(state)
        values = []
        for spec in self.program.graph_signature.input_specs:
            name = spec.arg.name
            if spec.kind != InputKind.USER_INPUT:
                values.append(held[name] if name in held else self._objects[name])
                continue
            value = next(inputs)
            mutated = name in self._mutated and isinstance(value, torch.Tensor)
            values.append(value.clone() if mutated else value)
        return values

    @property
    def moved_to(self) -> torch.device | None:
        """The device that replaces device arguments in the graph; None where the program runs on its own device."""
        return self._moved

    def steps(self, flat: Sequence[Any]) -> Generator[Ran, None, list[Any]]:
        """Run on the flat user inputs, and stop after each node, before anything can change its result.

        Returns the flat user outputs. Raises NodeError where a node raises.
        """
        values, written = self._begun(flat)
        results = yield from self._interpreter().steps(*values)
        return self._ended(written, results)

    @cached_property
    def _straight(self) -> _SteppedInterpreter:
        """For runs without stops, which leave nothing in it."""
        return self._interpreter()

    def _interpreter(self) -> _SteppedInterpreter:
        return _SteppedInterpreter(self.program.graph_module, self._moved, self._around)

    def _begun(self, flat: Sequence[Any]) -> tuple[list[Any], dict[str, torch.Tensor]]:
        """The values of the placeholders for a run, and those of them that it writes to."""
        written = copies_of_written(self._state | self.state, self._mutated)
        return self.operands(flat, written), written

    def _ended(self, written: dict[str, torch.Tensor], results: Sequence[Any]) -> list[Any]:
        """The flat user outputs of a run. Keeps its state."""
        if self._carried is not None:
            self._carried = self._left(written, results)
        specs = self.program.graph_signature.output_specs
        return [r for r, spec in zip(results, specs, strict=True) if spec.kind == OutputKind.USER_OUTPUT]

    def _left(self, written: dict[str, torch.Tensor], results: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The buffers after a call: written in place or, in a functional graph, returned as outputs."""
        signature = self.program.graph_signature
        holders = {target: name for name, target in signature.inputs_to_buffers.items()}
        for spec, result in zip(signature.output_specs, results, strict=True):
            if spec.kind == OutputKind.BUFFER_MUTATION:
                written[holders[str(spec.target)]].copy_(result)
        return written

    def run(self, flat: Sequence[Any], watch: Watch | None = None) -> list[Any]:
        """The flat user outputs for the flat user inputs. Raises NodeError where a node raises."""
        if watch is None and self._straight.is_straight:
            with torch.no_grad():
                values, written = self._begun(flat)
                return self._ended(written, self._straight.through(*values))
        steps = self.steps(flat)
        with torch.no_grad():
            while True:
                try:
                    ran = next(steps)
                except StopIteration as end:
                    results: list[Any] = end.value
                    return results
                if watch is not None:
                    watch(*ran)

    def run_batch(self, flat: Sequence[Any], index: int, watch: Watch | None = None) -> list[Any]:
        """`run`, but a node's error becomes a BatchError that names batch and node."""
        with naming_batch(flat, index):
            return self.run(self.to_device(flat), watch)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; one without data, of which a program may only ask the shape, stays as it is."""
    return tensor if tensor.is_meta else tensor.to(device)


@contextmanager
def naming_batch(flat: Sequence[Any], index: int) -> Iterator[None]:
    """Turn a node's error into a BatchError that names batch and node."""
    try:
        yield
    except NodeError as error:
        shapes = ", ".join(str(tuple(v.shape)) for v in flat if isinstance(v, torch.Tensor))
        raise BatchError(f"batch {index} (input shapes {shapes}): {error}") from error.__cause__


def input_structure(program: ExportedProgram, flat: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Flat user inputs as the arguments and keyword arguments of the model."""
    args, kwargs = pytree.tree_unflatten(list(flat), program.call_spec.in_spec)
    return args, kwargs


def output_structure(program: ExportedProgram, flat: Sequence[Any]) -> Any:
    """Flat user outputs in the structure that the model returns."""
    return pytree.tree_unflatten(list(flat), program.call_spec.out_spec)


def output_names(program: ExportedProgram) -> list[str]:
    """A readable name of each flat user output: `output`, `output['logits']`, `output[0]`."""
    spec = program.call_spec.out_spec
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    return [f"output{pytree.keystr(path)}" for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def tensors_of(node: fx.Node, result: Any) -> list[tuple[int, torch.Tensor]]:
    """The tensors in the result of `node`, with their positions; none for a node that only passes tensors on."""
    if node.target is getitem or node.target in REGION_CHILD:
        return []
    if isinstance(result, torch.Tensor):
        return [(0, result)]
    if isinstance(result, (list, tuple)):
        return [(i, item) for i, item in enumerate(result) if isinstance(item, torch.Tensor)]
    return []


def require_program(value: Any, argument: str = "program", remedy: str = "") -> None:
    """Raise ProgramError for anything but an exported program, such as the module itself."""
    export = "Give what torch.export.export(model.eval(), args) returns."
    require_kind(value, ExportedProgram, argument, remedy or export, ProgramError)
    state = {**value.state_dict, **value.constants}
    if fake := [name for name, tensor in state.items() if isinstance(tensor, torch.Tensor) and is_fake(tensor)]:
        raise ProgramError(
            f"{argument} has no weights: {fake[0]} is a fake tensor, as from an export under FakeTensorMode. Export "
            "the model with its weights loaded."
        )
