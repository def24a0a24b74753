"""Which nodes share one type because a tensor meets itself, and which operators a user may call accumulators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibcast.calib.errors import SettingError
from calibcast.passes import Literal, NodeFacts, TensorFacts
from calibcast.passes.rules import LiteralRange
from calibcast.passes.settings import _accumulating
from calibcast.passes.ties import Tie, forced_by_ties, ties_of
from torch import fx, nn

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def tied(function: Callable[..., Any]) -> list[set[str]]:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return function(x * 1.5, y * 1.5)

    graph_module = torch.export.export(Net(), (X, X.clone())).graph_module
    return [{node.name for node in tie.nodes} for tie in ties_of(graph_module)]


@pytest.mark.parametrize(
    ("function", "nodes"),
    [
        (lambda x, y: x >= x.topk(2)[0][:, :1], [{"ge", "slice_1", "getitem", "topk"}]),
        (lambda x, y: x - x.topk(1)[0], []),  # a difference reads errors that were measured apart
        (lambda x, y: x - x.floor(), [{"sub", "floor"}]),
        (lambda x, y: x.aminmax(dim=-1)[1] - x.aminmax(dim=-1)[0], []),
        (lambda x, y: torch.gt(*x.aminmax(dim=-1)), []),  # the least and the largest are two tensors
        (lambda x, y: (least := x.aminmax(dim=-1)[0]) - least.floor(), [{"sub", "floor"}]),
        (lambda x, y: x > x.floor(), [{"gt", "floor"}]),
        (lambda x, y: x[None] > x[:, None], [{"gt", "unsqueeze", "unsqueeze_1"}]),
        (lambda x, y: x[None] - x[:, None], [{"sub", "unsqueeze", "unsqueeze_1"}]),
        (lambda x, y: x[None] + x[:, None], []),  # nothing cancels
        (lambda x, y: x > x, []),  # one tensor, whatever its type
        (lambda x, y: x > y.floor(), []),
        (lambda x, y: x > 1.0, []),
        (lambda x, y: x - x.sin(), []),  # a sine neither moves nor steps
        (lambda x, y: x > torch.cat([x, y])[:4], []),  # made of two
    ],
)
def test_a_tensor_that_meets_itself_is_rounded_on_both_sides(
    function: Callable[..., Any], nodes: list[set[str]]
) -> None:
    assert tied(function) == nodes


def test_what_is_tied_to_a_node_that_stays_stays() -> None:
    graph = fx.Graph()
    a, b, c = (graph.placeholder(name) for name in "abc")
    tie = Tie(frozenset({a, b, c}), None, "storage", "it is a twin of")
    ties = [(tie, ["a", "b", "c"])]
    assert forced_by_ties(ties, {"a": "low", "b": "low", "c": "low"}, {}) == {}
    high = forced_by_ties(ties, {"a": "low", "b": "high", "c": "low"}, {})
    assert {name: (v.rule, v.reason) for name, v in high.items()} == {
        name: ("storage", "it is a twin of b, which is high") for name in "ac"
    }
    assert set(forced_by_ties(ties, {"a": "low", "b": "high", "c": "low"}, {"a": next(iter(high.values()))})) == {"c"}
    kept = forced_by_ties(ties, {"a": "low", "c": "low"}, {})
    assert kept["a"].reason == "it is a twin of b, which keeps its type"
    pinned = [(Tie(frozenset({a}), "it is written into", "alias"), ["a"])]
    assert forced_by_ties(pinned, {"a": "low"}, {})["a"].reason == "it is written into"
    assert forced_by_ties(pinned, {"a": "high"}, {}) == {}


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("sum", "sum"), ("batch_norm", "batch_norm"), ("linear", "linear"), ("layer_norm", "layer_norm"),
        ("aten.layer_norm.default", "layer_norm"), (torch.ops.aten.layer_norm.default, "layer_norm"),
        (torch.ops.aten.mean, "mean"), ("relu", None), ("sin", None), ("no_such", None),
    ],
)  # fmt: skip
def test_accumulators_are_operators_that_sum(name: Any, known: str | None) -> None:
    if known is None:
        with pytest.raises(SettingError, match="is no operator that sums"):
            _accumulating([name])
    else:
        assert _accumulating([name, name]) == {known}


def literal(value: float, *lows: float | None, base: str = "add", name: str = "other") -> bool:
    """Whether a number in a call keeps its node high; `lows`: the least values of its inputs."""
    inputs = tuple(TensorFacts(f"x{i}", min=low, max=9.0, absmax=9.0) for i, low in enumerate(lows))
    return LiteralRange()(NodeFacts("n", base=base, inputs=inputs, literals=(Literal(name, value),))) is not None


def test_a_number_is_absorbed_beside_what_is_2048_times_as_large() -> None:
    """1e-9 becomes 0 in float16: a loss of 1e-9, where half a step of the least input is 2^-11 of it."""
    least = 1e-9 * 2**11
    assert not literal(1e-9, least * 1.01)
    assert literal(1e-9, least * 0.99)
    assert literal(1e-9, None)
    assert literal(1e-9, least * 1.01, least * 1.01)  # of two tensors it is no eps
    assert literal(1e-9, least * 1.01, base="sub")
    assert literal(1e-9, least * 1.01, base="mul")
    assert literal(1e-9, least * 1.01, name="alpha")
    assert literal(1e5, 1.0)


@pytest.mark.parametrize(("bound", "low", "kept"), [(1e-9, 1.01e-7, False), (1e-9, 0.99e-7, True), (1e5, 1e8, True)])
def test_a_lower_bound_is_never_reached_a_hundred_times_above_it(bound: float, low: float, kept: bool) -> None:
    assert literal(bound, low, base="clamp", name="min") is kept
    assert literal(bound, low, base="clamp", name="max")
    assert literal(bound, base="clamp", name="min")
