"""Plain PyTorch networks, each with what real models have and rewriting tools trip over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

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


class Masked(nn.Module):
    """A block of attention with a mask that subclasses make and use in a way of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), mlp()

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """q, k, v: [batch, heads, length, size]; valid: [batch, length] bool, True where there is a token."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        q, k, v = (heads(part) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(self.attend(q, k, v, valid).transpose(1, 2).flatten(2))
        return x + self.mlp(self.after(x))


class BooleanMask(Masked):
    """A boolean mask given to `scaled_dot_product_attention` as it is."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :])


class InfiniteMask(Masked):
    """Scores filled with -inf, causal and padded, softmax by hand."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        length = q.shape[2]
        causal = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
        return scores.masked_fill(causal | ~valid[:, None, None, :], float("-inf")).softmax(-1) @ v


class FiniteMask(Masked):
    """The most negative float added to scores, as much model code does."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        bias = (1.0 - valid[:, None, None, :].to(q.dtype)) * torch.finfo(torch.float32).min
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v


class FiniteMaskThroughAttention(Masked):
    """A float mask of -1e9, made by `where`, into `scaled_dot_product_attention`."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        bias = torch.where(valid, 0.0, -1e9)[:, None, None, :].expand(-1, 1, q.shape[2], -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class InfiniteMaskThroughAttention(Masked):
    """A float mask of -inf, filled in place, into `scaled_dot_product_attention`."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros(valid.shape[0], 1, 1, valid.shape[1])
        bias.masked_fill_(~valid[:, None, None, :], float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class TopMask(Masked):
    """Only the largest three scores of each row are kept: topk, a threshold, `where` with -inf."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~valid[:, None, None, :], -1e4)
        least = scores.topk(3, -1).values[..., -1:]
        return torch.where(scores < least, float("-inf"), scores).softmax(-1) @ v


class AutocastRegions(nn.Module):
    """`torch.autocast` regions as training left them: on, off, and off inside on."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (mlp() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 32]."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.one(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            z = self.two(y.float()) + x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inner = self.three(z)
            with torch.autocast("cpu", enabled=False):
                inner = inner.float() * z
        return self.four(inner + z)


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


class ComplexRotary(nn.Module):
    """Rotary positions by complex numbers, as the first Llama code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        angles = torch.outer(torch.arange(64.0), 100.0 ** -(torch.arange(0, 8, 2) / 8))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, length, 32]."""
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        attended = F.scaled_dot_product_attention(self._turned(q), self._turned(k), v, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.turns[: x.shape[2]]).flatten(-2).type_as(x)


class SpectralMixer(nn.Module):
    """A Fourier neural operator: modes kept and multiplied by complex weights, and a plain path beside."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.skip, self.project = nn.Linear(2, 16), nn.Conv1d(16, 16, 1), mlp(16, 1)
        self.weight = nn.Parameter(torch.randn(16, 16, 6, dtype=torch.complex64) / 16)

    def forward(self, field: torch.Tensor) -> torch.Tensor:
        """field: [batch, points, 2]."""
        x = self.lift(field).transpose(1, 2)
        modes = torch.fft.rfft(x)
        kept = torch.einsum("bix,iox->box", modes[..., :6], self.weight)
        mixed = torch.fft.irfft(F.pad(kept, (0, modes.shape[-1] - 6)), n=x.shape[-1])
        return self.project(F.gelu(mixed + self.skip(x)).transpose(1, 2))


class DoubleClock(nn.Module):
    """Epoch seconds in float64, reduced to phases there, and an fp32 network on top."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(8, 3)
        self.register_buffer("periods", torch.tensor([60.0, 3600.0, 86400.0, 604800.0], dtype=torch.float64))

    def forward(self, seconds: torch.Tensor) -> torch.Tensor:
        """seconds: [batch] float64."""
        phase = torch.remainder(seconds[:, None], self.periods) / self.periods * (2 * torch.pi)
        return self.net(torch.cat([phase.sin(), phase.cos()], -1).to(torch.float32))


class PartlyHalf(nn.Module):
    """A model that somebody has converted in part: an fp16 trunk between fp32 ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.trunk, self.last = mlp(), mlp().half(), nn.Linear(WIDTH, 5)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 32]."""
        return self.last(self.norm(self.trunk(self.first(x).half()).float() + x))


class StatedTypes(nn.Module):
    """Conversions that the user wrote: a softmax and an RMS norm in float32, an output in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [batch, length, 32]."""
        q, k, v = self.qkv(self._normed(x)).split(WIDTH, -1)
        weights = F.softmax(q @ k.transpose(1, 2) / WIDTH**0.5, dim=-1, dtype=torch.float32).to(q.dtype)
        y = x + self.out(weights @ v)
        return self._normed(y), y.mean(1).to(torch.float16)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        return self.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Factories(nn.Module):
    """Positions, masks, grids and one-hot codes made inside: `arange`, `linspace`, `eye`, `full`, `zeros`, `ones`."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.gate = mlp(WIDTH + 6), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        """x: [batch, length, 32]; kind: [batch] int64 below 4."""
        batch, length, _ = x.shape
        place = (torch.arange(length) / length)[:, None].expand(batch, length, 1)
        ramp = torch.linspace(0, 1, WIDTH) + torch.full((WIDTH,), 0.5)
        codes = F.one_hot(kind, 4).float()[:, None].expand(batch, length, 4)
        decay = 0.9 ** (torch.arange(length)[:, None] - torch.arange(length)[None]).abs()
        mixed = (torch.tril(decay) + torch.eye(length)) @ (x * ramp)
        y = self.net(torch.cat([mixed, place, codes, torch.ones(batch, length, 1)], -1))
        return y * torch.cat([self.gate(y).softmax(-1), torch.zeros(batch, length, WIDTH - 4)], -1)


class SharedParameters(nn.Module):
    """One block run three times, and an output layer that is the embedding, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.block, self.norm = nn.Embedding(40, WIDTH), mlp(), nn.RMSNorm(WIDTH)
        self.bias = nn.Parameter(torch.zeros(40))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [batch, length]."""
        x = self.words(ids)
        for _ in range(3):
            x = x + self.block(self.norm(x))
        return F.linear(x, self.words.weight, self.bias)


@torch.library.custom_op("calibcast_zoo::swish_gate", mutates_args=())
def swish_gate(x: torch.Tensor, gate: torch.Tensor, strength: float) -> torch.Tensor:
    """A kernel of the user's own, for fp32 alone."""
    if x.dtype != torch.float32:
        raise RuntimeError(f"swish_gate is compiled for float32, got {x.dtype}")
    return x * torch.sigmoid(strength * gate)


@swish_gate.register_fake
def _(x: torch.Tensor, gate: torch.Tensor, strength: float) -> torch.Tensor:
    return torch.empty_like(x)


class CustomOperator(nn.Module):
    """A network with an operator registered with `torch.library` in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 32]."""
        value, gate = self.wide(x).chunk(2, -1)
        return self.last(swish_gate(value, gate, 1.5))


@dataclass
class Prediction:
    """What a model of two heads gives."""

    classes: torch.Tensor
    boxes: torch.Tensor
    loss: torch.Tensor


torch.export.register_dataclass(Prediction, serialized_type_name="calibcast_zoo.Prediction")


class NestedInputs(nn.Module):
    """Inputs as detection code passes them: a dict of lists and tuples, a flag, and a dataclass back."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Conv2d(c, 16, 3, padding=1) for c in (3, 1))
        self.classes, self.boxes = nn.Linear(17, 4), nn.Linear(17, 4)

    def forward(self, inputs: dict[str, Any], *, sizes: torch.Tensor, normalise: bool = True) -> Prediction:
        """inputs: {"views": [colour, grey], "prior": (mean, deviation)}; sizes: [batch, 1]."""
        mean, deviation = inputs["prior"]
        pooled = sum(
            F.adaptive_max_pool2d(F.relu(stem((view - mean) / deviation)), 1).flatten(1)
            for stem, view in zip(self.stems, inputs["views"], strict=True)
        )
        x = torch.cat([F.layer_norm(pooled, (16,)) if normalise else pooled, sizes.float()], 1)
        classes = self.classes(x)
        return Prediction(classes, self.boxes(x).exp(), F.cross_entropy(classes, classes.argmax(-1)))


class ManyOutputs(nn.Module):
    """Operators with several outputs: split, unbind, topk, sort, max over a dimension, var_mean, aminmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(2 * WIDTH, 7)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x: [batch, length, 32]."""
        a, b, c = self.first(x).split(WIDTH, -1)
        variance, mean = torch.var_mean(a, -1, keepdim=True)
        peak, place = b.max(1, keepdim=True)
        low, high = torch.aminmax(c, dim=-1, keepdim=True)
        mixed = torch.cat([(a - mean) / (variance + 0.1).sqrt() + peak, (c - low) / (high - low + 0.1)], -1)
        scores = self.last(mixed)
        values, order = scores.topk(3, -1)
        return scores, values, order, place, torch.stack(x.unbind(1)[:2]).sum(0)


class MixtureOfExperts(nn.Module):
    """Each token goes to two of four experts: topk, gather of stacked weights, `bmm`."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.up = nn.Parameter(torch.randn(4, WIDTH, 2 * WIDTH) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(4, 2 * WIDTH, WIDTH) * (2 * WIDTH) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, length, 32]."""
        tokens = x.flatten(0, 1)
        weight, chosen = self.router(tokens).softmax(-1).topk(2, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        hidden = F.silu(torch.einsum("td,tkdh->tkh", tokens, self.up[chosen]))
        found = torch.einsum("tkh,tkhd->tkd", hidden, self.down[chosen])
        return (weight[..., None] * found).sum(1).view_as(x)


class StateSpace(nn.Module):
    """A diagonal state-space layer as a long convolution: exponents of a ramp, `cumsum` of gates."""

    def __init__(self) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.linspace(-3, 0, 8))
        self.into, self.out, self.gate = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, length, 4]."""
        length = x.shape[1]
        lag = torch.arange(length)[:, None] - torch.arange(length)[None]
        kernel = torch.exp(-self.log_rate.exp()[:, None, None] * lag.clamp(min=0)) * (lag >= 0)
        state = torch.einsum("nts,bsn->btn", kernel, self.into(x))
        forget = F.logsigmoid(self.gate(x)).cumsum(1).exp()
        return self.out(state * F.silu(self.gate(x)) + state * forget)


def _sequence(index: int) -> torch.Tensor:
    return torch.randn(2, LENGTHS[index % 4], WIDTH)


def _masked_batch(index: int) -> dict[str, torch.Tensor]:
    length = LENGTHS[index % 4]
    return {"x": torch.randn(2, length, WIDTH), "valid": torch.arange(length) < torch.tensor([[length], [length - 3]])}


def _rows(index: int) -> torch.Tensor:
    return torch.randn(4 + index, WIDTH)


def _masked(name: str, block: type[Masked], *covers: str) -> Architecture:
    shapes = {"x": SEQUENCE, "valid": SEQUENCE}
    return Architecture(
        name, "masks", lambda: Sample(block().eval(), (), _masked_batch(0), shapes), _masked_batch,
        covers=("two sequence lengths", "dynamic batch", "keyword inputs", "multi-output op", *covers),
    )  # fmt: skip


def _plain(name: str, model: type[nn.Module], batch: Any, sizes: Any, *covers: str) -> Architecture:
    """An entry of one positional input, `sizes` of it dynamic."""
    shapes = None if sizes is None else (sizes,)
    return Architecture(
        name, "features", lambda: Sample(model().eval(), (batch(0),), dynamic_shapes=shapes), batch, covers=covers
    )


def _kinds(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _sequence(index), torch.randint(0, 4, (2,))


def _step(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 1, WIDTH), torch.tensor([3 + index])


def _scene(index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A pair of positional and keyword arguments, nested as the model takes them."""
    prior = (torch.tensor(0.1), torch.tensor(1.2))
    views = [torch.randn(2, 3, 12, 12), torch.randn(2, 1, 12, 12)]
    return ({"views": views, "prior": prior},), {"sizes": torch.randint(1, 9, (2, 1)), "normalise": True}


FEATURES = (
    _masked("boolean_mask", BooleanMask, "boolean mask", "mask through scaled_dot_product_attention"),
    _masked("infinite_mask", InfiniteMask, "-inf mask", "factory function"),
    _masked("finite_mask", FiniteMask, "large finite mask", "user .to(dtype)"),
    _masked("finite_mask_attention", FiniteMaskThroughAttention, "large finite mask",
            "mask through scaled_dot_product_attention"),
    _masked("infinite_mask_attention", InfiniteMaskThroughAttention, "-inf mask", "in-place op",
            "mask through scaled_dot_product_attention"),
    _masked("top_mask", TopMask, "-inf mask", "large finite mask"),
    _plain("autocast_regions", AutocastRegions, _rows, {0: BATCH}, "autocast region enabled",
           "autocast region disabled", "autocast region nested", "dynamic batch"),
    Architecture("key_cache", "features", lambda: Sample(KeyCache().eval(), _step(0)), _step,
                 covers=("in-place op on a buffer", "in-place op on a view", "boolean mask", "multi-output op")),
    _plain("running_norm", RunningNorm, _rows, {0: BATCH}, "in-place op on a buffer", "dynamic batch"),
    _plain("view_writes", ViewWrites, lambda i: torch.randn(2, 3, 16, 16), None, "in-place op on a view"),
    _plain("complex_rotary", ComplexRotary, _sequence, SEQUENCE, "complex part", "rotary positions",
           "two sequence lengths", "user .to(dtype)", "dynamic batch"),
    _plain("fourier_operator", SpectralMixer, lambda i: torch.randn(2, 24, 2).cumsum(1), None, "complex part"),
    _plain("double_clock", DoubleClock, lambda i: 1.7e9 + 1e5 * torch.rand(6, dtype=torch.float64), None,
           "float64 part", "user .to(dtype)"),
    _plain("partly_half", PartlyHalf, _rows, {0: BATCH}, "partly in half", "user .to(dtype)", "dynamic batch"),
    _plain("stated_types", StatedTypes, _sequence, SEQUENCE, "user .to(dtype)", "two sequence lengths",
           "multi-output op", "dynamic batch"),
    Architecture("factories", "features", lambda: Sample(Factories().eval(), _kinds(0), {}, (SEQUENCE, {0: BATCH})),
                 _kinds, covers=("factory function", "user .to(dtype)", "two sequence lengths", "dynamic batch")),
    _plain("shared_parameters", SharedParameters, lambda i: torch.randint(0, 40, (2, LENGTHS[i % 4])), SEQUENCE,
           "shared parameters", "token ids", "two sequence lengths", "dynamic batch"),
    _plain("custom_operator", CustomOperator, _rows, {0: BATCH}, "custom op", "multi-output op", "dynamic batch"),
    Architecture("nested_inputs", "features", lambda: Sample(NestedInputs().eval(), *_scene(0)), _scene,
                 covers=("nested inputs", "dict inputs", "keyword inputs", "dataclass outputs", "scalar output")),
    _plain("many_outputs", ManyOutputs, lambda i: torch.randn(2 + i, 12, WIDTH), {0: BATCH},
           "multi-output op", "dynamic batch"),
    _plain("mixture_of_experts", MixtureOfExperts, _sequence, SEQUENCE, "multi-output op", "two sequence lengths",
           "dynamic batch"),
    _plain("state_space", StateSpace, lambda i: torch.randn(2, LENGTHS[i % 4], 4), SEQUENCE, "state-space model",
           "factory function", "two sequence lengths", "dynamic batch"),
)  # fmt: skip
