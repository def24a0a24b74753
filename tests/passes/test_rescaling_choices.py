"""What exponents cost, what counts as a gain, where exactness is not shown: each number by hand, from both sides."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from calibcast.passes.number_formats import format_of
from calibcast.passes.rescaling.breaks import _before_growth
from calibcast.passes.rescaling.costs import EXPONENTS, IMPOSSIBLE, REACH, CostReader, Costs, _excess, _Place
from calibcast.passes.rescaling.exactness import refusals
from calibcast.passes.rescaling.judging import Judgement
from calibcast.passes.rescaling.measures import Measures, _importance, _sides, _summed
from calibcast.passes.rescaling.rewriting import Exponents
from calibcast.passes.rescaling.system import Number, Tensor
from torch import nn
from torch.export import ExportedProgram

FP16 = format_of(torch.float16)
BASE = Judgement(high=3, work_low=0.5, bytes_low=0.5, casts=4, bytes_cast=100)


@pytest.mark.parametrize(
    ("changes", "beats"),
    [
        ({}, False),
        ({"work_low": 0.501}, True),
        ({"work_low": 0.5009}, False),
        ({"bytes_low": 0.55}, True),
        ({"bytes_low": 0.549}, False),
        ({"bytes_low": 0.6, "added": 0.04}, True),
        ({"bytes_low": 0.6, "added": 0.06}, False),
        ({"work_low": 0.9, "bytes_low": 0.4995}, True),  # bytes hardly fall
        ({"work_low": 0.9, "bytes_low": 0.498}, False),
        ({"work_low": 0.4999, "bytes_low": 0.9}, False),
        ({"work_low": 0.5 - 1e-10, "bytes_low": 0.9}, True),
    ],
)
def test_a_gain_is_more_work_or_bytes_and_no_loss(changes: dict[str, Any], beats: bool) -> None:
    assert replace(BASE, **changes).beats(BASE) is beats


@pytest.mark.parametrize(
    ("changes", "improves"),
    [
        ({}, False),
        ({"work_low": 0.502}, True),
        ({"work_low": 0.498}, False),
        ({"work_low": 0.498, "bytes_low": 0.9}, False),
        ({"work_low": 0.5005, "bytes_low": 0.51}, False),
        ({"work_low": 0.4995, "bytes_low": 0.53}, True),
        ({"bytes_low": 0.519}, False),
        ({"bytes_low": 0.521}, True),
        ({"bytes_low": 0.55, "cast": 0.04}, False),
        ({"bytes_low": 0.55, "cast": 0.02}, True),
        ({"bytes_low": 0.55, "added": 0.04}, False),
        ({"work_low": 0.9, "loss_db": 6.1}, False),
        ({"work_low": 0.9, "loss_db": 6.0}, True),
    ],
)
def test_a_quiet_gain_is_preferred_then_the_larger(changes: dict[str, Any], improves: bool) -> None:
    assert replace(BASE, **changes).improves(BASE) is improves


def test_what_is_quiet_is_preferred_to_what_is_not() -> None:
    loud = replace(BASE, work_low=1.0, loss_db=9.0)
    assert BASE.improves(loud)
    assert not loud.improves(BASE)
    assert replace(loud, work_low=1.0).improves(replace(loud, work_low=0.9))
    assert str(BASE) == "3 fp32 nodes, 50.0% of the work low, 100 bytes cast"


@pytest.mark.parametrize(
    ("peaks", "before"),
    [
        ([1.0, 256.0], []),
        ([1.0, 257.0], ["a"]),
        ([1.0, 100.0, 257.0], ["b"]),
        ([1.0, 300.0, 60000.0], ["a"]),
        ([1.0, 300.0, 80000.0], ["a", "b"]),
        ([100.0, 1.0, 257.0], ["b"]),
        ([100.0, 1.0, 255.0], []),
        ([1.0], []),
    ],
)
def test_a_stretch_ends_where_a_sum_has_grown_by_256(peaks: list[float], before: list[str]) -> None:
    assert _before_growth(list(zip("abc", peaks, strict=False))) == before


def histogram(**counts: int) -> list[int]:
    """`m3` are magnitudes from 2^-3, `p3` from 2^3."""
    found = [0] * 256
    for name, count in counts.items():
        found[127 + int(name[1:]) * (1 if name[0] == "p" else -1)] = count
    return found


def test_excess_is_the_noise_over_that_of_a_type_without_end() -> None:
    """By plain loops over bins. A step is 2^-10 of a value, and at least 2^-24; what is far below it is lost."""
    rows = [histogram(p0=5), histogram(m14=2, m3=1), histogram(m30=4, m20=4), [9] + [0] * 254 + [9]]
    found = _excess(np.array(rows, np.float64), FP16)
    assert found.shape == (4, 129)
    for row, bins in enumerate(rows):
        for place in (0, 40, 64, 74, 90, 128):
            k = place - 64
            noise = whole = 0.0
            for exponent in range(1, 255):
                least = 2.0 ** (exponent - 127)
                normal = (least * 2.0**-10) ** 2
                lost = min((2.0**-24) ** 2 * 4.0**k, 48 * least**2)
                noise += bins[exponent] * (lost if exponent - 127 - k < -14 else normal)
                whole += bins[exponent] * normal
            assert found[row, place] == pytest.approx(noise / whole if whole else noise)


class Net(nn.Module):
    """x -> linear -> + -> sum, with one weight of two dimensions and one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 4))
        self.b = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, self.w) + self.b
        return (h * 0.5).sum(-1) + 1e-6


@cache
def exported() -> ExportedProgram:
    return torch.export.export(Net(), (torch.ones(2, 4),))


def measures(**rows: tuple[float, float, list[int]]) -> Measures:
    """absmax, smallest and histogram of nodes; all have importance 1, but `linear` has 2."""
    program = exported()
    names = [n.name for n in program.graph.nodes]
    importance = dict.fromkeys(names, 1.0) | {"linear": 2.0}
    absmax, smallest = np.array([r[0] for r in rows.values()]), np.array([r[1] for r in rows.values()])
    histograms = np.array([r[2] for r in rows.values()], np.float64)
    places = {(name, 0): row for row, name in enumerate(rows)}
    return Measures(
        places, absmax, smallest, np.zeros(len(rows)), histograms, {"sum_1": 1e6}, {}, importance,
        frozenset({"mul"}), program,
    )  # fmt: skip


SEEN = {
    "x": (100.0, 1.0, histogram(p0=10)),
    "linear": (2.0**20, 1.0, histogram(p19=10)),
    "p_w": (8.0, 2.0**-10, histogram(p0=10)),
    "add": (1.0, 2.0**-12, histogram(m12=10)),
    "mul": (1.0, 1.0, histogram(p0=10)),
    "sum_1": (0.0, 0.0, histogram()),
}


def cost(name: str, k: int, limit: float = 512.0, floor: float = 0.0, readers: tuple[str, ...] = ()) -> float:
    reader = CostReader(measures(**SEEN), FP16)
    place = _Place(name, frozenset(readers), name == "mul")
    return float(reader._tensor(Tensor(name), Costs(limit, floor), place)[k + REACH])


def test_a_tensor_above_the_limit_costs_what_its_makers_and_readers_do() -> None:
    """2^20 is stored as 2^-11 of itself to be at 512, and costs nothing more from there on."""
    assert EXPONENTS[0] == -64
    assert EXPONENTS[-1] == 64
    assert cost("linear", 10) == 2.0
    assert cost("linear", 11) == 0.0
    assert cost("linear", 10, readers=("add", "mul")) == 4.0
    assert cost("linear", 10, limit=2.0**10) == 0.0
    assert cost("x", 0) == 0.0
    assert cost("x", -2) == 0.0
    assert cost("x", -3) == 1.0
    # A weight is only held to what the type holds.
    assert cost("p_w", -12) == 0.0
    assert cost("p_w", -13) == 1.0


def test_what_leaves_the_normal_numbers_of_fp32_is_impossible() -> None:
    """Below 2^-126, or above 2^120, unless it stays as it is."""
    assert cost("add", 64) == 0.0
    assert cost("linear", 64) == 0.0
    assert cost("x", -64) == 1.0
    tiny = measures(x=(1.0, 2.0**-100, histogram(m100=3)), add=(2.0**100, 2.0**100, histogram(p100=3)))
    reader = CostReader(tiny, FP16)

    def at(name: str, k: int) -> float:
        found = reader._tensor(Tensor(name), Costs(math.inf, 0.0), _Place(name, frozenset(), False))
        return float(found[k + REACH])

    assert [at("x", 26), at("x", 27), at("add", -20), at("add", -21)] == [0.0, IMPOSSIBLE, 0.0, IMPOSSIBLE]
    assert [at("unknown", 0), at("unknown", 1)] == [0.0, IMPOSSIBLE]


def test_all_zeros_cost_nothing() -> None:
    assert [cost("sum_1", k) for k in (-64, 0, 64)] == [0.0] * 3


def test_noise_below_the_normal_numbers_costs_up_to_twice_its_share() -> None:
    """2^-12 has 4 times the step that it had as a normal number at 2^-16: 12 dB of the 20 that cost a whole node."""
    assert cost("add", 2, floor=0.5) == 0.0
    assert cost("add", 4, floor=0.5) == pytest.approx(0.5 * 20 * math.log10(4) / 20)
    assert cost("add", 4, floor=0.5, readers=("linear",)) == pytest.approx(1.5 * math.log10(4))
    assert cost("add", 60, floor=0.5) == pytest.approx(0.5 * 2)
    # Sums alone read it: only its effect on the sum counts. Nor does a vector count, such as a bias.
    assert cost("mul", 60, floor=0.5) == 0.0


def test_a_weight_is_as_faint_as_its_faintest_row() -> None:
    reader = CostReader(measures(**SEEN), FP16)
    row = reader._measures.rows["p_w", 0]
    lost = reader._lost(_Place("p_w", frozenset(), False), row, True)
    assert lost[REACH] == pytest.approx(10 * math.log10(1 + 2.0**-28) / 20)
    # Mean squares of 1, in steps of 2^-24 times 2^14: as large as those of 2^-10 of itself.
    assert lost[REACH + 14] == pytest.approx(10 * math.log10(2) / 20)
    assert lost[REACH + 60] == 2.0


def test_sums_and_squares_of_a_reader_must_fit() -> None:
    """1e6 is summed inside: 2^-4 of it is 62500, which fits."""
    assert cost("mul", 3, readers=("sum_1",)) == 1.0
    assert cost("mul", 4, readers=("sum_1",)) == 0.0
    assert cost("mul", 3, readers=("add",)) == 0.0


def number(node: str, argument: str, value: float, k: int, added: bool = False) -> float:
    reader = CostReader(measures(**SEEN), FP16)
    return float(reader._number(Number(node, argument, value), added)[k + REACH])


def test_a_number_costs_a_node_where_the_type_does_not_hold_it_in_full() -> None:
    assert number("mul", "other", 0.5, 0) == 0.0
    assert number("mul", "other", 0.5, 13) == 0.0
    assert number("mul", "other", 0.5, 14) == 1.0
    assert number("mul", "other", -0.5, 14) == 1.0
    assert number("mul", "other", 0.5, -16) == 0.0
    assert number("mul", "other", 0.5, -17) == 1.0
    assert number("mul", "other", 2.0**-100, 26) == 1.0
    assert number("mul", "other", 2.0**-100, 27) == IMPOSSIBLE + 1.0
    assert number("mul", "other", 2.0**100, -28) == IMPOSSIBLE + 1.0


def test_an_added_multiplication_costs_a_tenth_of_its_maker() -> None:
    assert number("linear_rescaled", "other", 1.0, 0, added=True) == 0.0
    assert number("linear_rescaled", "other", 1.0, 5, added=True) == pytest.approx(1e-3 + 0.2)
    assert number("elsewhere_rescaled", "other", 1.0, -5, added=True) == pytest.approx(1e-3)


@pytest.mark.parametrize(("smallest", "cost_"), [(2048e-6, 0.0), (2047e-6, 1.0)])
def test_an_eps_that_the_type_loses_beside_its_tensor_costs_nothing(smallest: float, cost_: float) -> None:
    made = measures(**SEEN | {"sum_1": (1.0, smallest, histogram(m9=3))})
    assert CostReader(made, FP16)._number(Number("add_1", "other", 1e-6), False)[REACH] == cost_
    assert CostReader(made, FP16)._number(Number("mul", "other", 1e-6), False)[REACH] == 1.0


def test_loss_is_that_of_the_tensor_where_noise_grows_most() -> None:
    reader = CostReader(measures(**SEEN), FP16)

    def loss(low: set[str], **k: int) -> float:
        exponents = Exponents({(name, 0): count for name, count in k.items()})
        return reader.loss_db(exponents, frozenset(low))

    assert loss({"add"}, add=4) == pytest.approx(20 * math.log10(4))
    assert loss({"mul"}, add=4) == pytest.approx(20 * math.log10(4))  # which reads it
    assert loss({"linear"}, add=4) == 0.0
    assert loss({"add"}, add=2) == 0.0
    assert loss({"add", "linear"}, add=4, linear=39) == pytest.approx(20 * math.log10(2.0**6))
    assert loss({"add", "linear"}, add=4, linear=60) == 40.0  # the most that is told
    assert loss({"add"}, add=65) == 0.0
    assert loss({"sum_1"}, mul=60) == 0.0


def test_importance_is_the_share_of_bytes_and_of_work() -> None:
    program = exported()
    found = _importance(program)
    nodes = [n.name for n in program.graph.nodes]
    least = 1e-4 / len(nodes)
    # linear, add and mul write 8 elements each, sum and the last add 2 each; linear alone multiplies matrices.
    assert found["linear"] == pytest.approx(least + 1 + 8 / 28)
    assert found["mul"] == pytest.approx(least + 8 / 28)
    assert found["sum_1"] == pytest.approx(least + 2 / 28)
    assert found["p_w"] == pytest.approx(least)


def test_what_only_sums_read_is_summed() -> None:
    class Sums(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            only, moved, both, out = x.sin(), x.cos(), x.tan(), x.exp()
            y = only + moved.reshape(-1).reshape(2, 4) + both + out
            return y.sum() + both.mean(), out

    found = _summed(torch.export.export(Sums(), (torch.ones(2, 4),)))
    assert {"sin", "cos"} <= found
    assert not {"tan", "exp", "add_2"} & found


def test_sides_are_mean_squares_without_those_that_are_almost_zero() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1e-5, 0.0]])
    assert sorted(_sides(weight)) == pytest.approx([2.5, (1 + 9 + 1e-10) / 3, (4 + 16) / 3, 12.5])
    kept = torch.tensor([[1.0, 0.0], [0.0, 2e-4]])
    assert len(_sides(kept)) == 4
    assert len(_sides(torch.tensor([[1.0, 0.0], [0.0, 0.9e-4]]))) == 2
    assert _sides(torch.zeros(0, 3)).size == 0


def refused(function: Any, k: dict[str, int], **known: Any) -> list[str]:
    """Reasons; the tensors of all nodes go down to `smallest`."""

    class Net(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return function(x, y)

    program = torch.export.export(Net(), (torch.ones(4, 4), torch.ones(4, 4)))
    names = [n.name for n in program.graph.nodes if n.op != "output"]
    rows = {(name, 0): row for row, name in enumerate(names)}
    smallest = np.array([known.get(name, 1.0) for name in names])
    base = measures(**SEEN)
    made = replace(
        base, rows=rows, smallest=smallest, program=program, largest={names[-1]: known.get("largest", 1.0)},
        least={names[-1]: known.get("least", 0.0)},
    )  # fmt: skip
    exponents = Exponents({(names[-1] if name == "out" else name, 0): count for name, count in k.items()})
    return [refusal.reason for refusal in refusals(made, exponents) if refusal.node == names[-1]]


@pytest.mark.parametrize(
    ("least", "k", "shown"),
    [
        (2.0**-78, 0, True), (2.0**-79, 0, False), (2.0**-70, 8, True), (2.0**-70, 9, False), (2.0**-79, -9, False),
        (2.0**-78, -9, True), (0.0, 9, True),
    ],
)  # fmt: skip
def test_sums_of_products_show_nothing_that_vanished(least: float, k: int, shown: bool) -> None:
    """2^-78 is 2^48 times what is lost below 2^-126, where it is stored, and where it was."""
    found = refused(torch.matmul, {"x": 3, "out": k}, matmul=least)
    assert (found == []) is shown
    assert refused(torch.matmul, {}, matmul=2.0**-100) == []


@pytest.mark.parametrize(("out", "shown"), [(-1, False), (0, True), (1, True)])
def test_products_that_are_stored_larger_must_not_have_vanished(out: int, shown: bool) -> None:
    found = refused(torch.mul, {"x": 1, "out": out}, x=2.0**-64, y=2.0**-64)
    assert (found == []) is shown
    assert refused(torch.add, {"x": 1, "out": out}, x=2.0**-64, y=2.0**-64) == []


@pytest.mark.parametrize(
    ("largest", "k", "shown"),
    [(2.0**124, -1, False), (2.0**123, -1, True), (2.0**127, 1, True), (2.0**128, 1, False)],
)
def test_sums_of_squares_stay_below_the_largest(largest: float, k: int, shown: bool) -> None:
    found = refused(lambda x, y: x.var(-1), {"x": k, "out": 2 * k}, largest=largest)
    assert (found == []) is shown


@pytest.mark.parametrize(
    ("least", "k", "shown"),
    [(2.0**-76, 1, True), (2.0**-77, 1, False), (2.0**-78, -1, True), (2.0**-79, -1, False)],
)
def test_variances_stay_above_what_sums_lose(least: float, k: int, shown: bool) -> None:
    found = refused(lambda x, y: F.layer_norm(x, (4,), eps=1e-30), {"x": k}, least=least)
    assert (found == []) is shown
    assert refused(lambda x, y: F.layer_norm(x, (4,), eps=2.0**-76), {"x": 1}) == []
    assert refused(lambda x, y: F.layer_norm(x, (4,), eps=2.0**-77), {"x": 1}) != []
