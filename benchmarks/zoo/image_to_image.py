"""Networks that give images, fields or points: segmentation, restoration, diffusion, flow, radiance."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torch.export import Dim
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from benchmarks.networks import Restoration
from benchmarks.zoo.architecture import Architecture, Sample, awakened, settled
from benchmarks.zoo.convolutional import images, settled_sample


def _double(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True),
        nn.Conv2d(outside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    """Down with max pooling, up with transposed convolutions, skips joined by `cat`; any even image size."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        sizes = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList([_double(3, sizes[0]), _double(sizes[0], sizes[1]), _double(sizes[1], sizes[2])])
        self.raise_ = nn.ModuleList(nn.ConvTranspose2d(2 * s, s, 2, stride=2) for s in sizes[1::-1])
        self.up = nn.ModuleList(_double(2 * s, s) for s in sizes[1::-1])
        self.last = nn.Conv2d(width, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image: [batch, 3, height, width] to [batch, 2, height, width]."""
        x, skips = image, []
        for stage in self.down:
            x = stage(x if stage is self.down[0] else F.max_pool2d(x, 2))
            skips.append(x)
        for raised, stage, skip in zip(self.raise_, self.up, skips[-2::-1], strict=True):
            x = stage(torch.cat([skip, raised(x)], 1))
        return self.last(x)


class Denoiser(nn.Module):
    """A diffusion U-Net: sinusoidal time embedding, group norm, attention over pixels, nearest upsampling."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.first, self.down = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(3))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.last = nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, noisy: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """noisy: [batch, 3, height, width]; step: [batch] int64, 0 to 999."""
        frequencies = torch.exp(-4.0 * torch.arange(8, dtype=torch.float32) / 8)
        angles = step[:, None].float() * frequencies[None]
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        skip = self.first(noisy)
        x = self.down(skip)
        for norm, convolution in zip(self.norms, self.convolutions, strict=False):
            x = x + convolution(F.silu(norm(x) + time[:, :, None, None]))
        pixels = self.norms[2](x).flatten(2).transpose(1, 2)
        x = x + self.attention(pixels, pixels, pixels, need_weights=False)[0].transpose(1, 2).reshape(x.shape)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.last(torch.cat([x, skip], 1))


class Flow(nn.Module):
    """Optical flow in small: features, all-pairs correlation, a lookup by `grid_sample`, warping."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.InstanceNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.refine = nn.Conv2d(8 * 8 + 2, 2, 3, padding=1)

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """before, after: [batch, 3, 16, 16] to a flow [batch, 2, 8, 8], in pixels."""
        one, two = self.features(before), self.features(after)
        batch, channels, height, width = one.shape
        pairs = torch.einsum("bchw,bcuv->bhwuv", one, two) / channels**0.5
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        grid = torch.stack([columns, rows], -1).expand(batch, height, width, 2)
        flow = grid.new_zeros(batch, 2, height, width)
        for _ in range(2):
            costs = pairs.reshape(batch, height, width, -1).permute(0, 3, 1, 2)
            flow = flow + 0.1 * self.refine(torch.cat([costs, flow], 1))
            moved = F.grid_sample(two, grid + flow.permute(0, 2, 3, 1), align_corners=True)
            pairs = torch.einsum("bchw,bcuv->bhwuv", one, moved) / channels**0.5
        return flow


class Radiance(nn.Module):
    """A radiance field: positions as sines of growing frequency, densities to transmittance by `cumprod`."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(3 * 2 * 6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.density, self.colour = nn.Linear(32, 1), nn.Linear(32, 3)

    def forward(self, rays: torch.Tensor) -> dict[str, torch.Tensor]:
        """rays: [batch, samples, 3] points along rays."""
        angles = rays[..., None] * (2.0 ** torch.arange(6)) * torch.pi
        x = self.hidden(torch.cat([angles.sin(), angles.cos()], -1).flatten(-2))
        opacity = 1 - torch.exp(-F.softplus(self.density(x)[..., 0]) * 0.5)
        through = torch.cumprod(1 - opacity + 1e-4, -1)
        weights = opacity * torch.roll(through, 1, -1)
        return {"colour": (weights[..., None] * self.colour(x).sigmoid()).sum(-2), "opacity": weights.sum(-1)}


class Detector(nn.Module):
    """DETR in small: a backbone, an encoder-decoder transformer with learned queries, boxes and classes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 7, 4, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, width, 3, 2, 1)
        )
        self.rows, self.columns = (nn.Parameter(torch.randn(8, width // 2)) for _ in range(2))
        self.queries = nn.Parameter(torch.randn(5, width))
        self.transformer = nn.Transformer(width, 4, 1, 1, 64, batch_first=True)
        self.classes, self.boxes = nn.Linear(width, 4), nn.Linear(width, 4)

    def forward(self, image: torch.Tensor) -> dict[str, Any]:
        """image: [batch, 3, 64, 64]."""
        x = self.backbone(image)
        rows, columns = self.rows[:, None].expand(8, 8, -1), self.columns[None].expand(8, 8, -1)
        positions = torch.cat([columns, rows], -1).flatten(0, 1)
        queries = self.queries.expand(x.shape[0], -1, -1)
        found = self.transformer(positions + x.flatten(2).transpose(1, 2), queries)
        scores, best = self.classes(found).softmax(-1)[..., :-1].max(-1)
        return {"boxes": self.boxes(found).sigmoid(), "scores": scores, "labels": best}


def _lraspp() -> nn.Module:
    return torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4, width_mult=0.5
    )


def _hrnet() -> nn.Module:
    return timm.create_model("hrnet_w18_small", pretrained=False, features_only=True)


def _unet() -> Sample:
    model = settled(UNet(), torch.randn(8, 3, 32, 32))
    return Sample(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: Dim("batch", min=1, max=16)},))


def _diffusion_batch(index: int) -> dict[str, torch.Tensor]:
    return {"noisy": torch.randn(2, 3, 16, 16), "step": torch.randint(0, 1000, (2,))}


def _frames(index: int) -> list[torch.Tensor]:
    before = torch.randn(2, 3, 16, 16)
    return [before, before.roll(1, -1) + 0.1 * torch.randn(2, 3, 16, 16)]


def _rays(index: int) -> torch.Tensor:
    return torch.rand(6, 12, 3) * 2 - 1


IMAGE_TO_IMAGE = (
    Architecture(
        "unet", "image to image", _unet, images(2, 3, 32, 32),
        covers=("U-Net with skips", "dynamic batch", "in-place op"),
    ),
    Architecture(
        "diffusion_unet", "image to image",
        lambda: Sample(Denoiser().eval(), tuple(_diffusion_batch(0).values())), _diffusion_batch,
        covers=("U-Net with skips", "factory function", "user .to(dtype)"),
    ),
    Architecture("segmentation", "image to image", settled_sample(_lraspp), images(), covers=("dict outputs",)),
    Architecture("hrnet_features", "image to image", settled_sample(_hrnet), images()),
    Architecture("restoration", "image to image", lambda: Sample(awakened(Restoration(8)).eval(),
                 (torch.randn(1, 3, 32, 32),)), images(1, 3, 32, 32), covers=("multi-output op",)),
    Architecture("optical_flow", "image to image", lambda: Sample(Flow().eval(), tuple(_frames(0))), _frames,
                 covers=("factory function",)),
    Architecture("radiance_field", "image to image", lambda: Sample(Radiance().eval(), (_rays(0),)), _rays,
                 covers=("dict outputs", "factory function")),
    Architecture("detector", "image to image", settled_sample(Detector), images(),
                 covers=("dict outputs", "multi-output op")),
)  # fmt: skip
