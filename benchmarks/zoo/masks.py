"""Attention with a mask of every kind: boolean, -inf, large and finite; by hand and by the operator."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from benchmarks.zoo.architecture import Architecture, Sample
from benchmarks.zoo.parts import LENGTHS, SEQUENCE, WIDTH, heads, mlp


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


def _masked_batch(index: int) -> dict[str, torch.Tensor]:
    length = LENGTHS[index % 4]
    return {"x": torch.randn(2, length, WIDTH), "valid": torch.arange(length) < torch.tensor([[length], [length - 3]])}


def _masked(name: str, block: type[Masked], *covers: str) -> Architecture:
    shapes = {"x": SEQUENCE, "valid": SEQUENCE}
    return Architecture(
        name, "masks", lambda: Sample(block().eval(), (), _masked_batch(0), shapes), _masked_batch,
        covers=("two sequence lengths", "dynamic batch", "keyword inputs", "multi-output op", *covers),
    )  # fmt: skip


MASKS = (
    _masked("boolean_mask", BooleanMask, "boolean mask", "mask through scaled_dot_product_attention"),
    _masked("infinite_mask", InfiniteMask, "-inf mask", "factory function"),
    _masked("finite_mask", FiniteMask, "large finite mask", "user .to(dtype)"),
    _masked("finite_mask_attention", FiniteMaskThroughAttention, "large finite mask",
            "mask through scaled_dot_product_attention"),
    _masked("infinite_mask_attention", InfiniteMaskThroughAttention, "-inf mask", "in-place op",
            "mask through scaled_dot_product_attention"),
    _masked("top_mask", TopMask, "-inf mask", "large finite mask"),
)  # fmt: skip
