"""The steps that a random program is made of: what each does to the tensors that there are so far.

Every step keeps to one rule: the float tensors that it adds are fp32 [batch, 4, 8] and of order 1, so that any step
may follow any other. Inside a step everything is allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

BATCH, ROWS, WIDTH, WORDS = 3, 4, 8, 16


@dataclass
class Values:
    """What a random program has computed so far. All of `floats` are fp32 [batch, 4, 8]."""

    floats: list[torch.Tensor]
    ids: torch.Tensor  # int64 [batch, 4], 0 to 15
    mask: torch.Tensor  # bool [batch, 4, 1]
    extras: list[Any] = field(default_factory=list)


class Layers(nn.Module):
    """Weights of all kinds for the steps to use: shared, half, double, 0-dimensional, buffers that steps write into."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.tied = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.linear.weight
        self.half_linear = nn.Linear(WIDTH, WIDTH).half()
        self.double_linear = nn.Linear(WIDTH, WIDTH).double()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm, self.batch_norm, self.group_norm = nn.LayerNorm(WIDTH), nn.BatchNorm1d(ROWS), nn.GroupNorm(2, ROWS)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.bag = nn.EmbeddingBag(WORDS, WIDTH, mode="sum")
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.temperature = nn.Parameter(torch.tensor(1.25))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))
        self.register_buffer("running", torch.full((WIDTH,), 0.5))
        self.register_buffer("memory", torch.zeros(ROWS, WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("half_scale", torch.linspace(0.5, 1.5, WIDTH).bfloat16())
        self.register_buffer("causal", torch.full((ROWS, ROWS), -torch.inf).triu(1))
        self.register_buffer("table", torch.randn(WORDS, WIDTH), persistent=False)


Step = Callable[[Layers, Values, torch.Tensor, torch.Tensor], None]
Pure = Callable[[Layers, torch.Tensor, torch.Tensor], torch.Tensor]


def pure(function: Pure) -> Step:
    """A step that appends what `function(layers, a, b)` gives."""

    def step(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
        values.floats.append(function(layers, a, b))

    return step


def _attention(_: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(a, b, b)


def _split_cat(_: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    first, second = a.split(WIDTH // 2, -1)
    return torch.cat([second, b[..., : WIDTH // 2], first], -1)[..., :WIDTH]


def _conv(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return layers.conv(a.transpose(1, 2)).transpose(1, 2)


def _matmul(_: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.matmul(torch.tanh(torch.matmul(a, b.transpose(1, 2)) * 0.1), a)


def _stack(_: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.stack([row * 0.5 for row in a.unbind(1)], 1)


def _chunk(_: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    value, gate = torch.cat([a, b], -1).chunk(2, -1)
    return value * torch.sigmoid(gate)


def _var_mean(_: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(a, -1, keepdim=True)
    return (a - mean) / (variance + 0.1).sqrt()


def _gru(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return layers.gru(a)[0] + b


def _lstm(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    outputs, (hidden, cell) = layers.lstm(a)
    return outputs + hidden.transpose(0, 1) + cell.transpose(0, 1)


def _aminmax(_: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(a, dim=-1, keepdim=True)
    return (a - low) / (high - low + 1.0)


def _fft(_: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.fft.irfft(torch.fft.rfft(a) * 0.5, n=WIDTH) + b


def _rotary(_: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(a.reshape(-1, ROWS, WIDTH // 2, 2).contiguous())
    turned = pairs * torch.polar(torch.ones(WIDTH // 2), torch.arange(WIDTH // 2) * 0.3)
    return torch.view_as_real(turned).flatten(2)


def _inverse_frequencies(_: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    angles = torch.outer(torch.arange(ROWS).float(), 1.0 / 10.0 ** (torch.arange(0, WIDTH, 2).float() / WIDTH))
    return a + torch.cat([angles.sin(), angles.cos()], -1)


def _broadcast(_: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    row, column = torch.broadcast_tensors(a.mean(1, keepdim=True), b)
    return row + column


PURE: dict[str, Pure] = {
    "relu": lambda m, a, b: torch.relu(a),
    "tanh": lambda m, a, b: torch.tanh(a),
    "gelu": lambda m, a, b: F.gelu(a),
    "add": lambda m, a, b: a + b,
    "shift": lambda m, a, b: a + 1.5,
    "gate": lambda m, a, b: a * torch.sigmoid(b),
    "divide": lambda m, a, b: a / (1 + b.abs()),
    "clamp": lambda m, a, b: a.clamp(-2, 2),
    "maximum": lambda m, a, b: torch.maximum(a, b),
    "lerp": lambda m, a, b: torch.lerp(a, b, 0.25),
    "addcmul": lambda m, a, b: torch.addcmul(a, torch.tanh(a), torch.tanh(b), value=0.5),
    "linear": lambda m, a, b: m.linear(a),
    "tied": lambda m, a, b: m.tied(a),
    "unembed": lambda m, a, b: torch.tanh(a @ m.embedding.weight.T) @ m.embedding.weight * 0.2,
    "conv": _conv,
    "matmul": _matmul,
    "einsum": lambda m, a, b: torch.einsum("bij,kj->bik", a, m.linear.weight),
    "attention": _attention,
    "softmax": lambda m, a, b: torch.softmax(a, -1),
    "layer_norm": lambda m, a, b: m.norm(a),
    "batch_norm": lambda m, a, b: m.batch_norm(a),
    "group_norm": lambda m, a, b: m.group_norm(a),
    "mean": lambda m, a, b: a.mean(-1, keepdim=True) + b,
    "scalar_mean": lambda m, a, b: a * torch.sigmoid(b.mean()),
    "sum_dtype": lambda m, a, b: a.sum(-1, keepdim=True, dtype=torch.float32) * 0.1 + b,
    "softmax_dtype": lambda m, a, b: torch.softmax(a, -1, dtype=torch.float32),
    "cumsum": lambda m, a, b: a.cumsum(1) * 0.25,
    "scale": lambda m, a, b: a * m.scale,
    "temperature": lambda m, a, b: torch.tanh(a / m.temperature) + m.temperature,
    "view": lambda m, a, b: a.reshape(-1, ROWS * WIDTH).relu().view(-1, ROWS, WIDTH),
    "permute": lambda m, a, b: (a.permute(2, 0, 1) * 0.5).permute(1, 2, 0),
    "slice_cat": lambda m, a, b: torch.cat([a[:, :1], b[:, 1:]], 1),
    "split_cat": _split_cat,
    "chunk": _chunk,
    "stack": _stack,
    "expand": lambda m, a, b: a[:, :1].expand(-1, ROWS, -1) + b,
    "broadcast": _broadcast,
    "flip": lambda m, a, b: a.flip(1),
    "clone": lambda m, a, b: a.clone(),
    "var_mean": _var_mean,
    "aminmax": _aminmax,
    "gru": _gru,
    "lstm": _lstm,
    "zeros": lambda m, a, b: a + torch.zeros(WIDTH),
    "zeros_of_batch": lambda m, a, b: torch.cat([a, torch.zeros(a.shape[0], 1, WIDTH)], 1)[:, 1:],
    "eye": lambda m, a, b: a @ torch.eye(WIDTH),
    "linspace": lambda m, a, b: a * torch.linspace(0.5, 1, WIDTH),
    "tensor": lambda m, a, b: a * torch.tensor([0.5, 1.0] * (WIDTH // 2)),
    "arange": lambda m, a, b: a * torch.arange(1.0, WIDTH + 1) * 0.2,
    "full": lambda m, a, b: a + torch.full((ROWS, 1), 0.25, dtype=torch.float32),
    "zeros_like": lambda m, a, b: torch.zeros_like(a) + b,
    "new_ones": lambda m, a, b: a.new_ones(WIDTH) + b,
    "full_like_dtype": lambda m, a, b: torch.full_like(a, 0.5, dtype=torch.float32) * b,
    "int_arange": lambda m, a, b: a + torch.arange(WIDTH) * 0.1,
    "frequencies": _inverse_frequencies,
    "size": lambda m, a, b: a * (a.shape[0] / (a.shape[0] + 1)),
    "to_half": lambda m, a, b: a.to(torch.float16).to(torch.float32),
    "half_math": lambda m, a, b: (a.half() * 2).float() + b,
    "half_weights": lambda m, a, b: m.half_linear(a.half()).float(),
    "half_buffer": lambda m, a, b: (a.bfloat16() * m.half_scale).float() + b,
    "half_promotes": lambda m, a, b: a * m.half_scale,
    "to_float": lambda m, a, b: a.to(torch.float32) + b,
    "type_as": lambda m, a, b: a.type_as(b) * 0.5,
    "to_other": lambda m, a, b: m.linear(a).to(b) + b,
    "double": lambda m, a, b: a.double().mul(0.5).float(),
    "double_weights": lambda m, a, b: m.double_linear(a.double()).float(),
    "fft": _fft,
    "rotary": _rotary,
    "custom": lambda m, a, b: torch.ops.calibcast_fuzz.scaled(a, 0.5),
}


@torch.library.custom_op("calibcast_fuzz::scaled", mutates_args=())
def _scaled(x: torch.Tensor, by: float) -> torch.Tensor:
    """A user's own operator, which has only fp32."""
    if x.dtype != torch.float32:
        raise TypeError(f"scaled takes float32, not {x.dtype}")
    return x * by


@_scaled.register_fake
def _(x: torch.Tensor, by: float) -> torch.Tensor:
    return torch.empty_like(x)
