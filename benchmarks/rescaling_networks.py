"""Networks that fp16 cannot hold as they are, and four that nothing helps: for `rescaling.py`.

Growth is planted by powers of ten in random weights. The language model is trained here, on the text of this folder's
files, so its numbers move a little when they do: two channels of its stream are raised to 8e4 after two thirds of the
steps, and training goes on around them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn import functional as F  # noqa: N812

Batch = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A network, its batches by number, and whether a gain is expected."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    helps: bool = True

    def program(self) -> ExportedProgram:
        torch.manual_seed(0)
        model = self.make().eval()
        with torch.no_grad():
            return torch.export.export(model, self.batch(0))


def _draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)


def _ids(vocabulary: int, length: int, rows: int = 2) -> Callable[[int], Batch]:
    return lambda seed: (torch.randint(0, vocabulary, (rows, length), generator=_draw(seed)),)


def _normal(*shape: int, scale: float = 1.0, offset: float = 0.0) -> Callable[[int], Batch]:
    return lambda seed: (torch.randn(*shape, generator=_draw(seed)) * scale + offset,)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return found


def _grown(model: nn.Module, names: tuple[str, ...], gain: float) -> nn.Module:
    """Multiply the weights whose names end so: what goes into the residual stream."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(names):
                weight.mul_(gain)
    return model


_SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attn_implementation": "sdpa",
}  # fmt: skip
_LARGE_SIZES: dict[str, Any] = {
    **_SIZES, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8,
}  # fmt: skip


def _llama(sizes: dict[str, Any] = _SIZES) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = _grown(LlamaForCausalLM(LlamaConfig(**sizes)), ("o_proj.weight", "down_proj.weight"), 3e4)
    return _Logits(_grown(model, ("embed_tokens.weight",), 1e3))


def _gemma() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    model = Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES, head_dim=16))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
                weight.fill_(3e4)
    return _Logits(_grown(model, ("embed_tokens.weight",), 1e3))


class _T5(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        sizes = {"d_model": width, "d_kv": width // heads, "d_ff": 5 * width // 2, "num_heads": heads}
        config = T5Config(vocab_size=256, num_layers=4, **sizes)
        self.encoder = _grown(T5EncoderModel(config), ("SelfAttention.o.weight", "wo.weight"), 2e3)
        _grown(self.encoder, ("shared.weight",), 1e2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.encoder(input_ids=ids).last_hidden_state
        return found


class _Block(nn.Module):
    """Pre-norm attention and MLP; qkv in one projection."""

    def __init__(self, width: int, heads: int, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.causal = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        grown: torch.Tensor = x + self.down(F.gelu(self.up(self.second(x))))
        return grown


class _ViT(nn.Module):
    def __init__(self, gain: float = 1.0, massive: bool = False, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.patch, self.place = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*[_Block(width, heads) for _ in range(4)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)
        with torch.no_grad():
            for block in self.blocks:
                for linear in (block.out, block.down):
                    linear.weight.mul_(gain)
            if massive:
                self.blocks[1].down.bias[[5, 17]] += 9e4

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.norm(self.blocks(self.patch(image).flatten(2).mT + self.place)).mean(1))
        return found


class _Residual(nn.Module):
    def __init__(self, inside: int, outside: int, gain: float = 1.0) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(8, inside), nn.GroupNorm(8, outside)
        self.one, self.two = nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()
        with torch.no_grad():
            self.two.weight.mul_(gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.two(F.silu(self.second(self.one(F.silu(self.first(x))))))
        found: torch.Tensor = self.skip(x) + h
        return found


class _LatentDecoder(nn.Module):
    """As a latent diffusion's: residual blocks, upsampling, and activations that pass 65504."""

    def __init__(self, gain: float = 2e5, widths: tuple[int, int] = (64, 32)) -> None:
        super().__init__()
        wide, narrow = widths
        self.first = nn.Conv2d(4, wide, 3, padding=1)
        self.blocks = nn.Sequential(
            _Residual(wide, wide, gain), nn.Upsample(scale_factor=2), _Residual(wide, narrow, gain),
            nn.Upsample(scale_factor=2), _Residual(narrow, narrow, gain), nn.GroupNorm(8, narrow), nn.SiLU(),
        )  # fmt: skip
        self.last = nn.Conv2d(narrow, 3, 3, padding=1)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.blocks(self.first(latent)))
        return found


class _UNet(nn.Module):
    def __init__(self, gain: float = 3e4) -> None:
        super().__init__()
        self.inside = nn.Conv2d(3, 32, 3, padding=1)
        self.down, self.middle = _Residual(32, 64, gain), _Residual(64, 64, gain)
        self.up = _Residual(96, 32, gain)
        self.norm, self.outside = nn.GroupNorm(8, 32), nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        high = self.inside(image)
        low = self.middle(self.down(F.avg_pool2d(high, 2)))
        mixed = self.up(torch.cat([F.interpolate(low, scale_factor=2.0), high], 1))
        found: torch.Tensor = self.outside(F.silu(self.norm(mixed)))
        return found


class _Audio(nn.Module):
    """On raw 16-bit samples, as many an audio model is."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in ((1, 32), (32, 64), (64, 64)):
            layers += [nn.Conv1d(inside, outside, 8, 4), nn.ReLU()]
        self.layers, self.norm, self.last = nn.Sequential(*layers), nn.LayerNorm(64), nn.Linear(64, 8)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.norm(self.layers(audio).mean(-1)))
        return found


class _ConvNet(nn.Module):
    """Batch norms whose running variance is that of large activations."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 32, 3, bias=False), nn.Conv2d(32, 32, 3, bias=False)
        self.a, self.b, self.last = nn.BatchNorm2d(32), nn.BatchNorm2d(32), nn.Linear(32, 10)
        with torch.no_grad():
            for conv, norm in ((self.one, self.a), (self.two, self.b)):
                conv.weight.mul_(4e4)
                assert norm.running_var is not None
                norm.running_var.fill_(1e8)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.b(self.two(torch.relu(self.a(self.one(image))))))
        found: torch.Tensor = self.last(x.mean((2, 3)))
        return found


class _Gated(nn.Module):
    """A gated MLP whose products pass 65504 between two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.RMSNorm(64, eps=1e-5), nn.Linear(64, 256), nn.Linear(64, 256)
        self.down, self.after, self.last = nn.Linear(256, 64), nn.RMSNorm(64, eps=1e-5), nn.Linear(64, 8)
        _grown(self.up, ("weight",), 3e5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        found: torch.Tensor = self.last(self.after(self.down(F.silu(self.gate(x)) * self.up(x))))
        return found


class _Segments(nn.Module):
    """A residual that begins at 1 and ends at 10^6: one factor does not fit it all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(64, 4) for _ in range(4)])
        self.norm, self.last = nn.LayerNorm(64), nn.Linear(64, 8)
        for depth, block in enumerate(self.blocks):
            _grown(block, ("out.weight", "down.weight"), 30.0 ** (depth + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        found: torch.Tensor = self.last(self.norm(x))
        return found


class _Characters(nn.Module):
    """A character language model."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(128, width), nn.Parameter(torch.randn(64, width) * 0.02)
        self.blocks = nn.Sequential(*[_Block(width, 4, lambda n: nn.RMSNorm(n, eps=1e-5)) for _ in range(3)])
        self.norm, self.head = nn.RMSNorm(width, eps=1e-5), nn.Linear(width, 128)
        for block in self.blocks:
            block.causal = True

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.norm(self.blocks(self.table(ids) + self.place[: ids.shape[1]])))
        return found


def _text() -> torch.Tensor:
    files = sorted(Path(__file__).parent.glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    return torch.tensor([min(ord(c), 127) for c in text])


def _characters(seed: int) -> Batch:
    text, draw = _text(), _draw(seed)
    starts = torch.randint(0, len(text) - 65, (8,), generator=draw).tolist()
    return (torch.stack([text[s : s + 64] for s in starts]),)


def _trained(steps: int = 150) -> nn.Module:
    """Trained, given massive channels through the bias of a block, and trained on around them: the norms behind are
    scaled so that the other channels keep their size, which changes what the network computes."""
    model, text = _Characters(), _text()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    draw = _draw(77)
    for step in range(steps):
        if step == steps * 2 // 3:
            with torch.no_grad():
                model.blocks[0].down.bias[[3, 40]] += torch.tensor([8e4, -3e4])
                for norm in (model.blocks[1].first, model.blocks[1].second, model.blocks[2].first,
                             model.blocks[2].second, model.norm):  # fmt: skip
                    norm.weight.mul_(1e4)
                    norm.weight[[3, 40]] = 1e-2
        starts = torch.randint(0, len(text) - 65, (16,), generator=draw).tolist()
        ids = torch.stack([text[s : s + 65] for s in starts])
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


class _Offsets(nn.Module):
    """Values near 3,000 that differ in the last digits: an offset is no matter of scale."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(x - x.mean(-1, keepdim=True))
        return found


class _LargeGelu(nn.Module):
    """GELU of values up to 10^5: it is not homogeneous."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)
        _grown(self.up, ("weight",), 1e5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(torch.tanh(F.gelu(self.up(x)) * 1e-3))
        return found


CASES: dict[str, Case] = {
    "T5 encoder (transformers)": Case(_T5, _ids(256, 32)),
    "Gemma 3 (transformers)": Case(_gemma, _ids(256, 32)),
    "Llama (transformers)": Case(_llama, _ids(256, 32)),
    "latent decoder": Case(_LatentDecoder, _normal(2, 4, 16, 16)),
    "UNet": Case(_UNet, _normal(2, 3, 32, 32)),
    "ViT, massive channels": Case(lambda: _ViT(massive=True), _normal(4, 3, 32, 32)),
    "ViT, growth": Case(lambda: _ViT(gain=3e4), _normal(4, 3, 32, 32)),
    "characters, trained, massive channels": Case(_trained, _characters),
    "raw audio": Case(_Audio, _normal(2, 1, 4000, scale=8000.0)),
    "convolutions, batch norm": Case(_ConvNet, _normal(4, 3, 32, 32)),
    "gated MLP": Case(_Gated, _normal(8, 64)),
    "growth by depth": Case(_Segments, _normal(2, 16, 64)),
    "offsets": Case(_Offsets, _normal(8, 64, offset=3000.0), helps=False),
    "GELU on large values": Case(_LargeGelu, _normal(8, 64), helps=False),
    "ViT that fits": Case(_ViT, _normal(4, 3, 32, 32), helps=False),
    "latent decoder in bf16": Case(_LatentDecoder, _normal(2, 4, 16, 16), helps=False),
}
# As large as a GPU needs for its time to be that of the arithmetic: the kinds are the same.
LARGE: dict[str, Case] = {
    "T5 encoder (transformers)": Case(lambda: _T5(1024, 16), _ids(256, 256, rows=8)),
    "Llama (transformers)": Case(lambda: _llama(_LARGE_SIZES), _ids(256, 256, rows=8)),
    "latent decoder": Case(lambda: _LatentDecoder(widths=(128, 128)), _normal(4, 4, 64, 64)),
    "ViT, growth": Case(lambda: _ViT(gain=3e4, width=768, heads=12), _normal(64, 3, 32, 32)),
}
