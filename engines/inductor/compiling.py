"""Compiling a program with AOTInductor, in a builder process, for the backend `inductor`.

model.pt2            the package; it loads in Python and in C++, without Torch-TensorRT
inductor.json        names of the state in the last inputs and of the new values in the last outputs; kernel types
state.safetensors    the state at the start
"""

from __future__ import annotations

import logging
import re
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from calibcast.calib.artifacts import save_json
from calibcast.calib.batches import signature_of
from calibcast.calib.errors import BuildError
from calibcast.calib.execution import input_structure
from calibcast.calib.pt2.containers import with_plain_containers
from calibcast.calib.tensor_files import save_tensors
from calibcast.engines.lstm_states import right_lstm_states
from calibcast.engines.tensorrt.builder.job import BuilderJob, BuilderResult
from calibcast.engines.tensorrt.builder.state_lifting import Lifted, lifted, writes_buffers
from calibcast.engines.tensorrt.program_device import copied, on_device
from torch.export import ExportedProgram

_log = logging.getLogger("calibcast")
PACKAGE, FACTS, FACTS_KIND = "model.pt2", "inductor.json", "inductor"
STATE, STATE_NOW = "state.safetensors", "state_now.safetensors"
# A CPU kernel in the generated code, and a pointer among its arguments.
_KERNEL = re.compile(r'extern "C"\s+void\s+(\w+)\(([^)]*)\)', re.DOTALL)
_POINTER = re.compile(r"(?:const\s+)?(\w+(?:::\w+)*)\s*\*")
_TYPES = {"half": "float16", "at::Half": "float16", "bfloat16": "bfloat16", "at::BFloat16": "bfloat16"}
_TYPES |= {"float": "float32", "double": "float64"}


def compile_inductor(
    job: BuilderJob, program: ExportedProgram, folder: Path, event: Callable[[dict[str, Any]], None]
) -> BuilderResult:
    """Compile `program` and write its files to `folder`. Raises what the compiler raises; `program` is not changed.

    Buffers that the program writes are lifted out of it, so the package is a pure function, and its caller keeps the
    state.
    """
    start = time.perf_counter()
    event({"stage": "lower"})
    program = with_plain_containers(program)  # whoever loads the package need not know a library's classes
    moved = copied(on_device(program, torch.device(job.device)))
    with right_lstm_states():
        source = lifted(moved) if writes_buffers(moved) else Lifted(moved)
    source.program.example_inputs = _examples(job, program, source)
    folder.mkdir(parents=True, exist_ok=True)
    event({"stage": "build"})
    with torch.no_grad(), right_lstm_states():
        torch._inductor.aoti_compile_and_package(
            source.program, package_path=str(folder / PACKAGE), inductor_configs=dict(job.settings)
        )
    event({"stage": "write"})
    if source.held:
        save_tensors(folder / STATE, source.held)
    facts = {"held": list(source.held), "updated": list(source.updated), "kernels": kernel_types(folder / PACKAGE)}
    save_json(folder / FACTS, FACTS_KIND, facts)
    event({"stage": "run"})
    _run_once(folder / PACKAGE, source.program.example_inputs)
    return BuilderResult(seconds=time.perf_counter() - start)


def _run_once(package: Path, examples: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Load and run the package where a crash ends the builder's process, not the caller's.

    What it raises on made-up inputs is left to the trial, which has real ones.
    """
    args, kwargs = examples
    try:
        with torch.no_grad():
            torch._inductor.aoti_load_package(str(package))(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:
        _log.debug("the package does not run on zeros: %s", error)


def _examples(job: BuilderJob, program: ExportedProgram, source: Lifted) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs of the most frequent sizes, for the compiler."""
    flat: list[Any] = []
    for leaf, (_, usual, _) in zip(signature_of(program).leaves, job.profiles, strict=True):
        if leaf.dtype is None and leaf.sizes:
            raise BuildError(f"AOTInductor compiles no open number as an input: {leaf.name}. Export it as a constant.")
        tensor = leaf.dtype is not None
        flat.append(torch.zeros(usual, dtype=leaf.dtype, device=job.device) if tensor else leaf.constant)
    args, kwargs = input_structure(program, flat)
    return (*args, *source.held.values()), kwargs


def kernel_types(package: Path) -> Mapping[str, list[str]]:
    """The floating types of the arguments of each generated CPU kernel; empty for a GPU.

    The package holds GPU kernels as machine code, which does not tell the types.
    """
    found: dict[str, list[str]] = {}
    with zipfile.ZipFile(package) as archive:
        for name in archive.namelist():
            if name.endswith(".kernel.cpp"):
                for kernel, arguments in _KERNEL.findall(archive.read(name).decode(errors="replace")):
                    types = {_TYPES[kind] for kind in _POINTER.findall(arguments) if kind in _TYPES}
                    found[kernel] = sorted(types)
    return found
