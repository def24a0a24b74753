"""The networks that are trained here, with what makes such networks hard for few bits."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """x: [batch, heads, length, width]; each half is the other's partner."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)


class RMSNorm(nn.Module):
    """Written out, as in most language models' own code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class RopeBlock(nn.Module):
    """Attention with rotated queries and keys, and a gated MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = RMSNorm(width), RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotated(q, cosine, sine), rotated(k, cosine, sine)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Characters(nn.Module):
    """A language model of characters. Angles are made in `forward`: up to the position itself, in radians."""

    def __init__(self, width: int = 96, layers: int = 3, heads: int = 4, tokens: int = 96) -> None:
        super().__init__()
        self.embed, self.last = nn.Embedding(tokens, width), nn.Linear(width, tokens, bias=False)
        self.blocks = nn.ModuleList(RopeBlock(width, heads) for _ in range(layers))
        self.norm = RMSNorm(width)
        half = width // heads // 2
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(half) / half))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [batch, length]. Gives logits, [batch, length, tokens]."""
        angles = torch.arange(ids.shape[1], device=ids.device).float()[:, None] * self.frequencies
        cosine, sine = angles.cos(), angles.sin()
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, cosine, sine)
        return self.last(self.norm(x))


class RadianceField(nn.Module):
    """A NeRF that renders: points along rays, sines of octaves of them, an MLP, and what light is let through."""

    def __init__(
        self, width: int = 64, octaves: int = 8, points: int = 32, near: float = 1.0, far: float = 3.0
    ) -> None:
        super().__init__()
        self.points, self.near, self.far = points, near, far
        self.register_buffer("octaves", math.pi * 2.0 ** torch.arange(octaves))
        self.trunk = nn.Sequential(
            nn.Linear(3 + 6 * octaves, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width),
            nn.ReLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, origin: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """origin, direction: [rays, 3]. Gives brightness, [rays]."""
        depths = torch.linspace(self.near, self.far, self.points, device=origin.device)
        at = origin[:, None] + direction[:, None] * depths[:, None]
        waves = (at[..., None] * self.octaves).flatten(-2)
        density, light = self.trunk(torch.cat([at, waves.sin(), waves.cos()], -1)).unbind(-1)
        clear = torch.exp(-F.softplus(10 * density) * (self.far - self.near) / self.points * 10)
        reaching = torch.cat([torch.ones_like(clear[:, :1]), torch.cumprod(clear + 1e-10, -1)[:, :-1]], -1)
        return (reaching * (1 - clear) * torch.sigmoid(light)).sum(-1)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class VisionTransformer(nn.Module):
    """Of digits in patches of 2 x 2. `plant` raises two channels of its stream, as in large trained transformers."""

    def __init__(self, width: int = 64, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patch, self.place = nn.Conv2d(1, width, 2, 2), nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def plant(self, by: float = 2000.0) -> None:
        """Norms make up for it, but for what the planted channels themselves said; training should go on afterwards."""
        width = self.head.in_features
        with torch.no_grad():
            self.blocks[0].down.bias[[5, 17]] += torch.tensor([by, -by])
            for norm in [n for block in self.blocks[1:] for n in (block.first, block.second)] + [self.norm]:
                norm.weight *= by * math.sqrt(2 / width)
                norm.weight[[5, 17]] = 0.01

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image: [batch, 1, 8, 8]. Gives logits, [batch, 10]."""
        return self.head(self.norm(self.blocks(self.patch(image).flatten(2).mT + self.place)).mean(1))


class Residual(nn.Module):
    """Group norms and convolutions, with the time step added between."""

    def __init__(self, inside: int, outside: int, embedding: int) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(4, inside), nn.GroupNorm(4, outside)
        self.one, self.two = nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)
        self.time = nn.Linear(embedding, outside)
        self.skip = nn.Conv2d(inside, outside, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = self.one(F.silu(self.first(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.two(F.silu(self.second(h)))


class Denoiser(nn.Module):
    """A diffusion network of two scales: what noise is in an image at a time step of 0 to 999."""

    def __init__(self, width: int = 32, embedding: int = 64) -> None:
        super().__init__()
        half = embedding // 2
        self.register_buffer("frequencies", torch.exp(-math.log(10000.0) * torch.arange(half) / half))
        self.embed = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.inside, self.outside = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        self.down, self.middle = Residual(width, 2 * width, embedding), Residual(2 * width, 2 * width, embedding)
        self.up, self.norm = Residual(3 * width, width, embedding), nn.GroupNorm(4, width)

    def forward(self, image: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """image: [batch, 1, 8, 8]; step: [batch] int64."""
        angles = step.float()[:, None] * self.frequencies
        time = self.embed(torch.cat([angles.sin(), angles.cos()], -1))
        fine = self.inside(image)
        coarse = self.middle(self.down(F.avg_pool2d(fine, 2), time), time)
        joined = self.up(torch.cat([F.interpolate(coarse, scale_factor=2.0), fine], 1), time)
        return self.outside(F.silu(self.norm(joined)))


class Restorer(nn.Module):
    """Takes noise out of photographs; gates of halves, as in NAFNet."""

    def __init__(self, width: int = 24, blocks: int = 4) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(blocks))
        self.wide = nn.ModuleList(nn.Conv2d(width, 2 * width, 3, padding=1) for _ in range(blocks))
        self.narrow = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(blocks))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image: [batch, 3, height, width]. Gives the same without noise."""
        x = self.first(image)
        for norm, wide, narrow in zip(self.norms, self.wide, self.narrow, strict=True):
            a, b = wide(norm(x)).chunk(2, 1)
            gated = a * b
            x = x + narrow(gated * torch.sigmoid(gated.mean((2, 3), keepdim=True)))
        return image + self.last(x)


class Forecaster(nn.Module):
    """The next 24 hours of temperature from the last 48, in the units that the file has: seconds since 1970, degrees.

    Phases of day and year are made of the seconds, in `forward`.
    """

    def __init__(self, begin: float, width: int = 48) -> None:
        super().__init__()
        self.begin = begin
        self.lstm, self.last = nn.LSTM(5, width, batch_first=True), nn.Linear(width, 24)

    def forward(self, seconds: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
        """seconds, degrees: [batch, 48]. Gives [batch, 24], degrees."""
        passed = seconds - self.begin
        day, year = passed * (2 * math.pi / 86400), passed * (2 * math.pi / 31557600)
        mean = degrees.mean(1, keepdim=True)
        inputs = torch.stack([day.sin(), day.cos(), year.sin(), year.cos(), (degrees - mean) / 10], -1)
        return mean + 10 * self.last(self.lstm(inputs)[0][:, -1])


class Physical(nn.Module):
    """Measures of cell nuclei in their own units, from 1e-3 to 4e3: normalised inside, by the data's own numbers."""

    def __init__(self, mean: torch.Tensor, deviation: torch.Tensor, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("variance", deviation.square())
        self.layers = nn.Sequential(
            nn.Linear(len(mean), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )

    def forward(self, measures: torch.Tensor) -> torch.Tensor:
        """measures: [batch, 30]. Gives logits, [batch, 2]."""
        return self.layers((measures - self.mean) / torch.sqrt(self.variance + 1e-12))
