"""What operators sum inside, against plain float64 sums over plain indices, for every operator that hides a sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from calibcast.calib import hidden as hidden_module
from calibcast.calib.graph import base_op
from calibcast.calib.hidden import SlicesInMemory, group_count, hidden_values, is_pool, slices_of, window_size
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 6, 8, 5, generator=GENERATOR) + 0.5
WIDE = X.double().numpy()
INF = math.inf

Reference = Callable[[np.ndarray], tuple[float, float]]


def sums(axis: Any) -> Reference:
    return lambda x: (float(np.abs(x).sum(axis).max()), INF)


def centred(axis: Any) -> Reference:
    return lambda x: (float((x**2).sum(axis).max()), float(x.var(axis).min()))


def plain(axis: Any) -> Reference:
    return lambda x: (float((x**2).sum(axis).max()), float((x**2).mean(axis).min()))


def windows(*size: int) -> Reference:
    """Of the last dimensions, moved by the size of the window."""

    def reference(x: np.ndarray) -> tuple[float, float]:
        axes = tuple(range(x.ndim - len(size), x.ndim))
        views = np.lib.stride_tricks.sliding_window_view(np.abs(x), size, axes)
        steps = tuple(slice(None, None, step) for step in size)
        return float(views[(..., *steps, *[slice(None)] * len(size))].sum(tuple(range(-len(size), 0))).max()), INF

    return reference


def grouped(x: np.ndarray) -> tuple[float, float]:
    parts = x.reshape(2, 3, -1)
    return float((parts**2).sum(2).max()), float(parts.var(2).min())


CASES: dict[str, tuple[Callable[..., Any], Reference]] = {
    "sum of all": (lambda x: x.sum(), sums(None)),
    "sum of one": (lambda x: x.sum(-1), sums(-1)),
    "sum of two": (lambda x: x.sum((0, -2), keepdim=True), sums((0, 2))),
    "mean": (lambda x: x.mean((1, 3)), sums((1, 3))),
    "nansum": (lambda x: x.nansum(2), sums(2)),
    "cumsum": (lambda x: x.cumsum(1), sums(1)),
    "var": (lambda x: x.var((2, 3)), centred((2, 3))),
    "std": (lambda x: x.std(-1), centred(-1)),
    "norm": (lambda x: torch.linalg.vector_norm(x, 2, [1]), plain(1)),
    "layer_norm of two": (lambda x: F.layer_norm(x, (8, 5)), centred((2, 3))),
    "layer_norm of one": (lambda x: F.layer_norm(x, (5,)), centred(3)),
    "rms_norm": (lambda x: F.rms_norm(x, (5,)), plain(3)),
    "group_norm": (lambda x: F.group_norm(x, 3), grouped),
    "instance_norm": (lambda x: F.instance_norm(x), centred((2, 3))),
    "avg_pool1d": (lambda x: F.avg_pool1d(x.flatten(1, 2), 5), windows(5)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, (4, 5)), windows(4, 5)),
    "avg_pool2d of one number": (lambda x: F.avg_pool2d(x, 2), lambda x: windows(2, 2)(x[..., :4])),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, (3, 2, 5)), windows(3, 2, 5)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (2, 1)), windows(4, 5)),
    "adaptive_avg_pool2d to one": (lambda x: F.adaptive_avg_pool2d(x, 1), sums((2, 3))),
    "adaptive_avg_pool3d to one": (lambda x: F.adaptive_avg_pool3d(x, 1), sums((1, 2, 3))),
}


def node_of(function: Callable[..., Any], *inputs: torch.Tensor) -> tuple[fx.Node, dict[fx.Node, torch.Tensor]]:
    """The last call of a function, and its arguments."""

    class Net(nn.Module):
        def forward(self, *args: torch.Tensor) -> Any:
            return function(*args)

    graph_module = torch.export.export(Net(), inputs).graph_module
    values: dict[fx.Node, Any] = {}
    node = [n for n in graph_module.graph.nodes if n.op == "call_function"][-1]
    given = iter(inputs)
    for n in graph_module.graph.nodes:
        if n.op == "placeholder":
            values[n] = next(given)
        elif n.op == "call_function" and n is not node:
            args, kwargs = fx.map_arg((n.args, n.kwargs), values.get)
            values[n] = n.target(*args, **kwargs)
    return node, values


@pytest.mark.parametrize("step", [None, 7, 60])
@pytest.mark.parametrize("name", CASES)
def test_sums_and_spreads_are_those_of_plain_sums(monkeypatch: pytest.MonkeyPatch, name: str, step: int | None) -> None:
    """All at once, and in steps of a few elements."""
    if step is not None:
        monkeypatch.setattr(hidden_module, "_STEP", step)
    function, reference = CASES[name]
    found = hidden_values(*node_of(function, X))
    assert found is not None
    assert (found.dtype, found.shape) == (torch.float64, (2,))
    x = WIDE.reshape(2, 48, 5) if name == "avg_pool1d" else WIDE
    assert found.tolist() == pytest.approx(reference(x), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_sums_are_formed_in_fp32_at_least(dtype: torch.dtype) -> None:
    x = (200 * X[0, 0]).to(dtype)
    found = hidden_values(*node_of(lambda x: F.layer_norm(x, (5,)), x))
    assert found is not None
    assert found.tolist() == pytest.approx(centred(-1)(x.double().numpy()), rel=1e-5)


def test_attention_is_bounded_by_the_longest_query_and_key() -> None:
    q, k, v = (torch.randn(1, 2, n, 4, generator=GENERATOR) for n in (3, 5, 5))
    found = hidden_values(*node_of(F.scaled_dot_product_attention, q, k, v))
    assert found is not None
    longest = float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max())
    assert found.tolist() == pytest.approx([longest, INF], rel=1e-6)


def test_nan_gives_no_bound() -> None:
    x = X[0, 0].clone()
    x[0, 0] = math.nan
    for function in (lambda x: x.sum(), lambda x: F.layer_norm(x, (5,))):
        found = hidden_values(*node_of(function, x))
        assert found is not None
        assert found[0] == INF
    assert found[1] == 0.0
    full = hidden_values(*node_of(lambda x: x.sum(), torch.full((3,), INF)))
    assert full is not None
    assert full.tolist() == [INF, INF]


@pytest.mark.parametrize(
    ("function", "x"),
    [(torch.relu, X), (lambda x: x.sum(), torch.ones(3, dtype=torch.int64)), (lambda x: x.sum(-1), torch.ones(3, 0))],
)
def test_what_hides_nothing_gives_nothing(function: Callable[..., Any], x: torch.Tensor) -> None:
    assert hidden_values(*node_of(function, x)) is None


def test_small_deviations_are_measured_again_when_sums_of_squares_hide_them() -> None:
    """Of what is 1000 times its deviation, the difference of two sums in fp32 has lost the variance."""
    for offset in (10.0, 99.0, 101.0, 1000.0):
        x = offset + torch.randn(16, 256, generator=GENERATOR)
        found = hidden_values(*node_of(lambda x: F.layer_norm(x, (256,)), x))
        assert found is not None
        assert float(found[1]) == pytest.approx(float(x.double().var(1, correction=0).min()), rel=3e-3)


@pytest.mark.parametrize(
    ("base", "size", "shape", "elements"),
    [
        ("avg_pool1d", [3], (2, 9), 3),
        ("avg_pool2d", [3], (2, 9, 9), 9),
        ("avg_pool2d", [3, 2], (2, 9, 9), 6),
        ("avg_pool3d", [2], (2, 9, 9, 9), 8),
        ("adaptive_avg_pool1d", [3], (2, 10), 4),
        ("adaptive_avg_pool1d", [4], (2, 7), 3),
        ("adaptive_avg_pool1d", [7], (2, 7), 1),
        ("adaptive_avg_pool1d", [9], (2, 7), 2),
        ("adaptive_avg_pool2d", [2], (2, 4, 6), 6),
        ("adaptive_avg_pool2d", [1, 3], (2, 4, 6), 8),
        ("adaptive_avg_pool3d", [1, 2, 3], (4, 4, 6), 4 * 2 * 2),
    ],
)
def test_windows_have_the_elements_that_torch_averages(
    base: str, size: list[int], shape: tuple[int, ...], elements: int
) -> None:
    assert is_pool(base)
    assert window_size(base, size, shape) == elements


def test_groups_are_those_of_a_group_norm() -> None:
    node, _ = node_of(lambda x: F.group_norm(x, 3), X)
    assert group_count(node, base_op(node.target)) == 3
    node, _ = node_of(torch.relu, X)
    assert group_count(node, "relu") is None


LAYOUTS: dict[str, tuple[torch.Tensor, list[int]]] = {
    "rows": (torch.arange(60.0).reshape(3, 4, 5), [2]),
    "columns": (torch.arange(60.0).reshape(3, 4, 5), [0]),
    "in the middle": (torch.arange(60.0).reshape(3, 4, 5), [1]),
    "two at once": (torch.arange(60.0).reshape(3, 4, 5), [1, 2]),
    "all": (torch.arange(60.0).reshape(3, 4, 5), [0, 1, 2]),
    "of a view": (torch.arange(120.0).reshape(3, 4, 10)[:, :, ::2], [2]),
    "of a cut": (torch.arange(90.0).reshape(3, 6, 5)[:, :4], [2]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_places_in_memory_hold_the_slices(name: str) -> None:
    """Slice i begins at (i // width) * pitch + (i % width) * step; its elements are `apart`."""
    x, reduced = LAYOUTS[name]
    places = hidden_module.Slices(x, reduced, False).in_memory()
    assert isinstance(places, SlicesInMemory)
    memory = x.as_strided((x.untyped_storage().size() // 4,), (1,)).tolist()
    found = set()
    for i in range(places.count):
        start = i // places.width * places.pitch + i % places.width * places.step
        found.add(tuple(sorted(memory[start + j * places.apart] for j in range(places.length))))
    kept = [d for d in range(x.dim()) if d not in reduced]
    rows = x.permute(*kept, *reduced).reshape(-1, math.prod(x.shape[d] for d in reduced))
    assert found == {tuple(sorted(row)) for row in rows.tolist()}


def test_places_in_memory_need_few_strides() -> None:
    x = torch.zeros(3, 4, 10, 6)[:, :2, :4, :3]
    assert hidden_module.Slices(x, [0, 2], False).in_memory() is None  # two strides inside
    assert hidden_module.Slices(x, [3], False).in_memory() is None  # three between


def test_slices_say_what_is_summed() -> None:
    def of(function: Callable[..., Any], *args: torch.Tensor) -> list[tuple[list[int], bool, int]]:
        return [(s.dimensions, s.squares, s.spread) for s in slices_of(*node_of(function, *args))]

    assert of(lambda x: x.mean(1), X) == [([1], False, 0)]
    assert of(lambda x: F.layer_norm(x, (8, 5)), X) == [([2, 3], True, 2)]
    assert of(lambda x: F.rms_norm(x, (5,)), X) == [([3], True, 1)]
    assert of(lambda x: F.group_norm(x, 3), X) == [([2, 3, 4], True, 2)]
    assert of(lambda x: F.adaptive_avg_pool2d(x, 1), X) == [([2, 3], False, 0)]
    assert of(lambda x: F.avg_pool2d(x, 2), X) == []
    assert of(F.scaled_dot_product_attention, X, X, X) == [([3], True, 0)] * 2
