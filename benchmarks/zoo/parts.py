"""Parts that the plain networks of the zoo share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import Dim

from benchmarks.zoo.architecture import Architecture, Sample

WIDTH, HEADS = 32, 4
BATCH, LENGTH = Dim("batch", min=1, max=32), Dim("length", min=4, max=64)
SEQUENCE = {0: BATCH, 1: LENGTH}
LENGTHS = (12, 8, 12, 10)


def mlp(inside: int = WIDTH, outside: int = WIDTH) -> nn.Sequential:
    """Two layers with a GELU between."""
    return nn.Sequential(nn.Linear(inside, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, outside))


def heads(x: torch.Tensor) -> torch.Tensor:
    """[batch, length, width] to [batch, heads, length, width / heads]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def sequence(index: int) -> torch.Tensor:
    """[2, length, 32], of a length that changes."""
    return torch.randn(2, LENGTHS[index % 4], WIDTH)


def rows(index: int) -> torch.Tensor:
    """[batch, 32], more from batch to batch."""
    return torch.randn(4 + index, WIDTH)


def plain(name: str, model: type[nn.Module], batch: Any, sizes: Any, *covers: str) -> Architecture:
    """An entry of one positional input, `sizes` of it dynamic."""
    shapes = None if sizes is None else (sizes,)
    return Architecture(
        name, "features", lambda: Sample(model().eval(), (batch(0),), dynamic_shapes=shapes), batch, covers=covers
    )
