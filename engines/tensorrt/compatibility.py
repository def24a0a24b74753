"""Whether an engine that was built somewhere can run here: a clear refusal instead of what TensorRT would say."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from calibcast.calib.errors import MismatchError
from calibcast.engines.tensorrt.ahead_of_time import LEAST_CAPABILITY

# Distributions whose version an engine file depends on, with those that carry the same version beside them.
LIBRARIES = ("tensorrt", "tensorrt-rtx")


def check_compatible(built_with: Mapping[str, str], present: Mapping[str, str], ahead_of_time: bool) -> None:
    """Raise MismatchError unless an engine built with `built_with` loads where `present` is (`Backend.versions`).

    An engine loads under the TensorRT version that built it. One built ahead of time runs on any GPU of compute
    capability 8.0 and later; any other on the GPU model that it was built for.
    """
    for library in LIBRARIES:
        ours, theirs = present.get(library), built_with.get(library)
        if ours == theirs:
            continue
        if theirs is None:
            there = next((f"{name} {built_with[name]}" for name in LIBRARIES if name in built_with), "another TensorRT")
            raise MismatchError(f"this engine was built with {there}, and here is {library} {ours}. {_AGAIN}")
        here = f"{library} {ours}" if ours else f"no {library}"
        raise MismatchError(
            f"this engine was built with {library} {theirs}, and here is {here}: an engine loads only under the "
            f"version that built it. {_AGAIN}"
        )
    gpu, capability = present.get("gpu"), present.get("compute_capability")
    if ahead_of_time:
        if capability is not None and tuple(map(int, capability.split("."))) < LEAST_CAPABILITY:
            least = ".".join(map(str, LEAST_CAPABILITY))
            raise MismatchError(
                f"this engine was built ahead of time for compute capability {least} and later, and {gpu} has "
                f"{capability}. Build it on this GPU."
            )
    elif gpu is not None and built_with.get("gpu") != gpu:
        raise MismatchError(
            f"this engine was built for {built_with.get('gpu') or 'an unknown GPU'}, and here is {gpu}. Build it on "
            "this GPU, or with ahead_of_time=True (TensorRT-RTX), which gives an engine for any GPU of compute "
            "capability 8.0 and later."
        )


_AGAIN = "Build it again here (calibcast build), or install that version."


def gpu_facts() -> dict[str, str]:
    """Name and compute capability of the GPU here; {} without one."""
    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}
