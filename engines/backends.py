"""The backends there are, and the choice between them."""

from __future__ import annotations

from calib.errors import BuildError, known
from engines.eager import EagerBackend
from engines.runtimes import Backend
from engines.tensorrt import TensorrtBackend

BACKENDS: dict[str, Backend] = {"tensorrt": TensorrtBackend(), "eager": EagerBackend()}


def backend_named(name: str) -> Backend:
    """The backend called `name`. Raises BuildError for an unknown one."""
    if name not in BACKENDS:
        raise BuildError(f"unknown backend {name!r}; {known(name, [*BACKENDS, 'auto'])}")
    return BACKENDS[name]


def chosen(name: str) -> tuple[Backend, str]:
    """The backend for `name`, and why. `auto` takes TensorRT where it can run, else eager."""
    if name != "auto":
        return backend_named(name), "as asked"
    problem = BACKENDS["tensorrt"].unavailable()
    if problem is None:
        return BACKENDS["tensorrt"], "auto: a GPU and Torch-TensorRT are present"
    return BACKENDS["eager"], f"auto: {problem}"
