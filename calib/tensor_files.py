"""Named tensors in a file, by safetensors: bytes and a header, nothing that a reader could run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from calibcast.calib.artifacts import written_whole
from calibcast.calib.errors import ArtifactError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_MADE_BY = {"calibcast": "tensors"}


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write named tensors of any device, whole or not at all. Memory that several share is written for each."""
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as temporary:
        save_file(own, temporary, metadata=_MADE_BY)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read what `save_tensors` wrote, on the host. Raises ArtifactError for anything else."""
    if not Path(path).is_file():
        raise ArtifactError(f"{path}: no such file; expected tensors written by calibcast")
    try:
        with safe_open(str(path), "pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a readable file of tensors (truncated or foreign): {error}") from error
