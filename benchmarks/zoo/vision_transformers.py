"""Vision transformers, mixers and hybrids: plain, windowed, with learned, relative and rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torchvision
from timm.layers import GatedMlp, GroupNorm1
from timm.models import metaformer, mlp_mixer, volo
from torch import nn

from benchmarks.zoo.architecture import Architecture, Sample
from benchmarks.zoo.convolutional import from_timm, images, settled_sample, varied_images

SMALL: dict[str, Any] = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}


def _swin_v2() -> nn.Module:
    return torchvision.models.swin_transformer.SwinTransformer(
        patch_size=[4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=10,
        block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
    )  # fmt: skip


def _maxvit() -> nn.Module:
    return torchvision.models.MaxVit(
        input_size=(64, 64), stem_channels=16, partition_size=4, block_channels=[16, 32], block_layers=[1, 1],
        head_dim=8, stochastic_depth_prob=0.0, num_classes=10,
    )  # fmt: skip


def _mixer() -> nn.Module:
    return mlp_mixer.MlpMixer(num_classes=10, img_size=64, num_blocks=2, embed_dim=48)


def _gmlp() -> nn.Module:
    return mlp_mixer.MlpMixer(
        num_classes=10, img_size=64, num_blocks=2, embed_dim=48, mlp_ratio=6,
        block_layer=mlp_mixer.SpatialGatingBlock, mlp_layer=GatedMlp,
    )  # fmt: skip


def _poolformer() -> nn.Module:
    return metaformer.MetaFormer(
        depths=(1, 1, 1, 1), dims=(16, 24, 32, 48), num_classes=10, downsample_norm=None, mlp_act=nn.GELU,
        mlp_bias=True, norm_layers=GroupNorm1, layer_scale_init_values=0.5, res_scale_init_values=None,
        use_mlp_head=False,
    )  # fmt: skip


def _volo() -> nn.Module:
    return volo.VOLO(
        layers=[1, 1, 1, 1], img_size=64, num_classes=10, embed_dims=[24, 48, 48, 48], num_heads=[2, 4, 4, 4],
        stem_hidden_dim=16,
    )  # fmt: skip


def _plain(name: str, **settings: Any) -> Callable[[], Sample]:
    return from_timm(name, **{**SMALL, **settings})


VISION_TRANSFORMERS = (
    Architecture(
        "vit", "vision transformer", from_timm("vit_tiny_patch16_224", dynamic=True, **SMALL),
        varied_images, covers=("plain vision transformer", "learned positions", "dynamic batch"),
    ),
    Architecture("deit_distilled", "vision transformer", _plain("deit_tiny_distilled_patch16_224"), images()),
    Architecture("beit", "vision transformer", _plain("beit_base_patch16_224", init_values=0.5), images()),
    Architecture("cait", "vision transformer", _plain("cait_xxs24_224", init_values=0.5, patch_size=16), images()),
    Architecture("xcit", "vision transformer", _plain("xcit_nano_12_p16_224", eta=0.5, patch_size=16), images()),
    Architecture(
        "eva", "vision transformer", _plain("eva02_tiny_patch14_224", patch_size=16), images(),
        covers=("rotary positions",),
    ),
    Architecture(
        "swin", "vision transformer",
        from_timm("swin_tiny_patch4_window7_224", img_size=64, embed_dim=24, depths=(2, 2), num_heads=(2, 4),
                  window_size=4),
        images(), covers=("windowed vision transformer",),
    ),
    Architecture(
        "swin_v2", "vision transformer", settled_sample(_swin_v2), images(), covers=("windowed vision transformer",),
    ),
    Architecture("maxvit", "vision transformer", settled_sample(_maxvit), images()),
    Architecture("mixer", "vision transformer", settled_sample(_mixer), images()),
    Architecture("gmlp", "vision transformer", settled_sample(_gmlp), images(), covers=("multi-output op",)),
    Architecture("poolformer", "vision transformer", settled_sample(_poolformer), images()),
    Architecture(
        "levit", "vision transformer",
        from_timm("levit_128s", embed_dim=(32, 48, 64), depth=(1, 1, 1), num_heads=(2, 3, 4), key_dim=8, img_size=64),
        images(),
    ),
    Architecture("mobilevit", "vision transformer", from_timm("mobilevit_xxs"), images()),
    Architecture(
        "edgenext", "vision transformer", from_timm("edgenext_xx_small", ls_init_value=0.5), images(),
        covers=("factory function",),
    ),
    Architecture("volo", "vision transformer", settled_sample(_volo), images()),
    Architecture(
        "sequencer", "vision transformer",
        from_timm("sequencer2d_s", layers=(1, 1, 1, 1), embed_dims=(24, 32, 32, 32), hidden_sizes=(8, 8, 8, 8)),
        images(), covers=("LSTM",),
    ),
)  # fmt: skip
