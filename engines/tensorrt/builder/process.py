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
from pathlib import Path
from typing import Any

from calibcast.calib.artifacts import load_program
from calibcast.engines.tensorrt.ahead_of_time import pretend_gpu
from calibcast.engines.tensorrt.builder.compiling import compile_job
from calibcast.engines.tensorrt.builder.job import BUILT, PROGRAM, BuilderJob, BuilderResult


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
