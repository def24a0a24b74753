"""A function as a model, and as an exported program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram


class Apply(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


class ApplyToX(Apply):
    """The same, whose only input is called `x` in the graph."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def exported(function: Callable[..., Any], *args: torch.Tensor) -> ExportedProgram:
    return torch.export.export(Apply(function), args)
