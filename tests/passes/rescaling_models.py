"""Networks that fp16 cannot hold, for the tests of rescaling."""

from __future__ import annotations

from typing import Any

import torch
from calibcast.calib.calibration import calibrate
from calibcast.calib.ranges import RangeTable
from torch import nn
from torch.export import ExportedProgram
from torch.nn import functional as F  # noqa: N812


def measured(program: ExportedProgram, data: list[Any]) -> RangeTable:
    return calibrate(program, data, rounding_batches=0, progress=False)


class Growing(nn.Module):
    """Two residual blocks with RMS norms written by hand, whose branches are `gain` times too large."""

    def __init__(self, gain: float = 3e4, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleList([nn.Linear(width, 2 * width) for _ in range(2)])
        self.outer = nn.ModuleList([nn.Linear(2 * width, width) for _ in range(2)])
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, 8)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        with torch.no_grad():
            for linear in (self.first, *self.outer):
                linear.weight.mul_(gain)
                linear.bias.mul_(gain)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = x + outer(F.silu(inner(self.norm(x))))
        return self.last(self.norm(x))


def growing(gain: float = 3e4) -> tuple[ExportedProgram, list[Any]]:
    model = Growing(gain).eval()
    data = [(torch.randn(4, 32, generator=torch.Generator().manual_seed(i)),) for i in range(3)]
    return torch.export.export(model, data[0]), data


class Rising(nn.Module):
    """A sum that begins near 1 and ends near 10^6, where a norm reads what it began as."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.outer, self.last = nn.Linear(2 * width, width), nn.Linear(width, 8)
        with torch.no_grad():
            self.outer.weight.mul_(3e6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.outer(F.silu(self.inner(F.layer_norm(x, x.shape[-1:]))))
        return self.last(F.layer_norm(x, x.shape[-1:]))


def rising() -> tuple[ExportedProgram, list[Any]]:
    data = [(torch.randn(4, 32, generator=torch.Generator().manual_seed(i)),) for i in range(3)]
    return torch.export.export(Rising().eval(), data[0]), data


def sqnr(want: torch.Tensor, got: torch.Tensor) -> float:
    return float(10 * torch.log10(want.square().sum() / (want - got).square().sum()).detach())
