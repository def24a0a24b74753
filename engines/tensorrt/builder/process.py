"""Compile one program with Torch-TensorRT: the work of a builder process.

    python -m calibcast.engines.tensorrt.builder.process FOLDER

FOLDER holds the job and the program; the engine's files and the answer are written there. What happens on the way is
told on the standard output as one JSON object a line; everything that libraries print goes to the standard error. A
crash of the builder ends this process and no other.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from calibcast.calib.artifacts import load_program
from calibcast.calib.batches import signature_of
from calibcast.calib.errors import BuildError
from calibcast.calib.execution import input_structure
from calibcast.calib.graph import dtype_name, tensor_values
from calibcast.engines.tensorrt.ahead_of_time import pretend_gpu
from calibcast.engines.tensorrt.builder import torch_tensorrt_adapter as adapter
from calibcast.engines.tensorrt.builder.job import BUILT, PROGRAM, BuilderJob, BuilderResult
from calibcast.engines.tensorrt.builder.torch_tensorrt_internals import Event, stamp, stamped_name, watched_conversion
from calibcast.engines.tensorrt.engine_files import WiringError, write_parts
from calibcast.engines.tensorrt.program_device import copied, on_device
from torch import fx
from torch.export import ExportedProgram

# What Torch-TensorRT saves by itself, for a compiled module that has no files of ours.
WHOLE = "engine.pt2"


def compile_job(job: BuilderJob, program: ExportedProgram, folder: Path, event: Event) -> BuilderResult:
    """Compile `program` into the files of `folder`. Raises what the builder raises; `program` is not changed."""
    start = time.perf_counter()
    moved = copied(program) if job.ahead_of_time else copied(on_device(program, torch.device(job.device)))
    stamp(moved)
    signature = signature_of(program)
    specs = [
        adapter.input_spec(profile, leaf.dtype) if leaf.dtype is not None else leaf.constant
        for leaf, profile in zip(signature.leaves, job.profiles, strict=True)
    ]
    args, kwargs = input_structure(program, specs)
    low = None if job.weakly_typed is None else frozenset(getattr(torch, name) for name in job.weakly_typed)
    settings = dict(job.settings) | ({"lazy_engine_init": True} if job.ahead_of_time else {})
    event({"stage": "lower"})

    def run(**more: Any) -> fx.GraphModule:
        made: fx.GraphModule = adapter.compile_program(moved, args, kwargs, {**settings, **more}, low)
        return made

    with watched_conversion(event, job.ahead_of_time) as conversion:
        try:
            compiled = run()
        except AssertionError as error:
            if "require_full_compilation" not in str(error):
                raise
            # Torch-TensorRT does not say which nodes; a dry run leaves them where they can be seen.
            _refuse_partial(run(require_full_compilation=False, dryrun=True), settings)
    seconds = time.perf_counter() - start
    event({"stage": "write"})
    folder.mkdir(parents=True, exist_ok=True)
    _write(compiled, folder, job.ahead_of_time)
    inspected = () if job.ahead_of_time else tuple(adapter.inspected(engine) for engine in _engines(compiled))
    outside = _outside(compiled, settings)
    return BuilderResult(
        layers=tuple(conversion.rows()),
        torch_nodes={name: why for name, (why, _) in outside.items()},
        torch_types={name: types for name, (_, types) in outside.items()},
        inspected=inspected,
        seconds=seconds,
    )


def _refuse_partial(compiled: fx.GraphModule, settings: dict[str, Any]) -> NoReturn:
    nodes = ", ".join(f"{name} ({why})" for name, (why, _) in _outside(compiled, settings).items())
    raise BuildError(
        f"require_full_compilation=True, and TensorRT does not take every node. Not taken: {nodes}. Without "
        "the setting these run in PyTorch, beside the engine."
    )


def _write(compiled: fx.GraphModule, folder: Path, ahead_of_time: bool) -> None:
    try:
        write_parts(compiled, folder)
    except WiringError as problem:
        if ahead_of_time:
            raise
        adapter.save_module(compiled, str(folder / WHOLE))
        print(f"saved by torch_tensorrt.save: {problem}", file=sys.stderr)


def _engines(compiled: fx.GraphModule) -> list[bytes]:
    parts: list[Any] = [part for _, part in compiled.named_children() if hasattr(part, "serialized_engine")]
    return [bytes(part.serialized_engine) for part in parts]


def _outside(compiled: fx.GraphModule, settings: dict[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """The nodes that run in PyTorch: by name, why, and which floating types they give."""
    parts = [part for name, part in compiled.named_children() if "_run_on_acc" not in name]
    graphs = [compiled.graph, *(part.graph for part in parts if isinstance(part, fx.GraphModule))]
    chosen = set(settings.get("torch_executed_ops") or ())
    found: dict[str, tuple[str, list[str]]] = {}
    for node in (node for graph in graphs for node in graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        kept = node.target in chosen or str(node.target) in chosen
        why = "kept out by torch_executed_ops" if kept else f"no converter takes {node.target} with these arguments"
        types = {dtype_name(value.dtype) for _, value in tensor_values(node) if value.dtype.is_floating_point}
        found[stamped_name(node) or node.name] = why, sorted(types)
    return found


def main(folder: Path) -> int:
    """Do the job of `folder`; 0 when the answer was written, whatever it says."""
    telling = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what C++ prints must not break the lines

    def event(content: dict[str, Any]) -> None:
        telling.write(json.dumps(content) + "\n")

    job = BuilderJob.load(folder)
    if job.ahead_of_time:
        pretend_gpu()
    try:
        event({"stage": "load"})
        for name in job.imports:
            importlib.import_module(name)
        result = compile_job(job, load_program(folder / PROGRAM), folder / BUILT, event)
    except Exception as error:  # the builder, its converters and the partitioner each raise their own
        result = BuilderResult(error=(type(error).__name__, str(error).strip()[:8000] or repr(error)))
    result.save(folder)
    telling.flush()
    # Not through the interpreter's end: CUDA and TensorRT libraries may crash in their destructors.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
