"""The course from all low to fp32: the largest edge goes first, with all that round it."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import pytest
from calibcast.calib.rounding_edges import Edge
from calibcast.passes.rounding_course import ALWAYS, NEVER, course_of, noise_of
from calibcast.passes.rounding_evidence import LOST, MeasuredEdge


def edge(node: str, maker: str, noise: float, *movers: str) -> MeasuredEdge:
    return MeasuredEdge(Edge(node, maker, 0, movers), (noise,), noise)


CHAIN = [
    edge("mul", "x", 1e-8),
    edge("sin", "mul", 1e-2, "view"),
    edge("out", "sin", 1e-7),
    edge("output", "out", 1e-8),
]
NODES = dict.fromkeys(["mul", "view", "sin", "out"], True)
SIZES = {"mul": 100, "view": 0, "sin": 100, "out": 100}


def high(course: object, noise: float) -> set[str]:
    return {name for name in course.thresholds if course.is_high(name, noise)}


def test_an_edge_goes_with_its_reader_its_maker_and_the_movers_between() -> None:
    """Raising `sin` alone would leave its input rounded by the product."""
    course = course_of(CHAIN, NODES, (), (), SIZES)
    assert high(course, 1e-4) == {"mul", "view", "sin"}
    assert high(course, 1.0) == set()
    assert noise_of(course.active(high(course, 1e-4))) == pytest.approx(1.1e-7)


def test_ties_are_raised_together_and_pinned_nodes_never() -> None:
    """What shares storage goes as one; what the user wants low stays so, and its noise with it."""
    tied = course_of(CHAIN, NODES, (), [{"sin", "out"}], SIZES)
    assert high(tied, 1e-4) == {"mul", "view", "sin", "out"}
    pinned = course_of(CHAIN, NODES, {"sin"}, (), SIZES)
    assert high(pinned, 1e-4) == set()


def test_a_mover_between_high_nodes_follows() -> None:
    """Low, it would be two casts for nothing; its edge makes too little noise to be raised for."""
    edges = [edge("a", "x", 1.0), edge("b", "y", 1.0), edge("b", "a", 0.0, "view")]
    course = course_of(edges, {"a": True, "view": True, "b": True}, (), (), {"a": 1, "b": 1})
    assert high(course, 0.1) == {"a", "b", "view"}
    assert course.follows == {"view": "b"}


def test_what_another_rule_keeps_high_is_always_so() -> None:
    """Such nodes round nothing, and are no steps."""
    course = course_of(CHAIN, {**NODES, "sin": False, "mul": False, "view": False}, (), (), SIZES)
    assert course.thresholds["sin"] == ALWAYS
    assert course.thresholds["out"] > NEVER
    assert not [step for step in course.steps if "sin" in step.nodes]


def test_less_noise_never_lowers_a_node() -> None:
    """The nodes that are high at one allowance are so at any smaller one."""
    course = course_of(CHAIN, NODES, (), (), SIZES)
    sets = [high(course, 10.0**-k) for k in range(12)]
    assert all(before <= after for before, after in pairwise(sets))


def test_a_cheap_outlier_goes_inside_the_budget() -> None:
    """One edge is nearly all noise and costs next to nothing; it would break first on other data."""
    edges = [edge("emb", "t", 1e-6), *(edge(f"c{i}", f"c{i - 1}" if i else "x", 1e-9) for i in range(9))]
    nodes = dict.fromkeys(["emb", *(f"c{i}" for i in range(9))], True)
    sizes = {"emb": 1, **{f"c{i}": 1000 for i in range(9)}}
    assert high(course_of(edges, nodes, (), (), sizes), 2e-5) == {"emb"}
    assert high(course_of(edges, nodes, (), (), {**sizes, "emb": 1000}), 2e-5) == set()


def test_a_margin_is_for_what_hangs_on_one_edge() -> None:
    """Allowances are for half the amplitude of the budget: one edge above that goes, ten that share it do not."""
    nodes = {f"n{i}": True for i in range(10)}
    one = [edge("n0", "x", 1e-4)]
    ten = [edge(f"n{i}", f"x{i}", 1e-5) for i in range(10)]
    assert high(course_of(one, nodes, (), (), {}), 0.9e-4) == {"n0"}
    assert high(course_of(ten, nodes, (), (), {}), 0.9e-4) == set()
    assert len(high(course_of(ten, nodes, (), (), {}), 0.9e-4 / 4)) == 1  # more than the budget itself


def test_spread_noise_is_not_raised() -> None:
    """A hundred equal edges are each to blame for a hundredth: half of the program would not be worth it."""
    edges = [edge(f"n{i}", f"n{i - 1}" if i else "x", 1e-5) for i in range(100)]
    nodes = dict.fromkeys([f"n{i}" for i in range(100)], True)
    course = course_of([edge("n0", "x", 0.5), *edges], nodes, (), (), dict.fromkeys(nodes, 8))
    assert course.spread > 2e-5
    assert high(course, 2e-5) == {"n0"}  # the one that is to blame
    assert high(course, 2.4e-4) > {"n0"}  # a little less than all of it is worth its bytes


def test_many_small_edges_of_few_bytes_are_worth_raising() -> None:
    """An integrator's two hundred additions make all of the noise, with a tenth of the bytes."""
    edges = [edge(f"add{i}", f"add{i - 1}" if i else "x", 1e-4) for i in range(200)]
    nodes = {name: True for i in range(200) for name in (f"add{i}", f"tanh{i}")}
    sizes = {name: 1 if name.startswith("add") else 9 for name in nodes}
    course = course_of(edges, nodes, (), (), sizes)
    assert course.spread == 0.0
    assert len(high(course, 1e-5)) > 195


def test_what_becomes_infinite_is_raised_first_and_leaves_finite_noise() -> None:
    """Infinities are not taken away from a sum, so what is left is exact."""
    edges = [edge("log", "sub", LOST), edge("mul", "x", 1e-9)]
    course = course_of(edges, dict.fromkeys(["log", "sub", "mul"], True), (), (), {})
    assert high(course, 1e-4) == {"log", "sub"}
    assert noise_of(course.active({"log", "sub"})) == 1e-9


def test_five_thousand_nodes_take_less_than_a_second() -> None:
    """Only the edges of raised nodes are looked at again."""
    count = 5000
    edges = [
        edge(f"n{i}", f"n{max(0, i - k)}", 1e-9 * (1 + (i * 7919) % 1000)) for i in range(1, count) for k in (1, 5)
    ]
    nodes = dict.fromkeys([f"n{i}" for i in range(count)], True)
    start = time.process_time()  # not what others take of the machine
    course = course_of(edges, nodes, (), (), dict.fromkeys(nodes, 4))
    assert time.process_time() - start < 1.0
    assert math.isfinite(course.steps[0].noise)
