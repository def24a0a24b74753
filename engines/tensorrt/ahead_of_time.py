"""Building TensorRT-RTX engines on a machine without a GPU, in a process of its own.

TensorRT-RTX compiles for a family of GPUs and needs none of them (NVIDIA calls this ahead-of-time compilation). But
Torch-TensorRT asks torch.cuda about the GPU while it compiles, so stand-ins for those functions answer here. They must
not outlive the build, and the builder may crash, so only a builder process calls `pretend_gpu`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from calibcast.calib.errors import BuildError
from calibcast.engines.tensorrt.builder.torch_tensorrt_adapter import INSTALL, installed_flavour

RTX = "torch-tensorrt-rtx"
# By default an ahead-of-time engine of TensorRT-RTX loads on compute capability 8.0 and later. NVIDIA supports it on
# fewer GPUs (`compatibility.RTX_CAPABILITIES`).
# https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html
LEAST_CAPABILITY = (8, 0)
_MEMORY = 1 << 36

_STAND_INS: dict[str, Any] = {
    "get_device_capability": lambda *_: (9, 0),
    "current_device": lambda: 0,
    "mem_get_info": lambda *_: (_MEMORY, _MEMORY),
    "get_device_name": lambda *_: "none",
    "get_device_properties": lambda *_: SimpleNamespace(major=9, minor=0, name="none", total_memory=_MEMORY),
    "empty_cache": lambda: None,
    "synchronize": lambda *_: None,
}


def ahead_of_time_problem() -> str | None:
    """Why no engine can be built ahead of time with what is installed, and what to do; None when it can."""
    found = installed_flavour()
    if found is None:
        return f"Torch-TensorRT is not installed: {INSTALL}"
    if found[0] != RTX:
        return (
            f"{found[0]} {found[1]} is installed, and TensorRT times its kernels on the GPU that it builds for: only "
            "TensorRT-RTX builds ahead of time. Build on the target GPU without ahead_of_time, or install "
            "'calibcast[rtx]' in an environment of its own."
        )
    return None


def is_rtx() -> bool:
    """Whether the installed flavour of Torch-TensorRT is the one over TensorRT-RTX."""
    found = installed_flavour()
    return found is not None and found[0] == RTX


def require_ahead_of_time() -> None:
    """Raise BuildError unless engines can be built ahead of time here."""
    problem = ahead_of_time_problem()
    if problem is not None:
        raise BuildError(f"cannot build ahead of time: {problem}")


def pretend_gpu() -> None:
    """Let torch.cuda answer what Torch-TensorRT asks. It lasts until this process ends: never call it in a user's
    process."""
    if torch.cuda.is_available():
        return
    for name, answer in _STAND_INS.items():
        setattr(torch.cuda, name, answer)
