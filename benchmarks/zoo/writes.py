"""Networks that write: into buffers, into views, through indices."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from benchmarks.zoo.architecture import Architecture, Sample
from benchmarks.zoo.parts import BATCH, HEADS, WIDTH, heads, mlp, plain, rows


class KeyCache(nn.Module):
    """One step of decoding into a cache: buffers written through views and by index, positions counted."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("keys", torch.randn(2, HEADS, 16, WIDTH // HEADS))
        self.register_buffer("values", torch.randn(2, HEADS, 16, WIDTH // HEADS))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """x: [2, 1, 32]; place: [1], where in the cache the step stands."""
        q, k, v = (heads(part) for part in self.qkv(x).split(WIDTH, -1))
        self.keys.index_copy_(2, place, k)
        self.values[:, :, place] = v
        self.steps.add_(1)
        seen = torch.arange(16)[None, :] <= place
        attended = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen)
        return self.out(attended.transpose(1, 2).flatten(2))


class RunningNorm(nn.Module):
    """A norm with a moving average of its own, kept in buffers that each call updates."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("square", torch.ones(WIDTH))
        self.before, self.after = mlp(), mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 32]."""
        x = self.before(x)
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        self.square.lerp_((x**2).mean(0), 0.1)
        return self.after((x - self.mean) * torch.rsqrt(self.square - self.mean**2 + 1e-3))


class ViewWrites(nn.Module):
    """Shifts, crops and blends by writing into views, as much detection code does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image: [batch, 3, 16, 16]."""
        x = self.first(image)
        shifted = torch.zeros_like(x)
        shifted[:, :4, 1:] = x[:, :4, :-1]
        shifted[:, 4:8, :, 1:] = x[:, 4:8, :, :-1]
        shifted[:, 8:] = x[:, 8:]
        boxes = self.last(F.relu_(shifted))
        boxes[..., :2].sigmoid_()
        boxes[:, 2:].exp_().clamp_(max=8.0)
        return boxes


def _step(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 1, WIDTH), torch.tensor([3 + index])


WRITES = (
    Architecture("key_cache", "features", lambda: Sample(KeyCache().eval(), _step(0)), _step,
                 covers=("in-place op on a buffer", "in-place op on a view", "boolean mask", "multi-output op")),
    plain("running_norm", RunningNorm, rows, {0: BATCH}, "in-place op on a buffer", "dynamic batch"),
    plain("view_writes", ViewWrites, lambda i: torch.randn(2, 3, 16, 16), None, "in-place op on a view"),
)  # fmt: skip
