"""The main program of a builder process: it compiles programs with Torch-TensorRT or Inductor, one after another.

    python -m calibcast.engines.tensorrt.builder.process

It reads requests from the standard input, one JSON object a line: to get ready, or to do the job in a folder. That
folder holds the job and its program; the engine's files, the answer and the log are written there. Events go to the
standard output, one JSON object a line. The process ends when its input ends, or when no job has come for a while. A
crash of the builder ends this process and no other.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from calibcast.calib.artifacts import load_program
from calibcast.calib.errors import BuildError
from calibcast.engines.inductor.compiling import compile_inductor
from calibcast.engines.tensorrt.ahead_of_time import pretend_gpu
from calibcast.engines.tensorrt.builder import torch_tensorrt_adapter as adapter
from calibcast.engines.tensorrt.builder.compiling import compile_job
from calibcast.engines.tensorrt.builder.job import BUILT, INDUCTOR, PROGRAM, BuilderJob, BuilderResult
from calibcast.engines.tensorrt.builder.torch_tensorrt_internals import Event
from calibcast.engines.tensorrt.builder.worker import ANSWERED, EARLY, IDLE, LOG, NO_CUDA, READY


def work(folder: Path, event: Event) -> None:
    """Do the job of `folder`, and write the answer, also when the build fails."""
    job = BuilderJob.load(folder)
    try:
        event({"stage": "load"})
        for name in job.imports:
            importlib.import_module(name)
        compiled = compile_inductor if job.compiler == INDUCTOR else compile_job
        result = compiled(job, load_program(folder / PROGRAM, trusted=True), folder / BUILT, event)
    except Exception as error:  # the builder, its converters and the partitioner each raise errors of their own
        result = BuilderResult(error=(type(error).__name__, str(error).strip()[:8000] or repr(error)))
    result.save(folder)


def main(forked: bool = False) -> NoReturn:
    """Do one request after another. forked: from a process that had imported torch."""
    telling = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what C++ prints must not break the lines

    def event(content: dict[str, Any]) -> None:
        telling.write(json.dumps(content) + "\n")

    _keep_imported()
    for request in _asked():
        if READY in request:
            _get_ready(request[READY] == EARLY)
            continue
        _move_to(request)
        folder = Path(request["folder"])
        if forked and not _reaches(BuilderJob.load(folder)):
            os._exit(NO_CUDA)
        _print_to(folder / LOG)
        work(folder, event)
        sys.stderr.flush()
        event({"stage": ANSWERED})
        _give_back()
    # Leave without the interpreter's clean-up: CUDA and TensorRT libraries may crash in their destructors.
    sys.stderr.flush()
    os._exit(0)


def _reaches(job: BuilderJob) -> bool:
    """Whether this process can use the GPU that a job needs. CUDA does not survive a fork, if something started it
    before."""
    if job.ahead_of_time or torch.device(job.device).type != "cuda":
        return True
    try:
        torch.zeros(1, device=job.device)
    except (RuntimeError, AssertionError):  # of CUDA, and of a torch without it
        return False
    return True


def _get_ready(early: bool) -> None:
    """Import what every build with Torch-TensorRT needs, before the first job comes. early: also lower a small program
    once, so that what torch does only the first time is done."""
    gc.disable()
    pretend_gpu()
    importlib.import_module("torch._export.serde.serialize")
    try:
        adapter.load_package()
    except BuildError as error:  # the first job will report it
        print(error, file=sys.stderr)
    if early:
        torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)).run_decompositions().module()
    _keep_imported()


def _keep_imported() -> None:
    """Look for garbage from now on, but not among what is imported: Torch-TensorRT collects garbage in each build, and
    the million objects of modules need not be looked through (0.5 s of a build, of ResNet-18 as of others). Beside
    that, seldom: Python's own thresholds cost Swin-T 0.5 s of a build of 7."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()


def _asked() -> Iterator[dict[str, Any]]:
    """The requests from the standard input, until it ends or none comes for IDLE seconds."""
    stream = os.fdopen(0, "rb", buffering=0)
    while select.select([stream], [], [], IDLE)[0]:
        line = stream.readline()
        if not line:
            return
        yield json.loads(line)


def _move_to(request: dict[str, Any]) -> None:
    """Take on what has changed, since this builder was started, in the process that asks: its folder, its search path
    and environment."""
    os.chdir(request["working_folder"])
    sys.path[:] = request["search_path"].split(os.pathsep)
    for name, value in request["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _print_to(path: Path) -> None:
    """Send what Python and C++ print to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def _give_back() -> None:
    """Free the memory that a build leaves behind, so that a kept builder takes little.

    What torch has learnt stays: `torch._dynamo.reset()` frees next to nothing, and the next build lowers its graph a
    third longer (ResNet-18: 1.2 s for 0.9 s).
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # where the C library is another one
        ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    main()
