"""The main program of a builder process: it compiles programs with Torch-TensorRT or Inductor, one after another.

    python -m calibcast.engines.tensorrt.builder.process

It reads names of folders from the standard input, one a line. Each folder holds a job and its program; the engine's
files, the answer and the log are written there. Events go to the standard output, one JSON object a line. The process
ends when its input ends, or when no job has come for a while. A crash of the builder ends this process and no other.
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
from calibcast.engines.tensorrt.builder.worker import ANSWERED, EARLY, IDLE, LOG, PLAIN


def work(folder: Path, event: Event) -> None:
    """Do the job of `folder`, and write the answer, also when the build fails."""
    job = BuilderJob.load(folder)
    try:
        event({"stage": "load"})
        for name in job.imports:
            importlib.import_module(name)
        compiled = compile_inductor if job.compiler == INDUCTOR else compile_job
        result = compiled(job, load_program(folder / PROGRAM), folder / BUILT, event)
    except Exception as error:  # the builder, its converters and the partitioner each raise errors of their own
        result = BuilderResult(error=(type(error).__name__, str(error).strip()[:8000] or repr(error)))
    result.save(folder)


def main() -> NoReturn:
    """Do one job after another."""
    telling = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what C++ prints must not break the lines

    def event(content: dict[str, Any]) -> None:
        telling.write(json.dumps(content) + "\n")

    if PLAIN not in sys.argv:
        _warm_up(EARLY in sys.argv)
    # Torch-TensorRT collects garbage in each build: the million objects of imported modules need not be looked through
    # (0.5 s of a build, of ResNet-18 as of others).
    gc.collect()
    gc.freeze()
    for folder in _asked():
        _print_to(folder / LOG)
        work(folder, event)
        sys.stderr.flush()
        event({"stage": ANSWERED})
        _give_back()
    # Leave without the interpreter's clean-up: CUDA and TensorRT libraries may crash in their destructors.
    sys.stderr.flush()
    os._exit(0)


def _warm_up(early: bool) -> None:
    """Import what every build with Torch-TensorRT needs before the first job comes. early: also lower a small program
    once, so that what torch does only the first time is done."""
    pretend_gpu()
    importlib.import_module("torch._export.serde.serialize")
    try:
        adapter.load_package()
    except BuildError as error:  # the first job will report it
        print(error, file=sys.stderr)
    if early:
        torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)).run_decompositions().module()


def _asked() -> Iterator[Path]:
    """The folders from the standard input, until it ends or none comes for IDLE seconds."""
    stream = os.fdopen(0, "rb", buffering=0)
    while select.select([stream], [], [], IDLE)[0]:
        line = stream.readline()
        if not line:
            return
        yield Path(line.decode().rstrip("\n"))


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
