"""The networks that calibration is measured on, and one batch of input for each. Seeded, offline."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

Made = tuple[nn.Module, tuple[torch.Tensor, ...]]


class EncoderLayer(nn.Module):
    """A post-norm transformer layer, as in BERT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, length, width]."""
        batch, length, width = x.shape

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

        attended = F.scaled_dot_product_attention(split(self.query(x)), split(self.key(x)), split(self.value(x)))
        x = self.norm1(x + self.out(attended.transpose(1, 2).reshape(batch, length, width)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """Token ids to hidden states: embeddings, positions, layers."""

    def __init__(self, width: int = 384, layers: int = 6, heads: int = 6, words: int = 30522) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [batch, length] int64."""
        x = self.norm(self.words(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device)))
        for layer in self.layers:
            x = layer(x)
        return x


class RestorationBlock(nn.Module):
    """A block of NAFNet (Chen et al., 2022): layer norm over channels, gates instead of activations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels, eps=1e-6), nn.LayerNorm(channels, eps=1e-6)
        self.spread, self.depth = (
            nn.Conv2d(channels, 2 * channels, 1),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels),
        )
        self.attention, self.gather = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.up, self.down = nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(channels, channels, 1)
        self.beta, self.gamma = (nn.Parameter(torch.ones(1, channels, 1, 1)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, channels, height, width]."""
        first, second = self.depth(self.spread(self._normed(self.norm1, x))).chunk(2, 1)
        gated = first * second
        gated = gated * self.attention(F.adaptive_avg_pool2d(gated, 1))
        x = x + self.beta * self.gather(gated)
        first, second = self.up(self._normed(self.norm2, x)).chunk(2, 1)
        return x + self.gamma * self.down(first * second)

    def _normed(self, norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Restoration(nn.Module):
    """A NAFNet-like image to image network with one level down and up."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
        self.before = nn.Sequential(*(RestorationBlock(channels) for _ in range(2)))
        self.down = nn.Conv2d(channels, 2 * channels, 2, stride=2)
        self.middle = nn.Sequential(*(RestorationBlock(2 * channels) for _ in range(4)))
        self.up = nn.Sequential(nn.Conv2d(2 * channels, 4 * channels, 1), nn.PixelShuffle(2))
        self.after = nn.Sequential(*(RestorationBlock(channels) for _ in range(2)))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image: [batch, 3, height, width]."""
        x = self.before(self.first(image))
        x = self.after(x + self.up(self.middle(self.down(x))))
        return image + self.last(x)


class Unrolled(nn.Module):
    """A gated recurrent cell written out step by step: thousands of small tensors."""

    def __init__(self, width: int = 16, steps: int = 400) -> None:
        super().__init__()
        self.steps = steps
        self.gate, self.candidate = nn.Linear(2 * width, width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, width]. Returns the last state, of the same shape."""
        state = torch.zeros_like(x)
        for _ in range(self.steps):
            both = torch.cat([x, state], 1)
            gate = torch.sigmoid(self.gate(both))
            state = gate * state + (1 - gate) * torch.tanh(self.candidate(both))
        return state


def resnet18() -> Made:
    """ResNet-18, batch 8 at 224 pixels."""
    return torchvision.models.resnet18(), (torch.randn(8, 3, 224, 224),)


def encoder() -> Made:
    """A BERT-like encoder, 6 layers of 384, batch 8 of 128 tokens."""
    return Encoder(), (torch.randint(0, 30522, (8, 128)),)


def restoration() -> Made:
    """A NAFNet-like net, 16 channels, batch 4 at 128 pixels."""
    return Restoration(), (torch.randn(4, 3, 128, 128),)


def unrolled() -> Made:
    """400 steps of a recurrent cell, 8 x 16: 4,000 tensors of 128 or 256 elements."""
    return Unrolled(), (torch.randn(8, 16),)


NETWORKS: dict[str, Callable[[], Made]] = {
    "resnet18": resnet18,
    "encoder": encoder,
    "restoration": restoration,
    "unrolled": unrolled,
}


def made(name: str) -> Made:
    """The network called `name` in eval mode, and its inputs; the same on every call."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    return model.eval(), inputs
