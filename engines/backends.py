"""The list of backends, and the choice between them."""

from __future__ import annotations

import torch
from calibcast.calib.errors import BuildError, known
from calibcast.engines.eager import EagerBackend
from calibcast.engines.inductor.backend import InductorBackend
from calibcast.engines.runtimes import Backend
from calibcast.engines.tensorrt.backend import TensorrtBackend
from calibcast.engines.tensorrt.builder import torch_tensorrt_adapter as adapter
from calibcast.engines.tensorrt.builder.isolation import prepare_builder
from calibcast.engines.tensorrt.compatibility import gpu_warning
from calibcast.engines.usage import BACKEND_NAMES

BACKENDS: dict[str, Backend] = dict(
    zip(BACKEND_NAMES, (TensorrtBackend(), InductorBackend(), EagerBackend()), strict=True)
)


def backend_named(name: str) -> Backend:
    """The backend called `name`. Raises BuildError for an unknown one."""
    if name not in BACKENDS:
        raise BuildError(f"unknown backend {name!r}; {known(name, [*BACKENDS, 'auto'])}")
    return BACKENDS[name]


def chosen(name: str, ahead_of_time: bool = False) -> tuple[Backend, str]:
    """The backend for `name`, and why.

    `auto` takes TensorRT where the installed flavour supports the GPU, and for every ahead-of-time build. On another
    GPU it takes Inductor, if Inductor can compile there; else eager.
    """
    if name != "auto":
        return backend_named(name), "as asked"
    if ahead_of_time:
        return BACKENDS["tensorrt"], "auto: only TensorRT is built ahead of time"
    # First the GPU: whether Torch-TensorRT works is known only after seconds of importing it.
    problem = gpu_warning() or BACKENDS["tensorrt"].unavailable()
    if problem is None:
        return BACKENDS["tensorrt"], "auto: a GPU and Torch-TensorRT are present"
    if not torch.cuda.is_available():
        return BACKENDS["eager"], f"auto: {problem}"
    missing = BACKENDS["inductor"].unavailable()
    if missing is None:
        return BACKENDS["inductor"], f"auto: {problem}"
    return BACKENDS["eager"], f"auto: {problem}; {missing}"


def start_early(name: str, ahead_of_time: bool = False, isolate: bool = True) -> None:
    """Have a builder process get ready now, because its imports take seconds, for a build that is sure to come."""
    if not isolate or adapter.installed_flavour() is None:
        return
    # This process imports Torch-TensorRT after the builder has begun to, so that both do it at once.
    asked = name == "tensorrt" and (ahead_of_time or torch.cuda.is_available())
    if asked or (name == "auto" and chosen(name, ahead_of_time)[0].name == "tensorrt"):
        prepare_builder()
