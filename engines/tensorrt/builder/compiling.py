"""Compiling a program into the files of an engine: in a builder process, or with `isolate=False` in this one."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from calibcast.calib.artifacts import save_program
from calibcast.calib.batches import signature_of
from calibcast.calib.errors import BuildError
from calibcast.calib.execution import input_structure
from calibcast.calib.graph import dtype_name, tensor_values
from calibcast.engines.io_names import outputs_by_node
from calibcast.engines.lstm_states import right_lstm_states
from calibcast.engines.tensorrt.builder import torch_tensorrt_adapter as adapter
from calibcast.engines.tensorrt.builder.job import BuilderJob, BuilderResult, Profile
from calibcast.engines.tensorrt.builder.network_layers import Conversion, stamp, stamped_name
from calibcast.engines.tensorrt.builder.preparing import (
    constants_apart,
    contents_apart,
    puts_along,
    puts_first,
    state_apart,
)
from calibcast.engines.tensorrt.builder.size_bounds import (
    Bounds,
    check_profile_read_back,
    shape_bounds,
    sizes_in_graph,
)
from calibcast.engines.tensorrt.builder.state_lifting import Lifted, lifted, writes_buffers
from calibcast.engines.tensorrt.builder.torch_tensorrt_internals import Event, set_up, watched_conversion
from calibcast.engines.tensorrt.engine_files import Made, WiringError, write_parts
from calibcast.engines.tensorrt.program_device import copied, on_device
from torch import fx
from torch.export import ExportedProgram

# The file that Torch-TensorRT saves itself, for a compiled module that cannot be written as files of ours.
WHOLE = "engine.pt2"


def compile_job(job: BuilderJob, program: ExportedProgram, folder: Path, event: Event) -> BuilderResult:
    """Compile `program` and write the engine's files to `folder`. Raises what the builder raises; `program` is not
    changed."""
    start = time.perf_counter()
    adapter.load_package()  # what is wrong with it is said here
    moved = copied(program) if job.ahead_of_time else copied(on_device(program, torch.device(job.device)))
    stamp(moved)
    # 2.14 updates a cache in place by a write along one dimension.
    (puts_along if adapter.converts_index_copy() else puts_first)(moved.graph)
    contents_apart(moved.graph)
    state_apart(moved)
    moved, constants = constants_apart(moved)
    source = Lifted(moved)
    if writes_buffers(moved) and not adapter.lifts_buffers():
        source = lifted(moved)
    event({"stage": "lower"})
    sizes = sizes_in_graph(program, job.profiles)
    names = outputs_by_node(program)
    watched = watched_conversion(event, job.ahead_of_time, sizes, job.in_pytorch, names)
    with right_lstm_states(), watched as conversion:
        compiled = _compiled(job, program, source)
    seconds = time.perf_counter() - start
    event({"stage": "write"})
    engines = _engines(compiled)
    if not len(engines) == len(conversion.profiles) == len(conversion.outputs):
        raise BuildError(f"{len(engines)} engines came of {conversion.networks} networks of TensorRT: this is a bug")
    asked = _asked(compiled, engines, sizes, dict(zip(_own_inputs(compiled, source), job.profiles, strict=False)))
    _check_profiles(asked, dict(zip(engines, conversion.profiles, strict=True)))
    folder.mkdir(parents=True, exist_ok=True)
    made = replace(_made(compiled, engines, conversion, source), constants=constants)
    _write(compiled, folder, job.ahead_of_time, made)
    inspected = {} if job.ahead_of_time else {n: adapter.inspected(p.serialized_engine) for n, p in engines.items()}
    if inspected:
        _check_profiles(asked, {name: profiles for name, (_, profiles) in inspected.items()})
    outside = _outside(compiled, job.settings, job.in_pytorch)
    return BuilderResult(
        layers=tuple(conversion.rows()),
        torch_nodes={name: why for name, (why, _) in outside.items()},
        torch_types={name: types for name, (_, types) in outside.items()},
        inspected=tuple(text for text, _ in inspected.values()),
        seconds=seconds,
    )


def _compiled(job: BuilderJob, program: ExportedProgram, source: Lifted) -> fx.GraphModule:
    """What Torch-TensorRT makes of the program."""
    specs = [
        adapter.input_spec(profile, leaf.dtype) if leaf.dtype is not None else leaf.constant
        for leaf, profile in zip(signature_of(program).leaves, job.profiles, strict=True)
    ]
    args, kwargs = input_structure(program, specs)
    args = (*args, *(adapter.input_spec((tuple(v.shape),) * 3, v.dtype) for v in source.held.values()))
    low = None if job.weakly_typed is None else frozenset(getattr(torch, name) for name in job.weakly_typed)
    settings = dict(job.settings) | ({"lazy_engine_init": True} if job.ahead_of_time else {})

    def run(**more: Any) -> fx.GraphModule:
        made: fx.GraphModule = adapter.compile_program(source.program, args, kwargs, {**settings, **more}, low)
        return made

    try:
        return run()
    except AssertionError as error:
        if "require_full_compilation" not in str(error):
            raise
        # Torch-TensorRT does not say which nodes; a dry run leaves them in the graph, where they can be listed.
        _refuse_partial(run(require_full_compilation=False, dryrun=True), settings)


def _made(compiled: fx.GraphModule, engines: Mapping[str, Any], conversion: Conversion, source: Lifted) -> Made:
    places = dict(zip(engines, conversion.outputs, strict=True))
    if not source.held:
        return Made(places, {}, tuple(compiled.meta.get("_copyback_mutation_buffers", ())))
    # Torch-TensorRT renames placeholders, and keeps their order.
    holders = [node.name for node in compiled.graph.nodes if node.op == "placeholder"][source.behind :]
    named = dict(zip(source.held, holders, strict=False))
    return Made(places, {named[n]: v for n, v in source.held.items()}, [named[name] for name in source.updated])


def _own_inputs(compiled: fx.GraphModule, source: Lifted) -> list[fx.Node]:
    """The placeholders of the program's own inputs, without those of state."""
    holders = [node for node in compiled.graph.nodes if node.op == "placeholder"]
    return holders[: source.behind] + holders[source.behind + len(source.held) :]


def _asked(
    compiled: fx.GraphModule, engines: Mapping[str, Any], sizes: Mapping[str, Bounds], own: Mapping[fx.Node, Profile]
) -> dict[str, dict[str, Profile]]:
    """The profile that each engine's inputs should have: as asked for the program's inputs, computed from the sizes for
    others."""

    def wanted(source: Any) -> Profile | None:
        if not isinstance(source, fx.Node):
            return None
        if source in own:
            return own[source]
        value = source.meta.get("val")
        return shape_bounds(value.shape, sizes) if isinstance(value, torch.Tensor) else None

    found: dict[str, dict[str, Profile]] = {}
    for call in compiled.graph.nodes:
        if call.op == "call_module" and str(call.target) in engines:
            names = engines[str(call.target)].input_binding_names
            pairs = [(name, wanted(source)) for name, source in zip(names, call.args, strict=True)]
            found[str(call.target)] = {name: profile for name, profile in pairs if profile is not None}
    return found


def _check_profiles(asked: Mapping[str, Mapping[str, Profile]], built: Mapping[str, Mapping[str, Profile]]) -> None:
    for name, profiles in asked.items():
        check_profile_read_back(name, profiles, built[name])


def write_in_pytorch(program: ExportedProgram, folder: Path, job: BuilderJob) -> BuilderResult:
    """Write `program` itself in place of an engine, when no engine can be built."""
    folder.mkdir(parents=True, exist_ok=True)
    save_program(on_device(program, torch.device(job.device)), folder / WHOLE, checked=False)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    found = {
        node.name: {dtype_name(v.dtype) for _, v in tensor_values(node) if v.is_floating_point()} for node in nodes
    }
    return BuilderResult(
        torch_nodes=dict.fromkeys(found, "no engine could be had"),
        torch_types={name: sorted(types) for name, types in found.items()},
    )


def _refuse_partial(compiled: fx.GraphModule, settings: dict[str, Any]) -> NoReturn:
    nodes = ", ".join(f"{name} ({why})" for name, (why, _) in _outside(compiled, settings, ()).items())
    raise BuildError(
        f"require_full_compilation=True, and TensorRT does not take every node. Not taken: {nodes}. Without "
        "the setting these run in PyTorch, beside the engine."
    )


def _write(compiled: fx.GraphModule, folder: Path, ahead_of_time: bool, made: Made) -> None:
    try:
        write_parts(compiled, folder, made)
    except WiringError as problem:
        if ahead_of_time or made.constants:
            raise
        for engine in _engines(compiled).values():  # as Torch-TensorRT saves only those
            set_up(engine)
        adapter.save_module(compiled, str(folder / WHOLE))
        print(f"saved by torch_tensorrt.save: {problem}", file=sys.stderr)


def _engines(compiled: fx.GraphModule) -> dict[str, Any]:
    """The engines of a compiled graph by name, in the order in which they were built."""
    return {name: part for name, part in compiled.named_children() if hasattr(part, "serialized_engine")}


def _outside(
    compiled: fx.GraphModule, settings: Mapping[str, Any], in_pytorch: Collection[str]
) -> dict[str, tuple[str, list[str]]]:
    """The nodes that run in PyTorch: name -> (why, the floating types of its results)."""
    parts = [part for name, part in compiled.named_children() if "_run_on_acc" not in name]
    graphs = [compiled.graph, *(part.graph for part in parts if isinstance(part, fx.GraphModule))]
    chosen = set(settings.get("torch_executed_ops") or ())
    found: dict[str, tuple[str, list[str]]] = {}
    for node in (node for graph in graphs for node in graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        kept = node.target in chosen or str(node.target) in chosen
        why = "kept out by torch_executed_ops" if kept else f"no converter takes {node.target} with these arguments"
        if stamped_name(node) in in_pytorch:
            why = "the rest builds only without it (found by bisecting)"
        types = {dtype_name(value.dtype) for _, value in tensor_values(node) if value.dtype.is_floating_point}
        found[stamped_name(node) or node.name] = why, sorted(types)
    return found
