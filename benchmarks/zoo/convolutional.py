"""Convolutional networks: what torchvision and timm have, made small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from timm.models import byobnet
from torch import nn
from torch.export import Dim

from benchmarks.zoo.architecture import Architecture, Sample, awakened, settled

IMAGE = (2, 3, 64, 64)


def images(*shape: int) -> Callable[[int], Any]:
    """Batches of images of zero mean and unit variance, as normalised ones are; later ones a little brighter."""

    def batch(index: int) -> torch.Tensor:
        return torch.randn(*(shape or IMAGE)) + 0.1 * index

    return batch


def labelled(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (images, labels) pair, as an image folder's loader gives."""
    return torch.randn(*IMAGE), torch.randint(0, 10, (IMAGE[0],))


def settled_sample(make: Callable[[], nn.Module], *shape: int, dynamic: bool = False) -> Callable[[], Sample]:
    """A sample whose batch norms have seen images of this shape; `dynamic` leaves the batch size open."""

    def sample() -> Sample:
        model = awakened(make()).eval()
        size = shape or IMAGE
        shapes = ({0: Dim("batch", min=1, max=64)},) if dynamic else None
        return Sample(settled(model, torch.randn(16, *size[1:])), (torch.randn(*size),), dynamic_shapes=shapes)

    return sample


def from_timm(name: str, *shape: int, dynamic: bool = False, **settings: Any) -> Callable[[], Sample]:
    """A timm model without weights, 10 classes."""
    return settled_sample(
        lambda: timm.create_model(name, pretrained=False, num_classes=10, **settings), *shape, dynamic=dynamic
    )


def varied_images(index: int) -> torch.Tensor:
    """Images whose number differs from batch to batch, as at the end of an epoch."""
    return torch.randn(1 + index % 3, *IMAGE[1:])


def _resnet() -> nn.Module:
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10)


def _densenet() -> nn.Module:
    return torchvision.models.DenseNet(growth_rate=8, block_config=(2, 3, 2, 2), num_init_features=16, num_classes=10)


def _shufflenet() -> nn.Module:
    return torchvision.models.ShuffleNetV2([1, 2, 1], [16, 24, 32, 48, 64], num_classes=10)


def _googlenet() -> nn.Module:
    return torchvision.models.googlenet(weights=None, num_classes=10, aux_logits=False, init_weights=False)


def _squeezenet() -> nn.Module:
    return torchvision.models.squeezenet1_1(weights=None, num_classes=10)


def _repvgg() -> nn.Module:
    """Blocks of three parallel branches, before they are merged for deployment."""
    blocks = tuple(byobnet.ByoBlockCfg(type="rep", d=2, c=c, s=2, gs=0, br=1.0) for c in (16, 24, 32, 48))
    return byobnet.ByobNet(byobnet.ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=16), num_classes=10)


def _video() -> nn.Module:
    from torchvision.models.video import resnet

    return resnet.VideoResNet(
        resnet.BasicBlock, [resnet.Conv2Plus1D] * 4, [1, 1, 1, 1], resnet.R2Plus1dStem, num_classes=10
    )


CONVOLUTIONAL = (
    Architecture(
        "resnet", "convolutional", settled_sample(_resnet, dynamic=True), varied_images,
        covers=("residual net", "in-place op", "dynamic batch"),
    ),
    Architecture("densenet", "convolutional", settled_sample(_densenet), images(), covers=("dense net",)),
    Architecture(
        "mobilenet_v3", "convolutional",
        from_timm("mobilenetv3_small_050", dynamic=True), labelled, lambda batch: batch[0],
        covers=("mobile net", "dynamic batch"),
    ),
    Architecture(
        "convnext", "convolutional",
        from_timm("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 32, 64, 96), ls_init_value=0.5), images(),
        covers=("ConvNeXt net",),
    ),
    Architecture("efficientnet", "convolutional", from_timm("test_efficientnet"), images()),
    Architecture("shufflenet", "convolutional", settled_sample(_shufflenet), images(), covers=("multi-output op",)),
    Architecture("googlenet", "convolutional", settled_sample(_googlenet), images()),
    Architecture("squeezenet", "convolutional", settled_sample(_squeezenet), images()),
    Architecture("video_resnet", "convolutional", settled_sample(_video, 1, 3, 4, 16, 16), images(1, 3, 4, 16, 16)),
    Architecture(
        "nfnet", "convolutional", from_timm("nf_regnet_b0", depths=(1, 1, 1, 1), channels=(16, 24, 32, 48)), images()
    ),
    Architecture("repvgg", "convolutional", settled_sample(_repvgg), images()),
    Architecture("ghostnet", "convolutional", from_timm("ghostnet_050"), images()),
    Architecture("res2net", "convolutional", from_timm("res2net50_26w_4s", layers=(1, 1, 1, 1)), images()),
    Architecture("coatnet", "convolutional", from_timm("test_coatnet", 1, 3, 160, 160), images(1, 3, 160, 160)),
    Architecture("mambaout", "convolutional", from_timm("test_mambaout"), images()),
)  # fmt: skip
