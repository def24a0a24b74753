"""Compile one program with Torch-TensorRT: the work of a builder process.

    python -m engines.builder_process FOLDER

FOLDER holds the job and the program; the engine's files and the answer are written there. What happens on the way is
told on the standard output as one JSON object a line; everything that libraries print goes to the standard error. A
crash of the builder ends this process and no other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from calib.artifacts import load_program
from calib.batches import signature_of
from calib.execution import input_structure
from calib.graph import dtype_name, tensor_values
from engines import torch_tensorrt_adapter as adapter
from engines.ahead_of_time import pretend_gpu
from engines.builder_job import BUILT, PROGRAM, BuilderJob, BuilderResult
from engines.engine_files import WiringError, write_parts
from engines.program_device import copied, on_device
from engines.torch_tensorrt_internals import Conversion, Event, stamp, stamped_name, watched_conversion

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
    with watched_conversion(event, job.ahead_of_time) as conversion:
        compiled = adapter.compile_program(moved, args, kwargs, settings, low)
    seconds = time.perf_counter() - start
    event({"stage": "write"})
    folder.mkdir(parents=True, exist_ok=True)
    _write(compiled, folder, job.ahead_of_time)
    inspected = () if job.ahead_of_time else tuple(adapter.inspected(engine) for engine in _engines(compiled))
    return _result(compiled, conversion, inspected, seconds)


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


def _result(
    compiled: fx.GraphModule, conversion: Conversion, inspected: tuple[str, ...], seconds: float
) -> BuilderResult:
    nodes: dict[str, str] = {}
    types: dict[str, list[str]] = {}
    for node in _torch_nodes(compiled):
        name = stamped_name(node) or node.name
        nodes[name] = f"no converter for {node.target}, or kept out by a setting"
        found = {dtype_name(value.dtype) for _, value in tensor_values(node) if value.dtype.is_floating_point}
        types[name] = sorted(found)
    return BuilderResult(
        layers=tuple(conversion.rows()), torch_nodes=nodes, torch_types=types, inspected=inspected, seconds=seconds
    )


def _torch_nodes(compiled: fx.GraphModule) -> list[fx.Node]:
    parts = [part for _, part in compiled.named_children() if isinstance(part, fx.GraphModule)]
    plain = [node for node in compiled.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    inner = [node for part in parts for node in part.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return plain + inner


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
