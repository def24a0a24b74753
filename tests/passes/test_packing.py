"""What a budget pays for: the most bytes and work for the noise."""

from __future__ import annotations

import math
import time

import pytest
from calibcast.calib.rounding_edges import Edge
from calibcast.calib.rounding_table import OUTPUT
from calibcast.passes.packing import BYTES, NODES, WORK, Packing
from calibcast.passes.rounding_course import course_of
from calibcast.passes.rounding_evidence import MeasuredEdge


def edge(node: str, maker: str, noise: float, *movers: str) -> MeasuredEdge:
    return MeasuredEdge(Edge(node, maker, 0, movers), (noise,), noise)


def packing(
    edges: list[MeasuredEdge],
    sizes: dict[str, int],
    work: dict[str, int] | None = None,
    ties: list[list[str]] | None = None,
    high: tuple[str, ...] = (),
    pinned: tuple[str, ...] = (),
) -> Packing:
    decided = {name: name not in high for name in sizes}
    return Packing(course_of(edges, decided, pinned, ties or [], sizes), ties or [], sizes, work or {})


def test_what_gains_more_for_its_noise_goes_down_first() -> None:
    """The large node makes the most noise, and less than three small ones together, which write a tenth."""
    edges = [edge("large", "x", 3e-5), *(edge(f"small{i}", "x", 2e-5) for i in range(3))]
    made = packing(edges, {"large": 1000, "small0": 30, "small1": 30, "small2": 30})
    assert made.packed(made.free, 4e-5).high == {"small0", "small1", "small2"}
    assert made.packed(made.free, 6e-5).high == {"small1", "small2"}
    assert made.packed(made.free, 1.0).high == frozenset()
    assert made.packed(made.free, 1e-6).high == made.free
    assert made.packed(made.free, 4e-5).noise == pytest.approx(3e-5)


def test_work_counts_too() -> None:
    edges = [edge("writes", "x", 1e-5), edge("computes", "x", 1e-5)]
    made = packing(edges, {"writes": 10, "computes": 10}, {"computes": 100})
    assert made.packed(made.free, 1.5e-5).high == {"writes"}
    assert made.worth(["writes"]) == pytest.approx(BYTES / 2 + NODES / 2)
    assert made.worth(["computes"]) == pytest.approx(BYTES / 2 + WORK + NODES / 2)


def test_without_work_bytes_count_for_all() -> None:
    made = packing([edge("a", "x", 1e-5)], {"a": 30, "b": 10})
    assert made.worth(["a", "b"]) == pytest.approx(1.0)
    assert made.worth(["a"]) == pytest.approx((BYTES * 0.75 + NODES * 0.5) / (BYTES + NODES))


def test_an_edge_is_paid_for_once_by_the_two_nodes_that_round_it() -> None:
    """After the reader, the maker costs nothing."""
    made = packing([edge("reader", "maker", 1e-5)], {"maker": 10, "reader": 20})
    assert made.packed(made.free, 1e-5).high == frozenset()
    assert made.lowered(made.free, {"reader"}).high == {"maker"}


def test_tied_nodes_go_down_together_or_not() -> None:
    edges = [edge("a", "x", 1e-5), edge("b", "x", 1e-3)]
    made = packing(edges, {"a": 10, "b": 10, "c": 10}, ties=[["a", "b"]])
    assert made.groups == [frozenset({"a", "b"})]
    assert made.packed(made.free, 1e-4).high == {"a", "b"}


def test_a_mover_between_high_nodes_goes_with_them() -> None:
    made = packing([edge("reader", "maker", 1e-3, "view")], {"maker": 10, "view": 0, "reader": 10})
    kept = made.packed(made.free, 1e-4)
    assert (kept.high, kept.follows) == ({"maker", "view", "reader"}, {"view": "reader"})
    assert made.lowered(made.free, {"maker"}).high == {"reader"}


def test_a_mover_that_has_a_low_maker_too_is_low_where_that_hardly_costs() -> None:
    """A `cat` of a large low tensor and a small high one, which is a result of the program."""
    for noise, high in ((1e-9, {"exact", "before"}), (1e-3, {"exact", "before", "cat"})):
        edges = [edge("exact", "before", 1e-2), edge(OUTPUT, "exact", noise, "cat"), edge(OUTPUT, "low", 1e-5, "cat")]
        made = packing(edges, {"before": 1, "exact": 1, "low": 1000, "cat": 0})
        assert made.packed(made.free, 1e-4).high == high


def test_what_breaks_first_on_other_data_stays_high_where_that_is_cheap() -> None:
    """It would make most of the noise, within the budget, and gain a hundredth."""
    edges = [edge("large", "x", 1e-7), edge("small", "x", 1e-5)]
    made = packing(edges, {"large": 1000, **{f"free{i}": 0 for i in range(30)}, "small": 10})
    assert made.packed(made.free, 1e-4).high == {"small"}


def test_many_small_nodes_alike_all_go_down() -> None:
    """None of them is worth a hundredth, and together they are the program; five thousand take no second."""
    edges = [edge(f"n{i}", f"n{i - 1}" if i else "x", 1e-9) for i in range(5000)]
    made = packing(edges, {f"n{i}": 10 for i in range(5000)})
    began = time.perf_counter()
    assert made.packed(made.free, 1e-5).high == frozenset()
    assert 2400 < len(made.packed(made.free, 2.5e-6).high) < 2600
    assert time.perf_counter() - began < 5


def test_what_other_rules_decide_is_left_alone() -> None:
    edges = [edge("kept", "x", 1e-3), edge("pinned", "x", 1e-3), edge("a", "kept", 1e-5)]
    made = packing(edges, dict.fromkeys(["kept", "pinned", "a"], 10), high=("kept",), pinned=("pinned",))
    assert made.free == {"a"}
    assert made.packed(made.free, 1.0).high == frozenset()
    assert made.packed(made.free, 0.0).noise == pytest.approx(1e-3)  # that of the pinned node


def test_the_worst_output_counts() -> None:
    """Noise at one output leaves room at another."""
    two = [
        MeasuredEdge(Edge("a", "x", 0, ()), (1e-5, 0.0), 1e-5, 2),
        MeasuredEdge(Edge("b", "x", 0, ()), (0.0, 1e-5), 1e-5, 2),
    ]
    made = packing(two, {"a": 10, "b": 10})
    assert made.packed(made.free, 1.5e-5).high == frozenset()
    assert made.packed(made.free, 1.5e-5).noise == pytest.approx(1e-5)


def test_a_chosen_course_keeps_exactly_these_nodes_high() -> None:
    sizes = {"a": 10, "b": 10, "c": 10}
    course = course_of([edge("a", "x", 1e-3), edge("b", "x", 1e-5)], {"a": True, "b": True, "c": False}, (), [], sizes)
    chosen = course.choosing({"b"}, {})
    for allowance in (0.0, 1e-4, math.inf):
        assert [name for name in sizes if chosen.is_high(name, allowance)] == ["b", "c"]
