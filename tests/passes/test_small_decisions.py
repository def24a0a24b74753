"""Small questions that plans rest on: who magnifies, who removes offsets, what fits, what differs, what work is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import polars as pl
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from calibcast.calib import RangeTable, calibrate
from calibcast.calib.range_diff import range_diff
from calibcast.passes import PrecisionPlan, TensorFacts, classify
from calibcast.passes.plan_diff import decision_diff, plan_diff
from calibcast.passes.rescaling.checking import _same
from calibcast.passes.rescaling.measures import Measures
from calibcast.passes.sensitivity import magnified_tensors, offset_free_nodes
from calibcast.passes.shares import LossTable, losses
from calibcast.passes.tensor_diff import tensor_decision_diff
from calibcast.passes.weights import _fits
from calibcast.passes.work import work_of
from torch import fx, nn
from torch.export import ExportedProgram

INF, NAN = math.inf, math.nan
X = torch.linspace(0.5, 2.0, 32).reshape(4, 8)


class Net(nn.Module):
    def __init__(self, function: Callable[..., Any], weight: torch.Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.ones(8, 8) if weight is None else weight)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.function(x, y, self.w)


def exported(function: Callable[..., Any]) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(Net(function).eval(), (X, X.clone()))


def names_of(program: ExportedProgram) -> dict[fx.Node, str]:
    return {n: n.name for n in program.graph.nodes if n.op in {"placeholder", "call_function"}}


@pytest.mark.parametrize(
    ("function", "free"),
    [
        (lambda x, y, w: x.sin() * y, True),
        (lambda x, y, w: x.sin() + y, False),
        (lambda x, y, w: x.sin().reshape(-1) * 2, True),
        (lambda x, y, w: x.sin().reshape(-1) + 2, False),
        (lambda x, y, w: x.sin().to(torch.float64) - 1, False),
        (lambda x, y, w: x.sin() @ w, False),  # weights may remove an offset
        (lambda x, y, w: x.sin() @ w.t(), False),
        (lambda x, y, w: x.sin() @ y.t(), True),  # another activation does not
        (lambda x, y, w: F.layer_norm(x.sin(), (8,)), False),
        (lambda x, y, w: x.sin().relu(), True),
        (lambda x, y, w: x.sin().split(4, -1)[0] * 2, True),
        (lambda x, y, w: x.sin().split(4, -1)[1] - 2, False),
        (lambda x, y, w: F.scaled_dot_product_attention(x.sin()[None], y[None], y[None]), True),
        (lambda x, y, w: (x.sin() * y, y.expand_as(x.sin())), True),
    ],
)
def test_an_offset_counts_where_a_reader_may_remove_it(function: Callable[..., Any], free: bool) -> None:
    program = exported(lambda *args: function(*args))
    if any(n.op == "output" and any(a.name.startswith("sin") for a in n.all_input_nodes) for n in program.graph.nodes):
        raise AssertionError("the sine is an output")
    found = offset_free_nodes(names_of(program), {"p_w"})
    assert ("sin" in found) is free


def test_outputs_may_be_used_in_any_way() -> None:
    assert "sin" not in offset_free_nodes(names_of(exported(lambda x, y, w: x.sin())), {"p_w"})


SMALL = 2.0**-16


def magnified(function: Callable[..., Any], **smallest: float) -> set[str]:
    """The nodes that are found; all have values down to 2^-16 but for those given."""
    program = exported(function)
    evidence = {(n.name, 0): TensorFacts(n.name, smallest=smallest.get(n.name, SMALL)) for n in program.graph.nodes}
    return {name for name, _ in magnified_tensors(names_of(program), evidence, torch.float16)}


def test_small_values_count_under_a_division_or_a_logarithm() -> None:
    assert magnified(lambda x, y, w: x / y) == {"y"}
    assert magnified(lambda x, y, w: x.log() + y) == {"x"}
    assert magnified(lambda x, y, w: x.sqrt().reciprocal() + y) == {"x", "sqrt"}
    assert magnified(lambda x, y, w: x.reshape(-1).rsqrt() + y.sum()) == {"x", "reshape"}
    assert magnified(lambda x, y, w: x**-2) == magnified(lambda x, y, w: x**-0.25) == {"x"}
    assert magnified(lambda x, y, w: x**0.25) == magnified(lambda x, y, w: x**0.0) == set()
    assert magnified(lambda x, y, w: x**2) == set()
    assert magnified(lambda x, y, w: x + y) == set()
    # Through a sum, whose result is as small; not where the sum is not.
    assert magnified(lambda x, y, w: (x + y).log()) == {"x", "y", "add"}
    assert magnified(lambda x, y, w: (x + y).log(), add=1.0) == set()
    assert magnified(lambda x, y, w: (x + y).log(), x=1.0) == {"y", "add"}


def test_what_is_normal_in_the_low_type_is_not_small() -> None:
    normal = 2.0**-14
    assert magnified(lambda x, y, w: x.log(), x=normal) == set()
    assert magnified(lambda x, y, w: x.log(), x=normal * 0.99) == {"x"}
    program = exported(lambda x, y, w: x.log())
    assert magnified_tensors(names_of(program), {("x", 0): TensorFacts("x", smallest=SMALL)}, torch.bfloat16) == set()
    assert magnified_tensors(names_of(program), {}, torch.float16) == set()


@pytest.mark.parametrize(
    ("values", "low", "fits"),
    [
        ([1.0, -2.0], torch.float16, True),
        ([65504.0, -65504.0], torch.float16, True),
        ([65519.0], torch.float16, True),  # rounds down
        ([65520.0], torch.float16, False),
        ([-65520.0, 1.0], torch.float16, False),
        ([INF, NAN, -INF], torch.float16, True),  # stay what they are
        ([INF, 70000.0], torch.float16, False),
        ([NAN, -70000.0], torch.float16, False),
        ([70000.0], torch.bfloat16, True),
        ([3.4e38], torch.bfloat16, False),
        ([], torch.float16, True),
    ],
)
def test_a_weight_fits_where_no_finite_value_becomes_infinite(
    values: list[float], low: torch.dtype, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.tensor(values)
    assert _fits(tensor, low) is fits
    monkeypatch.setattr("calibcast.passes.weights._CHUNK", 2)
    assert _fits(torch.cat([torch.ones(3), tensor, torch.ones(2)]), low) is fits
    assert _fits(torch.cat([torch.ones(1), tensor]), low) is fits


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), True),
        (torch.tensor([1.0, NAN]), torch.tensor([NAN, 1.0]), False),
        (torch.tensor([1.0]), torch.tensor([1.0 + 2**-23]), False),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.tensor([1]), torch.tensor([1]), True),
        (torch.tensor([1]), torch.tensor([2]), False),
        (3, 3, True),
        (3, 4, False),
        (torch.tensor([0.0]), torch.tensor([-0.0]), True),
    ],
)
def test_results_are_the_same_bits_or_both_nan(one: Any, other: Any, same: bool) -> None:
    assert _same(one, other) is same


def test_work_is_that_of_products_at_the_exported_sizes() -> None:
    program = exported(lambda x, y, w: (x @ w).relu() + F.linear(y, w))
    work = {n.name: work_of(n) for n in program.graph.nodes}
    assert (work["matmul"], work["linear"]) == (2 * 4 * 8 * 8, 2 * 4 * 8 * 8)
    assert all(count == 0 for name, count in work.items() if name not in {"matmul", "linear"})
    # A call that its operator refuses has no known work.
    (node,) = (n for n in program.graph.nodes if n.name == "matmul")
    node.args = (node.args[0], node.args[0])
    assert work_of(node) == 0


def ranges_of(program: ExportedProgram, *batches: tuple[torch.Tensor, torch.Tensor]) -> RangeTable:
    return calibrate(program, list(batches), progress=False, rounding_batches=0)


def test_measures_tell_zero_from_what_was_not_seen() -> None:
    """All zeros are 0; what is only NaN, or has no element that is finite, is not known."""

    def function(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> Any:
        return x * 0.0, y - y + NAN, x + 1.0, x.log() * 0 + (x - x).log()

    program = exported(function)
    made = Measures.of(program, ranges_of(program, (X, X)))
    absmax = {name: float(made.absmax[row]) for (name, output), row in made.rows.items()}
    smallest = {name: float(made.smallest[row]) for (name, output), row in made.rows.items()}
    assert (absmax["mul"], smallest["mul"]) == (0.0, 0.0)
    assert (absmax["add"], smallest["add"]) == (pytest.approx(NAN, nan_ok=True),) * 2
    assert (absmax["add_1"], smallest["add_1"]) == (3.0, 1.5)
    assert (absmax["x"], smallest["x"]) == (2.0, 0.5)
    assert float(made.bin_zero.sum()) == 0.0
    tiny = Measures.of(program, ranges_of(program, (X * 0 + 1e-40, X)))
    assert tiny.bin_zero[tiny.rows["x", 0]] == 32.0  # below the normal numbers, and not zero


def frame_of(program: ExportedProgram, x: torch.Tensor, histogram: bool = True) -> pl.DataFrame:
    return calibrate(program, [(x, X)], progress=False, rounding_batches=0, histogram=histogram).frame


EDGES = torch.tensor([65519.0, 65520.0, 65535.0, 1e5, 2.0**-14, 2.0**-15, 1e-9, 0.0] * 4).reshape(4, 8)


@pytest.mark.parametrize("histogram", [True, False])
def test_losses_bound_what_rounding_really_loses(histogram: bool) -> None:
    """Of values around both ends of float16: bounds hold, and are exact where a power of two divides."""
    program = exported(lambda x, y, w: x.relu())
    row = losses(frame_of(program, EDGES, histogram), torch.float16).filter(pl.col("node") == "x").row(0, named=True)
    overflow = int(EDGES.half().isinf().sum())
    underflow = int(((EDGES != 0) & (EDGES.abs() < 2.0**-14)).sum())
    assert row["overflow_at_least"] <= overflow <= row["overflow"]
    assert row["underflow_at_least"] <= underflow <= row["underflow"]
    assert row["finite"] == 32
    if histogram:
        # 65519 lies in the bin of 65535; what is 65536 or more is certain.
        assert (row["overflow_at_least"], row["overflow"]) == (4, 16)
        assert (row["underflow_at_least"], row["underflow"]) == (8, 8)
    else:
        assert (row["overflow_at_least"], row["overflow"]) == (1, 32)
        assert (row["underflow_at_least"], row["underflow"]) == (1, 28)


@pytest.mark.parametrize(("peak", "over"), [(65519.0, 0), (65520.0, 1)])
def test_an_overflow_begins_half_a_step_above_the_largest(peak: float, over: int) -> None:
    program = exported(lambda x, y, w: x.relu())
    x = X.clone()
    x[0, 0] = peak
    row = losses(frame_of(program, x), torch.float16).filter(pl.col("node") == "x").row(0, named=True)
    assert (row["overflow_at_least"], row["overflow"]) == (over, over)


def test_shares_are_of_all_elements_that_move() -> None:
    program = exported(lambda x, y, w: x.relu() + y)
    found = LossTable(frame_of(program, EDGES), torch.float16)
    both = found.of(frozenset({("x", 0), ("y", 0), ("nowhere", 0)}))
    assert (both.overflow, both.overflow_at_least, both.underflow) == (16 / 64, 4 / 64, 8 / 64)
    assert math.isnan(found.of(frozenset()).overflow)
    assert math.isnan(found.of(frozenset({("p_w", 0)})).overflow)  # a weight does not move


def plans(data_max: float, **more: Any) -> PrecisionPlan:
    program = exported(lambda x, y, w: (x * 300).relu() + y)
    return classify(program, ranges_of(program, (X, X)), data_max=data_max, **more)


def test_plans_differ_where_a_node_flips_or_has_another_rule() -> None:
    low, high = plans(1e4), plans(100.0)
    rows = plan_diff(low, high).rows(named=True)
    assert {row["node"]: row["change"] for row in rows} == {"mul": "to_high", "relu": "to_high", "add": "to_high"}
    assert [(r["precision_old"], r["precision_new"], r["rule_new"], r["rule_old"]) for r in rows] == [
        ("low", "high", "data_max", low["mul"].rule)
    ] * 3
    assert rows[0]["evidence_new"] == 600.0
    assert {row["change"] for row in plan_diff(high, low).rows(named=True)} == {"to_low"}
    other = plans(1e4, nodes_to_exclude=["mul", "relu", "add"])
    assert {row["change"] for row in plan_diff(high, other).rows(named=True)} == {"rule"}
    assert plan_diff(low, low).height == 0


def test_a_plan_names_rescale_where_large_values_keep_nodes_high() -> None:
    """bfloat16 has the range of fp32, and what is rescaled already has had its chance."""
    advice = "3 nodes are high because values are large: `rescale` may make them fit"
    assert str(plans(100.0)).splitlines()[-1].strip() == advice
    others = [plans(1e4), plans(100.0, low_precision_type=torch.bfloat16), replace(plans(100.0), exponents={"x:0": 3})]
    assert all("rescale" not in str(other) for other in others)


def test_nodes_that_one_plan_lacks_are_new_or_gone() -> None:
    """A longer program: its last node is new; the output has no decision."""
    short = exported(lambda x, y, w: x.sin())
    long = exported(lambda x, y, w: x.sin().cos())
    one, other = (classify(p, ranges_of(p, (X, X))) for p in (short, long))
    assert [(r["node"], r["node_old"], r["change"]) for r in plan_diff(one, other).rows(named=True)] == [
        ("cos", None, "new")
    ]
    assert [(r["node"], r["node_old"], r["change"]) for r in plan_diff(other, one).rows(named=True)] == [
        ("cos", "cos", "gone")
    ]


def test_ranges_that_grow_flip_decisions_with_and_without_the_program() -> None:
    program = exported(lambda x, y, w: (x * 300).relu() + y)
    small, large = ranges_of(program, (X * 0.5, X)), ranges_of(program, (X, X))
    for diff, change in ((range_diff(small, large), "to_high"), (range_diff(large, small), "to_low")):
        of_program = decision_diff(diff, program, data_max=512.0)
        assert {r["node"]: r["change"] for r in of_program.rows(named=True)} == {
            "mul": change,
            "relu": change,
            "add": change,
        }
        alone = tensor_decision_diff(diff, data_max=512.0).rows(named=True)
        assert {r["node"]: r["change"] for r in alone} == {"mul": change, "relu": change, "add": change}
        row = alone[0]
        assert (row["precision_old"], row["precision_new"]) == (
            ("low", "high") if change == "to_high" else ("high", "low")
        )
        assert {row["evidence_old"], row["evidence_new"]} == {300.0, 600.0}
        assert row["limit"] == 512.0
        said = row["reason"]
        assert ("reached 600" in said) if change == "to_high" else (said.startswith("no rule that looks at tensors"))
        assert (row["rule_old"], row["rule_new"]) == ((None, "data_max") if change == "to_high" else ("data_max", None))
    assert tensor_decision_diff(range_diff(small, small), data_max=512.0).height == 0
    assert tensor_decision_diff(range_diff(small, large), data_max=1000.0).height == 0
    assert tensor_decision_diff(range_diff(small, large), data_max=100.0).height == 0
