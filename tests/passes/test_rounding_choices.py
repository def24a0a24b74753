"""Evidence and course of rounding against plain implementations, and each constant of them from both sides."""

from __future__ import annotations

import math
import random
from typing import Any

import polars as pl
import pytest
from calibcast.calib.rounding_edges import Edge
from calibcast.calib.rounding_table import OUTPUT, ROUNDING_SCHEMA
from calibcast.passes import rounding_course as course_module
from calibcast.passes.rounding_course import (
    ALWAYS,
    NEVER,
    Course,
    _crowd_weight,
    _spread,
    _with_allowances,
    course_of,
    noise_of,
    summed,
)
from calibcast.passes.rounding_evidence import LOST, OTHERS, MeasuredEdge, _batches, _Row, rounding_evidence
from calibcast.passes.rounding_plan import RoundingPlan, allowance_of, budget_of, decibels

INF = math.inf


def edge(node: str, maker: str, *noise: float, movers: tuple[str, ...] = (), outputs: int = 1) -> MeasuredEdge:
    return MeasuredEdge(Edge(node, maker, 0, movers), noise, max(noise), outputs)


def test_the_nodes_of_an_edge_are_all_that_round_it() -> None:
    assert edge("b", "a", 1.0, movers=("view", "slice")).nodes == ("b", "a", "view", "slice")
    assert edge(OUTPUT, "a", 1.0, movers=("view",)).nodes == ("a", "view")
    assert edge("b", "literal:other", 1.0).nodes == ("b",)
    assert edge("b", "b", 1.0).nodes == ("b",)


def test_the_worst_output_is_where_any_batch_is_worst() -> None:
    assert edge("b", "a", 1.0, 2.0, 9.0, 3.0, outputs=2).worst_output == 0
    assert edge("b", "a", 1.0, 2.0, 3.0, 9.0, outputs=2).worst_output == 1


def row(mean: float | None, worst: float | None = None, by: list[float] | None = None, seen: int = 4) -> _Row:
    return _Row(mean, worst, 1, by, seen)


@pytest.mark.parametrize(
    ("found", "batches", "integers", "noise"),
    [
        # Worst in batch 1: there 4 of a mean of 2, and (4 * 2 - 4) / 3 in each other one.
        (row(2.0, 4.0, [2.0]), [1], (), [4.0]),
        (row(2.0, 4.0, [2.0]), [0, 1], (), [4.0 / 3, 4.0]),
        (row(2.0, 4.0, [2.0]), [1, OTHERS], (), [4.0, 4.0]),
        (row(2.0, 4.0, [2.0], seen=1), [0], (), [4.0]),
        (row(2.0, 4.0, [2.0], seen=2), [0], (), [0.0]),
        (row(2.0, 1.0, [2.0]), [0, 1], (), [2.0, 2.0]),
        (row(2.0, None, [2.0]), [1], (), [2.0]),
        (row(2.0, 9.0, [2.0]), [0], (), [0.0]),
        (row(0.0, 0.0, [0.0]), [0, 1], (), [0.0, 0.0]),
        (row(3.0, 6.0, [1.0, 2.0]), [1], (), [2.0, 4.0]),
        (row(3.0, 6.0, None), [1], (), [6.0, 6.0]),
        (row(3.0, 6.0, [3.0]), [1], (), [6.0, 6.0]),  # as many as there are outputs, or none
        # Integers: the share counts like an amplitude, in all batches alike.
        (row(0.5, 1.0, [0.3, 0.2]), [1], (1,), [0.6, 0.2 * 0.2]),
        (row(0.5, 1.0, None), [1], (0, 1), [1.0, 1.0]),
        (row(INF, INF, [INF]), [0], (), [LOST]),
        (row(math.nan, None, [math.nan]), [1], (), [LOST]),
        (row(1e31, 1e31, [1e31]), [1], (), [LOST]),
    ],
)
def test_noise_of_an_edge_in_each_batch(
    found: _Row, batches: list[int], integers: tuple[int, ...], noise: list[float]
) -> None:
    outputs = len(noise) // len(batches)
    assert list(found.noise(batches, outputs, integers)) == pytest.approx(noise)


def test_four_batches_are_told_apart() -> None:
    rows = [_Row(1.0, worst, batch, None, 9) for batch, worst in enumerate([5.0, 1.0, 4.0, 2.0, 3.0])]
    assert _batches(rows) == [0, 2, 4, 3, OTHERS]
    assert _batches(rows[:4]) == [0, 2, 3, 1]
    assert _batches([*rows, _Row(1.0, 9.0, 1, None, 9)])[0] == 1
    assert _batches([_Row(None, None, None, None, 0)]) == [OTHERS]
    assert _batches([_Row(1.0, INF, 3, None, 2), _Row(1.0, 1.0, 2, None, 2)]) == [3, 2]


def table(*rows: dict[str, Any]) -> pl.DataFrame:
    same = {
        "node": "b", "input": "a", "output": 0, "low_precision_type": "float16", "noise": 1.0, "noise_worst": 1.0,
        "worst_batch": 0, "noise_by_output": None, "nonfinite": 0, "steps": 0, "local_sqnr_db": 9.0, "batches": 1,
        "method": "gradient", "why_missing": None,
    }  # fmt: skip
    return pl.DataFrame([same | cells for cells in rows], schema=ROUNDING_SCHEMA)


def test_edges_are_joined_with_their_rows() -> None:
    frame = table(
        {"noise": 0.25, "noise_worst": 0.25}, {"low_precision_type": "bfloat16"}, {"node": "c", "noise": None}
    )
    edges = [Edge("b", "a", 0), Edge("c", "a", 0, ("view",)), Edge("d", "a", 0)]
    found = rounding_evidence(edges, frame, "float16")
    assert found is not None
    assert found.edges == (MeasuredEdge(edges[0], (0.25,), 0.25, 1),)
    assert found.missing == {"c", "a", "view", "d"}
    assert found.knows("b")
    assert not found.knows("view")
    assert rounding_evidence(edges, frame.filter(pl.col("low_precision_type") == "bfloat16"), "float16") is None


def test_sums_are_by_output() -> None:
    assert summed([(1.0, 2.0), (3.0, 4.0)]) == [4.0, 6.0]
    assert summed([(1.0, 2.0), (5.0,)]) == [6.0, 7.0]
    assert summed([(), (5.0,)]) == [5.0]
    assert summed([]) == []
    assert noise_of([edge("b", "a", 1.0, 2.0), edge("c", "a", 3.0, 1.0)]) == 4.0
    assert noise_of([]) == 0.0


@pytest.mark.parametrize(
    ("weights", "largest"),
    [
        ([1.0], 0.0),
        ([1.0] * 10, 0.0),  # a tenth each, which is not below a tenth
        ([1.0] * 11, 1.0),
        ([100.0] + [1.0] * 11, 1.0),
        ([2.0] + [1.0] * 11, 0.0 + 1.0),
        ([1.2] + [1.0] * 11, 1.2),
        ([], 0.0),
    ],
)
def test_a_crowd_begins_below_a_tenth_of_what_is_left(weights: list[float], largest: float) -> None:
    assert _crowd_weight(weights) == largest


def steps(noises: list[float], sizes: list[int], whole: int = 1000) -> list[Any]:
    """The steps of nodes n0.. in order, each with one edge of so much noise."""
    taken = [
        (edge(f"n{i}", f"x{i}", noise), (f"n{i}",), [edge(f"n{i}", f"x{i}", noise)]) for i, noise in enumerate(noises)
    ]
    bytes_of = {f"n{i}": size for i, size in enumerate(sizes)} | {"rest": whole - sum(sizes)}
    return _with_allowances(taken, bytes_of, [*(f"n{i}" for i in range(len(noises))), "rest"])


def test_a_step_has_the_noise_before_it_and_the_bytes_it_moves() -> None:
    found = steps([4.0, 2.0, 1.0], [10, 20, 30])
    assert [(s.noise, s.moved) for s in found] == [(7.0, 10), (3.0, 20), (1.0, 30)]


@pytest.mark.parametrize(
    ("noises", "sizes", "allowance"),
    [
        ([3.0, 7.0], [500, 0], 10.0),  # 30% of the noise: one edge to blame
        ([2.9, 7.1], [500, 0], 10.0 / 4),  # half of the amplitude where it is not
        ([5.1, 4.9], [15, 0], 510.0),  # more than half, in 1.5% of the bytes: as if it grew tenfold
        ([5.1, 4.9], [16, 0], 10.0),
        ([5.0, 5.0], [15, 0], 10.0),
    ],
)
def test_allowances_have_a_margin(noises: list[float], sizes: list[int], allowance: float) -> None:
    assert steps(noises, sizes)[0].allowance == pytest.approx(allowance)


def test_a_step_is_taken_no_sooner_than_the_one_before_it() -> None:
    found = steps([1.0] * 20 + [900.0], [500] + [1] * 20)
    assert [s.allowance for s in found] == sorted((s.allowance for s in found), reverse=True)


def crowd(count: int, size: int, others: int) -> tuple[float, float]:
    """So many equal edges of noise 1, at nodes of `size` bytes, and one node of `others` bytes without noise."""
    edges = [edge(f"n{i}", f"x{i}", 1.0) for i in range(count)]
    decided = dict.fromkeys([f"n{i}" for i in range(count)] + ["rest"], True)
    sizes = {f"n{i}": size for i in range(count)} | {"rest": others}
    return _spread(edges, decided, steps([1.0] * count, [size] * count, size * count + others), sizes)


def test_a_crowd_that_takes_much_of_the_program_is_spread() -> None:
    """Raised at 5% of the bytes, unless that lowers the noise more than (1 - share)^3."""
    spread, at = crowd(100, 10, 0)
    assert at == 100.0 / 4
    # Six of a hundred are the first above 5%: 94 is left of 100, which is more than 0.94^3 of it.
    assert spread == pytest.approx(95.0 / 4)
    assert crowd(100, 1, 10_000) == (0.0, 0.0)  # of 1% of the bytes nothing is too much
    assert crowd(5, 10, 0) == (0.0, 0.0)  # no crowd
    # 20 edges at 30% of the bytes: after the fourth, 6% are moved, and 16/20 is less than 0.94^3 = 0.83.
    assert crowd(20, 15, 700) == (0.0, 0.0)
    assert crowd(20, 30, 400)[0] > 0.0


def test_where_noise_is_spread_the_plan_stays_at_the_crowd() -> None:
    course = Course((), (), {"a": 0.5, "b": 2.0, "never": NEVER, "always": ALWAYS}, {}, {}, spread=0.1, crowd=1.0)
    assert [course.allowed(noise) for noise in (0.05, 0.1, 0.2)] == [1.0, 0.1, 0.2]
    assert [course.is_high(name, 0.05) for name in ("a", "b", "never", "always", "else")] == [
        False,
        True,
        False,
        True,
        True,
    ]
    assert [course.is_high(name, 0.5) for name in ("a", "b")] == [False, True]
    assert [course.is_high(name, 0.49) for name in ("a", "b")] == [True, True]


def plain_order(edges: list[MeasuredEdge], low: set[str], pinned: set[str]) -> list[tuple[MeasuredEdge, set[str]]]:
    """The largest active edge first, with all low nodes that round it, by looking at all edges each time."""
    found, skipped = [], set[int]()
    low = set(low)
    while True:
        active = [
            (-e.weight, i) for i, e in enumerate(edges) if low & set(e.nodes) and e.weight > 0 and i not in skipped
        ]
        if not active:
            return found
        _, i = min(active)
        nodes = low & set(edges[i].nodes)
        skipped.add(i)
        if not nodes & pinned:
            found.append((edges[i], nodes))
            low -= nodes


@pytest.mark.parametrize("seed", range(8))
def test_the_course_is_that_of_a_plain_search(seed: int) -> None:
    draw = random.Random(seed)
    names = [f"n{i}" for i in range(15)]
    edges = [
        edge(
            names[j],
            names[draw.randrange(j)],
            draw.choice([0.0, 1e-6, 1e-4, 1e-3, 0.1]),
            movers=tuple(draw.sample(names, draw.randrange(2))),
        )
        for j in draw.choices(range(1, 15), k=25)
    ]
    decided = {name: draw.random() < 0.8 for name in names}
    pinned = set(draw.sample(names, 2)) if seed % 2 else set()
    course = course_of(edges, decided, pinned, (), dict.fromkeys(names, 1))
    expected = plain_order(edges, {n for n, low in decided.items() if low}, pinned)
    assert [(step.edge, set(step.nodes)) for step in course.steps] == expected


def test_budgets_and_allowances_are_inverse() -> None:
    assert allowance_of(40.0) == pytest.approx(0.25e-4)
    assert allowance_of(20.0, margin=1.0) == pytest.approx(0.01)
    assert budget_of(allowance_of(33.0)) == pytest.approx(33.0)
    assert [decibels(0.0), decibels(-1.0), decibels(0.01), decibels(LOST), decibels(LOST / 10)] == [
        INF, INF, pytest.approx(20.0), -INF, pytest.approx(-290.0),
    ]  # fmt: skip
    assert (budget_of(0.0), budget_of(LOST)) == (INF, -INF)


def plan(noise: dict[str, float], budget: float = 40.0, sizes: int = 1000) -> RoundingPlan:
    edges = [edge(name, f"x_{name}", value) for name, value in noise.items()]
    course = course_of(edges, dict.fromkeys(noise, True), (), (), dict.fromkeys(noise, sizes))
    return RoundingPlan(course, "float16", budget, allowance_of(budget))


def test_reasons_say_whether_an_edge_is_too_much_alone_or_with_others() -> None:
    alone = plan({"a": 1e-2, "b": 1e-9}).verdict("a")
    assert alone is not None
    assert "alone leaves 20 dB at output 0, below the budget of 40" in alone.reason
    assert (alone.evidence, alone.limit) == (pytest.approx(20.0), 40.0)
    near = plan({"a": 0.5e-4, "b": 0.3e-4}).verdict("a")
    assert near is not None
    assert "leaves 43 dB at output 0, and with all smaller edges 41, too near the budget of 40" in near.reason
    lost = plan({"a": LOST, "b": 1e-9}).verdict("a")
    assert lost is not None
    assert "makes NaN or Inf at output 0" in lost.reason
    quiet = plan({"a": 1e-9, "b": 1e-9})
    assert quiet.verdict("a") is None
    assert quiet.low_reason("a") == (f"its rounding costs {90:.3g} dB; the budget is 40", pytest.approx(90.0))
    assert plan({"a": 0.0}).low_reason("a") == ("its rounding changes no output", INF)


def test_the_summary_has_the_ten_loudest() -> None:
    made = plan({f"n{i}": 1e-9 * (i + 1) for i in range(12)} | {"silent": 0.0})
    summary = made.summary()
    assert [cost.node for cost in summary.edges] == [f"n{i}" for i in range(11, 1, -1)]
    assert made.predicted_db == pytest.approx(decibels(sum(1e-9 * (i + 1) for i in range(12))))
    assert summary.spread is False


def test_the_margin_is_half_of_the_error() -> None:
    assert course_module.MARGIN == 0.5
