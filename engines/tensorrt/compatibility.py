"""Whether an engine that was built elsewhere can run here: a clear refusal in place of TensorRT's own error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from calibcast.calib.errors import MismatchError
from calibcast.engines.tensorrt.ahead_of_time import LEAST_CAPABILITY, RTX
from calibcast.engines.tensorrt.builder.torch_tensorrt_adapter import installed_flavour

# Libraries whose version an engine file depends on.
LIBRARIES = ("tensorrt", "tensorrt-rtx")
# Compute capabilities in NVIDIA's support matrices of TensorRT-RTX 1.0 to 1.6 (12.1 from 1.5 on): GeForce and RTX cards
# of Turing, Ampere, Ada and Blackwell. Data-centre GPUs (8.0, 9.0, 10.0) are not among them.
# https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html
RTX_CAPABILITIES = ((7, 5), (8, 6), (8, 9), (12, 0), (12, 1))
# TensorRT 10 and 11. https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/support-matrix.html
LEAST_OF_TENSORRT = (7, 5)


def check_compatible(built_with: Mapping[str, str], present: Mapping[str, str], ahead_of_time: bool) -> None:
    """Raise MismatchError unless an engine built with `built_with` loads where `present` is (`Backend.versions`).

    An engine loads only under the TensorRT version that built it. An engine built ahead of time loads on compute
    capability 8.0 and later (`supported_gpu` says where NVIDIA supports it). Any other engine loads only on the GPU
    model that it was built for.
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
            "this GPU, or with ahead_of_time=True (TensorRT-RTX), which gives an engine for RTX GPUs of compute "
            "capability 8.6, 8.9, 12.0 and 12.1."
        )


_AGAIN = "Build it again here (calibcast build), or install that version."


def gpu_facts() -> dict[str, str]:
    """Name and compute capability of the GPU here; {} without one."""
    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}


def supported_gpu(flavour: str, capability: tuple[int, int]) -> bool:
    """Whether NVIDIA's support matrix of a flavour lists GPUs of this compute capability.

    flavour: a distribution, "torch-tensorrt-rtx" or "torch-tensorrt". An engine may build, and even run, on a GPU that
    is not listed, but then nobody promises that it is right.
    """
    return capability in RTX_CAPABILITIES if flavour == RTX else capability >= LEAST_OF_TENSORRT


def gpu_warning() -> str | None:
    """A warning that NVIDIA does not support the installed flavour on this GPU, with what to use instead.

    None where NVIDIA supports it, or where there is no GPU or no flavour.
    """
    found, here = installed_flavour(), gpu_facts()
    if found is None or not here:
        return None
    major, minor = map(int, here["compute_capability"].split("."))
    if supported_gpu(found[0], (major, minor)):
        return None
    return _outside_of_support(found[0], here["gpu"], (major, minor))


def _outside_of_support(flavour: str, gpu: str, capability: tuple[int, int]) -> str:
    here = f"{gpu} has compute capability {capability[0]}.{capability[1]}, which is outside of NVIDIA's support for"
    if flavour != RTX:
        return f"{here} TensorRT ({'.'.join(map(str, LEAST_OF_TENSORRT))} and later). Use backend='eager'."
    listed = ", ".join(f"{major}.{minor}" for major, minor in RTX_CAPABILITIES)
    return (
        f"{here} TensorRT-RTX ({listed}): engines may fail to build or to run there, or be wrong. Install "
        "'calibcast[tensorrt]' in place of 'calibcast[rtx]', for TensorRT supports this GPU; until then verify every "
        "engine on your own data."
    )
