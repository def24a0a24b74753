"""How many terms an operator sums into one element, against numbers worked out by hand, and what it may hide."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from calibcast.calib import calibrate as measure
from calibcast.calib.graph import base_op
from calibcast.passes import classify
from calibcast.passes.reductions import depth_of_reduction
from torch import fx
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

# The rules as they stand without evidence from rounding: tests of plans that have it are in test_rounding_plan.py.
calibrate = partial(measure, rounding_batches=0)

E = torch.zeros
aten = torch.ops.aten

# id -> (function, shapes of its arguments, terms per output element, by hand)
DEPTHS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], int | None]] = {
    "linear": (F.linear, [(2, 3, 40), (5, 40)], 40),
    "addmm": (torch.addmm, [(5,), (2, 30), (30, 5)], 30),
    "mm": (torch.mm, [(2, 30), (30, 5)], 30),
    "matmul": (torch.matmul, [(2, 4, 20), (2, 20, 3)], 20),
    "matmul of vectors": (torch.matmul, [(20,), (20,)], 20),
    "bmm": (torch.bmm, [(2, 4, 12), (2, 12, 3)], 12),
    "addbmm": (torch.addbmm, [(3, 5), (7, 3, 4), (7, 4, 5)], 28),
    "baddbmm": (torch.baddbmm, [(2, 4, 3), (2, 4, 12), (2, 12, 3)], 12),
    "mv": (torch.mv, [(4, 9), (9,)], 9),
    "dot": (torch.dot, [(7,), (7,)], 7),
    "conv1d": (F.conv1d, [(1, 6, 20), (8, 6, 5)], 6 * 5),
    "conv2d": (F.conv2d, [(1, 6, 9, 9), (8, 6, 3, 5)], 6 * 3 * 5),
    "conv2d in groups": (lambda x, w: F.conv2d(x, w, groups=3), [(1, 6, 9, 9), (9, 2, 3, 3)], 2 * 3 * 3),
    "conv3d": (F.conv3d, [(1, 2, 5, 5, 5), (4, 2, 3, 3, 3)], 2 * 27),
    "conv_transpose1d": (F.conv_transpose1d, [(1, 6, 9), (6, 4, 3)], 6 * 3),
    "conv_transpose2d": (F.conv_transpose2d, [(1, 6, 9, 9), (6, 4, 3, 3)], 6 * 9),
    "conv_transpose2d in groups": (
        lambda x, w: F.conv_transpose2d(x, w, groups=2),
        [(1, 6, 9, 9), (6, 4, 3, 3)],
        3 * 9,
    ),
    "conv_transpose3d": (F.conv_transpose3d, [(1, 2, 5, 5, 5), (2, 4, 3, 3, 3)], 2 * 27),
    "attention over keys": (F.scaled_dot_product_attention, [(1, 2, 4, 8), (1, 2, 16, 8), (1, 2, 16, 8)], 16),
    "attention over features": (F.scaled_dot_product_attention, [(1, 2, 4, 32), (1, 2, 16, 32), (1, 2, 16, 32)], 32),
    "sum of all": (torch.sum, [(3, 4, 5)], 60),
    "sum of one": (lambda x: x.sum(-1), [(3, 4, 5)], 5),
    "sum of two": (lambda x: x.sum((0, -1), keepdim=True), [(3, 4, 5)], 15),
    "mean of all": (torch.mean, [(3, 4, 5)], 60),
    "mean of one": (lambda x: x.mean(1), [(3, 4, 5)], 4),
    "var": (lambda x: x.var((1, 2)), [(3, 4, 5)], 20),
    "std": (lambda x: x.std(0), [(3, 4, 5)], 3),
    "var_mean": (lambda x: torch.var_mean(x, -1)[0], [(3, 4, 5)], 5),
    "norm": (lambda x: aten.linalg_vector_norm(x, 2, [-1]), [(3, 4, 5)], 5),
    "cumsum": (lambda x: x.cumsum(1), [(3, 4, 5)], 4),
    "softmax": (lambda x: x.softmax(-1), [(3, 4, 5)], 5),
    "logsumexp": (lambda x: x.logsumexp((1, 2)), [(3, 4, 5)], 20),
    "layer_norm": (lambda x: F.layer_norm(x, (4, 5)), [(3, 4, 5)], 20),
    "group_norm": (lambda x: F.group_norm(x, 2), [(3, 6, 5)], 3 * 5),
    "rms_norm": (lambda x: F.rms_norm(x, (5,)), [(3, 4, 5)], 5),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3), [(1, 2, 9, 9)], 9),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (1, 2)), [(1, 2, 9, 9)], 9 * 5),
    "adaptive windows that overlap": (lambda x: F.adaptive_avg_pool1d(x, 4), [(1, 2, 7)], 3),  # the third reads 3:6
    "adaptive windows of unlike length": (lambda x: F.adaptive_avg_pool1d(x, 3), [(1, 2, 10)], 4),
    "sum of a scalar": (torch.sum, [()], 1),
    "relu": (torch.relu, [(3, 4)], None),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), [(1, 2, 4, 4)], None),
}


def first_call(program: torch.export.ExportedProgram) -> fx.Node:
    return next(n for n in program.graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("name", DEPTHS)
def test_terms_per_element(export: Callable[..., Any], name: str) -> None:
    """Worked out by hand: products over their inner size, convolutions over channels and kernel, the rest over dims."""
    function, shapes, terms = DEPTHS[name]
    node = first_call(export(function, *map(E, shapes)))
    assert depth_of_reduction(node, base_op(node.target)) == terms


@pytest.mark.parametrize(
    ("name", "terms"), [("linear", 40), ("conv2d", 90), ("conv_transpose2d in groups", 27), ("layer_norm", 20)]
)
def test_decomposed_operators_count_the_same(export: Callable[..., Any], name: str, terms: int) -> None:
    """After `run_decompositions` the same product has another name, and as many terms."""
    function, shapes, _ = DEPTHS[name]
    nodes = export(function, *map(E, shapes)).run_decompositions().graph.nodes
    depths = [depth_of_reduction(n, base_op(n.target)) for n in nodes if n.op == "call_function"]
    assert max(d for d in depths if d is not None) == terms


def test_lstm_counts_its_widest_product(export: Callable[..., Any]) -> None:
    """A recurrent layer sums over its input or its hidden state, whichever is wider."""
    program = export(torch.nn.LSTM(12, 7, batch_first=True), E(2, 5, 12))
    node = next(n for n in program.graph.nodes if base_op(n.target) == "lstm")
    assert depth_of_reduction(node, "lstm") == 12


def test_symbolic_sizes_count_as_at_export(export: Callable[..., Any]) -> None:
    """A sum over a dynamic dimension has the terms of the example, and adds no guard."""
    program = export(lambda x: x.sum(0), E(6, 3), dynamic_shapes=(({0: torch.export.Dim("n", min=2)},),))
    before = dict(program.range_constraints)
    assert depth_of_reduction(first_call(program), "sum") == 6
    assert program.range_constraints == before


def test_the_rule_keeps_deep_sums_high(export: Callable[..., Any]) -> None:
    """max_depth_of_reduction is strict: 40 terms are allowed at 40, and not at 39."""
    program = export(lambda x, w: F.linear(x, w).relu(), E(2, 40), E(5, 40))
    assert classify(program, None, max_depth_of_reduction=40)["linear"].precision == "low"
    decision = classify(program, None, max_depth_of_reduction=39)["linear"]
    assert (decision.rule, decision.evidence, decision.limit) == ("max_depth_of_reduction", 40.0, 39.0)
    assert classify(program, None, max_depth_of_reduction=1)["relu"].precision == "low"


# id -> (function, inputs, what the inside may reach, by hand)
HIDDEN: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], float]] = {
    "sum": (lambda x: x.sum(-1), (torch.full((2, 1000), 500.0),), 1000 * 500.0),
    "mean": (lambda x: x.mean(-1), (torch.full((2, 1000), 500.0),), 1000 * 500.0),
    "layer_norm": (lambda x: F.layer_norm(x, (8,)), (torch.full((2, 8), 300.0),), 8 * 300.0**2),
    "var": (lambda x: x.var(-1), (torch.full((2, 8), 300.0),), 8 * 300.0**2),
    "attention": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k),
        (torch.full((1, 1, 2, 8), 200.0), torch.full((1, 1, 2, 8), 100.0)),
        8 * 200.0 * 100.0,
    ),
    "attention of a tensor to itself": (
        lambda x: F.scaled_dot_product_attention(x, x, x),
        (torch.full((1, 1, 2, 8), 200.0),),
        8 * 200.0 * 200.0,
    ),
    "attention with its queries as keys": (
        lambda x, v: F.scaled_dot_product_attention(x, x, v),
        (torch.full((1, 1, 2, 8), 200.0), torch.full((1, 1, 2, 8), 1.0)),
        8 * 200.0 * 200.0,
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_values_are_bounded_by_the_peaks(export: Callable[..., Any], name: str) -> None:
    """The bound is n max|x|, n max|x|^2, or d max|q| max|k|, and keeps the node high in fp16 alone."""
    function, inputs, bound = HIDDEN[name]
    program = export(function, *inputs)
    ranges = calibrate(program, [inputs], progress=False)
    (decision,) = classify(program, ranges, data_max=math.inf).decisions
    assert (decision.rule, decision.evidence, decision.limit) == ("interior", pytest.approx(bound), 65504.0)
    assert classify(program, ranges, torch.bfloat16, data_max=math.inf).low_precision_nodes == (decision.node,)


def test_softmax_hides_as_many_exponentials_as_it_sums(export: Callable[..., Any]) -> None:
    """After its maximum is taken away, each exponential is at most 1: scores of any size are harmless."""
    x = torch.linspace(-3e4, 3e4, 64).reshape(2, 32)
    program = export(lambda x: x.softmax(-1), x)
    ranges = calibrate(program, [x], progress=False)
    assert classify(program, ranges, data_max=math.inf).low_precision_nodes == ("softmax",)
