"""A builder process for a command that knows, before it imports torch, that it may build."""

from __future__ import annotations

from calibcast.engines.tensorrt.builder.worker import fork_early


def fork_builder(backend: str, ahead_of_time: bool = False, isolate: bool = True, sure: bool = True) -> None:
    """Fork the builder of an engine for `backend`, where this process can be forked.

    sure: there is something to build, so that a builder for TensorRT imports it at once; else it waits until it is
    told. Imports torch; the command's own time is best used if it calls this before it imports anything itself.
    """
    if isolate and backend != "eager":
        fork_early(ready=sure and (backend == "tensorrt" or (backend == "auto" and ahead_of_time)))
