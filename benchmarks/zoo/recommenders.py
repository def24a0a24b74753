"""Recommenders, graphs, points, and other networks that are neither pictures nor sentences."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from benchmarks.zoo.architecture import Architecture, Sample, settled

ITEMS = 50


class Dlrm(nn.Module):
    """A deep recommender: bags of categories, a bottom net for numbers, dot products of every pair."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(ITEMS, width, mode=mode) for mode in ("sum", "mean"))
        self.bottom = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + 3, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, numbers: torch.Tensor, categories: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """numbers: [batch, 4]; categories: name -> (ids, offsets). A click's log odds, [batch]."""
        dense = self.bottom(numbers)
        pooled = [bag(ids, offsets) for bag, (ids, offsets) in zip(self.bags, categories.values(), strict=True)]
        stacked = torch.stack([dense, *pooled], 1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        rows, columns = torch.tril_indices(3, 3, offset=-1)
        return self.top(torch.cat([dense, products[:, rows, columns]], 1))[:, 0]


class TwoTowers(nn.Module):
    """Users against items: normalised towers, a learned temperature, a scalar contrastive loss."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(ITEMS, 16), nn.Embedding(ITEMS, 16)
        self.tower = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """user, item: [batch]. The loss, a scalar, and the scores [batch, batch]."""
        one, two = F.normalize(self.tower(self.users(user)), dim=-1), F.normalize(self.tower(self.items(item)), dim=-1)
        scores = one @ two.T * self.temperature.exp()
        return F.cross_entropy(scores, torch.arange(user.shape[0])), scores


class GraphAttention(nn.Module):
    """Attention along the edges of a graph: gather, scatter, a softmax over incoming edges by hand."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.project, self.score, self.out = nn.Linear(6, width), nn.Linear(2 * width, 1), nn.Linear(width, 3)

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """nodes: [nodes, 6]; edges: [2, edges] of from and to."""
        x = self.project(nodes)
        source, target = edges.unbind(0)
        score = F.leaky_relu(self.score(torch.cat([x[source], x[target]], -1))[:, 0], 0.2)
        peak = torch.full((x.shape[0],), -1e4).scatter_reduce(0, target, score, "amax")
        weight = (score - peak[target]).exp()
        total = torch.zeros(x.shape[0]).index_add(0, target, weight)
        messages = (weight / (total[target] + 1e-6))[:, None] * x[source]
        return self.out(F.elu(torch.zeros_like(x).index_add(0, target, messages) + x))


class PointNet(nn.Module):
    """Sets of points: a learned transform, shared layers, the maximum over points, and where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.align = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.matrix = nn.Linear(16, 9)
        self.layers = nn.Sequential(nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 32, 1))
        self.head = nn.Linear(32, 5)

    def forward(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """points: [batch, count, 3]."""
        turned = points.transpose(1, 2)
        matrix = self.matrix(self.align(turned).amax(-1)).view(-1, 3, 3) + torch.eye(3)
        peak, place = self.layers(torch.bmm(matrix, turned)).max(-1)
        return self.head(peak), place


class Factorisation(nn.Module):
    """A factorisation machine: linear terms, and pairs as the square of a sum less the sum of squares."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factors = nn.Embedding(ITEMS, 1), nn.Embedding(ITEMS, 8)
        self.deep = nn.Sequential(nn.Linear(4 * 8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))

    def forward(self, fields: torch.Tensor) -> torch.Tensor:
        """fields: [batch, 4] category numbers. Probabilities [batch]."""
        factors = self.factors(fields)
        pairs = 0.5 * (factors.sum(1) ** 2 - (factors**2).sum(1)).sum(-1)
        return torch.sigmoid(self.linear(fields).sum((1, 2)) + pairs + self.deep(factors.flatten(1))[:, 0])


class Autoencoder(nn.Module):
    """A variational autoencoder at inference: mean and variance by `chunk`, a decoder, a scalar divergence."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(20, 32), nn.SiLU(), nn.Linear(32, 8))
        self.decode = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 20))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """x: [batch, 20]."""
        mean, log_variance = self.encode(x).chunk(2, -1)
        divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(-1).mean()
        return self.decode(mean), {"mean": mean, "log_variance": log_variance}, divergence


class CouplingFlow(nn.Module):
    """A normalising flow of affine couplings: halves written into a copy in place, a log determinant summed up."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 6)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """x: [batch, 6]."""
        z, total = x.clone(), torch.zeros(x.shape[0])
        for i, net in enumerate(self.nets):
            kept, moved = (z[:, :3], z[:, 3:]) if i % 2 else (z[:, 3:], z[:, :3])
            scale, shift = net(kept).split(3, -1)
            moved.mul_(scale.tanh().exp()).add_(shift)
            total += scale.tanh().sum(-1)
        return {"z": z, "log_determinant": total, "log_density": -0.5 * (z**2).sum(-1) + total}


def _clicks(index: int) -> dict[str, Any]:
    offsets = torch.tensor([0, 3, 5, 9])
    categories = {name: (torch.randint(0, ITEMS, (12,)), offsets) for name in ("bought", "viewed")}
    return {"numbers": torch.rand(4, 4) * 5, "categories": categories}


def _pairs(index: int) -> dict[str, torch.Tensor]:
    return {"user": torch.randint(0, ITEMS, (5 + index,)), "item": torch.randint(0, ITEMS, (5 + index,))}


def _two_towers() -> Sample:
    batch = {0: Dim("batch", min=2, max=64)}
    return Sample(TwoTowers().eval(), (), _pairs(0), {"user": batch, "item": batch})


def _graph(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    nodes, edges = 8 + index, 20 + 3 * index
    return torch.randn(nodes, 6), torch.randint(0, nodes, (2, edges))


def _graph_attention() -> Sample:
    shapes = ({0: Dim("nodes", min=2, max=99)}, {1: Dim("edges", min=2, max=999)})
    return Sample(GraphAttention().eval(), _graph(0), dynamic_shapes=shapes)


def _points(index: int) -> torch.Tensor:
    return torch.randn(3, 24, 3)


def _fields(index: int) -> torch.Tensor:
    return torch.randint(0, ITEMS, (6, 4))


RECOMMENDERS = (
    Architecture(
        "dlrm", "recommender", lambda: Sample(Dlrm().eval(), (), _clicks(0)), _clicks,
        covers=("embedding bag", "nested inputs", "dict inputs", "keyword inputs", "factory function"),
    ),
    Architecture(
        "two_towers", "recommender", _two_towers, _pairs,
        covers=("scalar output", "factory function", "dynamic batch", "keyword inputs"),
    ),
    Architecture(
        "factorisation_machine", "recommender", lambda: Sample(Factorisation().eval(), (_fields(0),)), _fields,
    ),
    Architecture(
        "graph_attention", "graph", _graph_attention, _graph, covers=("factory function", "multi-output op"),
    ),
    Architecture(
        "pointnet", "points", lambda: Sample(settled(PointNet(), torch.randn(16, 24, 3)), (_points(0),)), _points,
        covers=("multi-output op", "factory function"),
    ),
    Architecture(
        "autoencoder", "generative", lambda: Sample(Autoencoder().eval(), (torch.randn(3, 20),)),
        lambda index: torch.randn(3, 20), covers=("scalar output", "nested outputs", "multi-output op"),
    ),
    Architecture(
        "coupling_flow", "generative", lambda: Sample(CouplingFlow().eval(), (torch.randn(4, 6),)),
        lambda index: torch.randn(4, 6), covers=("in-place op on a view", "dict outputs", "multi-output op"),
    ),
)  # fmt: skip
