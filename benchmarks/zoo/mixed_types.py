"""Networks with types of their own: autocast regions, half, float64, complex, stated types, custom operators."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from benchmarks.zoo.parts import BATCH, SEQUENCE, WIDTH, heads, mlp, plain, rows, sequence


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


MIXED_TYPES = (
    plain("autocast_regions", AutocastRegions, rows, {0: BATCH}, "autocast region enabled",
          "autocast region disabled", "autocast region nested", "dynamic batch"),
    plain("complex_rotary", ComplexRotary, sequence, SEQUENCE, "complex part", "rotary positions",
          "two sequence lengths", "user .to(dtype)", "dynamic batch"),
    plain("fourier_operator", SpectralMixer, lambda i: torch.randn(2, 24, 2).cumsum(1), None, "complex part"),
    plain("double_clock", DoubleClock, lambda i: 1.7e9 + 1e5 * torch.rand(6, dtype=torch.float64), None,
          "float64 part", "user .to(dtype)"),
    plain("partly_half", PartlyHalf, rows, {0: BATCH}, "partly in half", "user .to(dtype)", "dynamic batch"),
    plain("stated_types", StatedTypes, sequence, SEQUENCE, "user .to(dtype)", "two sequence lengths",
          "multi-output op", "dynamic batch"),
    plain("custom_operator", CustomOperator, rows, {0: BATCH}, "custom op", "multi-output op", "dynamic batch"),
)  # fmt: skip
