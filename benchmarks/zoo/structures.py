"""Networks of unusual structure: factories, shared weights, nested inputs, many outputs, experts, state spaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from benchmarks.zoo.architecture import Architecture, Sample
from benchmarks.zoo.parts import BATCH, LENGTHS, SEQUENCE, WIDTH, mlp, plain, sequence


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


def _kinds(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    return sequence(index), torch.randint(0, 4, (2,))


def _scene(index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A pair of positional and keyword arguments, nested as the model takes them."""
    prior = (torch.tensor(0.1), torch.tensor(1.2))
    views = [torch.randn(2, 3, 12, 12), torch.randn(2, 1, 12, 12)]
    return ({"views": views, "prior": prior},), {"sizes": torch.randint(1, 9, (2, 1)), "normalise": True}


STRUCTURES = (
    Architecture("factories", "features", lambda: Sample(Factories().eval(), _kinds(0), {}, (SEQUENCE, {0: BATCH})),
                 _kinds, covers=("factory function", "user .to(dtype)", "two sequence lengths", "dynamic batch")),
    plain("shared_parameters", SharedParameters, lambda i: torch.randint(0, 40, (2, LENGTHS[i % 4])), SEQUENCE,
          "shared parameters", "token ids", "two sequence lengths", "dynamic batch"),
    Architecture("nested_inputs", "features", lambda: Sample(NestedInputs().eval(), *_scene(0)), _scene,
                 covers=("nested inputs", "dict inputs", "keyword inputs", "dataclass outputs", "scalar output")),
    plain("many_outputs", ManyOutputs, lambda i: torch.randn(2 + i, 12, WIDTH), {0: BATCH}, "multi-output op",
          "dynamic batch"),
    plain("mixture_of_experts", MixtureOfExperts, sequence, SEQUENCE, "multi-output op", "two sequence lengths",
          "dynamic batch"),
    plain("state_space", StateSpace, lambda i: torch.randn(2, LENGTHS[i % 4], 4), SEQUENCE, "state-space model",
          "factory function", "two sequence lengths", "dynamic batch"),
)  # fmt: skip
