"""What an exponent costs, tensor by tensor, against numbers worked out by hand. They are powers of two, so exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from calibcast.passes.number_formats import FLOAT16
from calibcast.passes.rescaling.costs import EXPONENTS, IMPOSSIBLE, REACH, CostReader, Costs, _excess
from calibcast.passes.rescaling.measures import Measures
from calibcast.passes.rescaling.rewriting import Exponents
from calibcast.passes.rescaling.solving import solve
from calibcast.passes.rescaling.system import Number, Tensor, system_of
from torch import nn
from torch.export import ExportedProgram

NAN = math.nan
WEIGHED = Costs(limit=512.0, floor=0.5)


def program_of(function: Callable[..., Any]) -> ExportedProgram:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> Any:
            return function(x, self.w, self.b)

    return torch.export.export(Net(), (torch.ones(2, 4),))


PROGRAM = program_of(lambda x, w, b: (nn.functional.linear(x, w, b).relu() * 3.0 + 0.25).sum(-1).sqrt())
NAMES = [node.name for node in PROGRAM.graph.nodes if node.op != "output"]
# What a node weighs: linear 1, relu 2, mul 4, and so on; the rest nothing.
IMPORTANCE = dict.fromkeys(NAMES, 0.0) | {
    "linear": 1.0,
    "relu": 2.0,
    "mul": 4.0,
    "add": 8.0,
    "sum_1": 16.0,
    "sqrt": 32.0,
}


def bins(*magnitudes: float) -> list[float]:
    counts = [0.0] * 256
    for magnitude in magnitudes:
        counts[math.frexp(magnitude)[1] + 126] += 1
    return counts


def reader(program: ExportedProgram = PROGRAM, **tensors: tuple[float, ...]) -> CostReader:
    """tensors: magnitudes of each; one of 1 where none are given. Nothing at all: not seen. 0: all is 0."""
    names = [node.name for node in program.graph.nodes if node.op != "output"]
    found = {name: tensors.get(name, (1.0,)) for name in names}
    measures = Measures(
        {(name, 0): row for row, name in enumerate(found)},
        np.array([max(values, default=NAN) for values in found.values()]),
        np.array([min(values, default=NAN) for values in found.values()]),
        np.array([float(name == "subnormal") for name in found]),
        np.array([bins(*filter(None, values)) for values in found.values()]),
        {"sum_1": 1024.0}, {}, {name: IMPORTANCE.get(name, 0.0) for name in names}, frozenset({"mul"}), program,
    )  # fmt: skip
    return CostReader(measures, FLOAT16)


def costs(
    found: CostReader, kind: Tensor | Number, program: ExportedProgram = PROGRAM, **held: Any
) -> dict[int, float]:
    """The cost of each exponent of one tensor or number."""
    system = system_of(program)
    if isinstance(kind, Number):
        row = found._number(kind, held.get("added", False))
    else:
        row = found._tensor(kind, held.get("costs", WEIGHED), found._place(kind, system))
    return dict(zip(EXPONENTS.tolist(), row.tolist(), strict=True))


def turns(row: dict[int, float]) -> list[tuple[int, float]]:
    """Where the cost changes, from the smallest exponent on: the first exponent of each cost."""
    return [(k, cost) for k, cost in row.items() if k == -REACH or cost != row[k - 1]]


def test_exponents_reach_64() -> None:
    assert EXPONENTS.tolist() == list(range(-64, 65))


def test_a_tensor_that_was_not_seen_is_left_as_it_is() -> None:
    for found in (reader(relu=()), reader(program_of(lambda x, w, b: x * 2))):
        row = costs(found, Tensor("relu"))
        assert row == {k: 0.0 if k == 0 else IMPOSSIBLE for k in range(-64, 65)}
    assert costs(reader(relu=(0.0,)), Tensor("relu")) == dict.fromkeys(range(-64, 65), 0.0)


def test_subnormal_numbers_of_float32_are_left_as_they_are() -> None:
    found = reader()
    found._measures.bin_zero[found._measures.rows["relu", 0]] = 1.0
    assert costs(found, Tensor("relu"))[1] == IMPOSSIBLE


def test_a_tensor_above_the_limit_costs_its_maker_and_its_readers() -> None:
    """`relu` weighs 2 and its reader `mul` 4. 2^15 is above 512 until it is stored as 2^-6 of itself."""
    row = costs(reader(relu=(2.0**15,)), Tensor("relu"))
    assert turns(row)[:2] == [(-64, 6.0), (6, 0.0)]
    assert turns(costs(reader(relu=(2.0**15 + 1,)), Tensor("relu")))[1][0] == 7
    # 2^0 is stored 2^9 times as large at most, and as 2^-14 of itself with all its digits.
    row = costs(reader(), Tensor("relu"))
    assert turns(row)[:2] == [(-64, 6.0), (-9, 0.0)]
    assert turns(row)[2][0] == 15


def test_below_the_normal_numbers_each_halving_doubles_the_noise() -> None:
    """By 6.02 dB of 20, times the floor and the weight; not more than 40 dB."""
    row = costs(reader(), Tensor("relu"))
    octave = 20 * math.log10(2) / 20
    for k, lost in ((14, 0.0), (15, octave), (16, 2 * octave), (20, 6 * octave), (21, 2.0), (64, 2.0)):
        assert row[k] == pytest.approx(0.5 * 6 * lost), k
    other = costs(reader(), Tensor("relu"), costs=Costs(512.0, 2.0))
    assert other[15] == pytest.approx(2 * 6 * octave)
    # What only sums read has an effect on the sum alone.
    assert costs(reader(), Tensor("mul"))[64] == 0.0


def test_float32_itself_must_hold_all_with_room() -> None:
    row = costs(reader(relu=(2.0**100, 2.0**-100)), Tensor("relu"))
    assert [k for k, cost in row.items() if cost < IMPOSSIBLE] == list(range(-20, 27))
    # As it is stored it may stay, whatever it holds.
    row = costs(reader(relu=(2.0**121, 2.0**-126)), Tensor("relu"))
    assert [k for k, cost in row.items() if cost < IMPOSSIBLE] == [0]


def test_sums_that_readers_form_must_fit() -> None:
    """`add` is read by a sum that reaches 2^10: stored 2^6 times as large it is above 65504, and `sum_1` weighs 16.

    `add` weighs 8, and 24 with its reader: above the limit from 2^-10 on.
    """
    row = costs(reader(), Tensor("add"))
    assert [row[k] for k in (-5, -6, -9, -10)] == [0.0, 16.0, 16.0, 40.0]
    squares = program_of(lambda x, w, b: nn.functional.rms_norm(x.relu(), (4,)))
    found = reader(squares)
    (norm,) = (node.name for node in squares.graph.nodes if "norm" in node.name)
    found._measures.largest.update({norm: 1024.0})  # type: ignore[attr-defined]
    found._measures.importance[norm] = 16.0  # type: ignore[index]
    row = costs(found, Tensor("relu"), squares)
    assert [row[k] for k in (-2, -3, -9)] == [0.0, 16.0, 16.0]  # 2^10 4^3 is 2^16


def test_a_weight_is_held_to_what_the_type_holds() -> None:
    """And to its faintest row or column, whose mean square is 1: rounding takes 2^-20 of it, below 2^-14 2^-48."""
    found = reader(p_w=(2.0**12,), p_b=(2.0**12,))
    row = costs(found, Tensor("p_w"))
    assert [row[k] for k in (-20, -4)] == [pytest.approx(1.0)] * 2
    assert max(row[k] for k in range(-3, 1)) < 1e-9
    for k in (10, 14, 20):
        assert row[k] == pytest.approx(0.5 * 1.0 * min(2.0, math.log10(1 + 4.0 ** (k - 14)) / 2), abs=1e-6)
    # The vector of a bias loses nothing that counts.
    row = costs(found, Tensor("p_b"))
    assert [row[k] for k in (-4, -3, 64)] == [1.0, 0.0, 0.0]


def test_without_histograms_nothing_is_lost() -> None:
    found = reader()
    bare = CostReader(replace(found._measures, histograms=None), FLOAT16)
    assert costs(bare, Tensor("relu"))[64] == 0.0


def test_numbers_must_be_normal_in_the_type_where_they_count() -> None:
    """`mul` weighs 4. Its number 3 overflows as 3 2^15, and is subnormal as 3 2^-16."""
    row = costs(reader(), Number("mul", "other", 3.0))
    assert turns(row) == [(-64, 4.0), (-14, 0.0), (16, 4.0)]
    assert turns(costs(reader(), Number("mul", "other", -3.0))) == turns(row)
    row = costs(reader(), Number("mul", "other", 2.0**-100))
    assert [k for k, cost in row.items() if cost < IMPOSSIBLE] == list(range(-64, 27))
    row = costs(reader(), Number("mul", "other", 2.0**100))
    assert [k for k, cost in row.items() if cost < IMPOSSIBLE] == list(range(-27, 65))


@pytest.mark.parametrize(("least", "absorbed"), [(2.0**9, True), (2.0**9 - 1, False), (0.0, False)])
def test_a_number_far_below_what_it_is_added_to_does_not_count(least: float, absorbed: bool) -> None:
    """A quarter is below 2^-11 of 512."""
    row = costs(reader(mul=(2.0**10, least)), Number("add", "other", 0.25))
    assert (row[64] == 0.0) is absorbed
    assert turns(costs(reader(mul=(2.0**10, least)), Number("add", "other", -0.25))) == turns(row)
    assert costs(reader(relu=(2.0**10, 2.0**9)), Number("mul", "other", 0.25))[64] == 4.0  # a factor always counts


def test_an_added_multiplication_costs_something_unless_it_does_nothing() -> None:
    row = costs(reader(), Number("relu_rescaled", "other", 1.0), added=True)
    assert row == {k: 0.0 if k == 0 else pytest.approx(1e-3 + 0.2) for k in range(-64, 65)}
    row = costs(reader(), Number("elsewhere_rescaled", "other", 1.0), added=True)
    assert row[1] == pytest.approx(1e-3)


def test_costs_of_one_form_add_up_and_small_exponents_are_preferred() -> None:
    system = system_of(PROGRAM)
    solutions = solve(system)
    found = reader(relu=(2.0**15,))
    table = found.table(solutions, WEIGHED)
    assert len(table.forms) == len(set(table.forms)) == len(table.costs)
    for form, row in zip(table.forms, table.costs, strict=True):
        kinds = [kind for kind, own in zip(system.kinds, solutions.forms, strict=True) if own == form and kind]
        parts = [np.array(list(costs(found, kind).values())) for kind in kinds]
        np.testing.assert_allclose(row, sum(parts) + 1e-9 * np.abs(EXPONENTS), rtol=1e-12)
    assert any(sum(own == form for own in solutions.forms) > 1 for form in table.forms)
    nothing = solve(system, held=range(len(system.kinds)))
    assert found.table(nothing, WEIGHED).costs.shape == (0, 129)


def test_a_break_parts_the_readers_of_a_tensor() -> None:
    """`relu` is read by `mul` as a product, and by `neg` as it is. Each place costs its own readers."""
    program = program_of(lambda x, w, b: (lambda y: (y * 3.0, y.neg()))(x.relu()))
    system = system_of(program, {"relu": frozenset({"mul"})})
    found = reader(program)
    own, product = (found._place(kind, system) for kind in (Tensor("relu"), Tensor("relu_rescaled")))
    assert (own.name, own.readers, own.summed) == ("relu", {"neg"}, False)
    assert (product.name, product.readers, product.summed) == ("relu", {"mul"}, False)
    summed = program_of(lambda x, w, b: (lambda y: (y + x, y.neg()))(x.relu()))
    system = system_of(summed, {"relu": frozenset({"add"})})
    assert reader(summed)._place(Tensor("relu_rescaled"), system).summed


@pytest.mark.parametrize(
    ("tensors", "low", "loss"),
    [
        ({("relu", 0): 14}, {"relu"}, 0.0),
        ({("relu", 0): 16}, {"relu"}, 2 * 20 * math.log10(2)),
        ({("relu", 0): 16}, {"mul"}, 2 * 20 * math.log10(2)),  # its reader rounds it, too
        ({("relu", 0): 16}, {"linear", "add"}, 0.0),
        ({("relu", 0): 65}, {"relu"}, 0.0),  # beyond what is weighed
        ({("relu", 0): 64}, {"relu"}, 40.0),
        ({("relu", 0): 16, ("linear", 0): 15}, {"relu", "linear"}, 2 * 20 * math.log10(2)),
        ({("mul", 0): 30}, {"mul"}, 0.0),  # an addend
        ({("nowhere", 0): 30}, {"nowhere"}, 0.0),
        ({("p_w", 0): 14}, {"linear"}, 10 * math.log10(2)),
    ],
)
def test_loss_is_that_of_the_tensor_where_noise_grows_most(
    tensors: dict[tuple[str, int], int], low: set[str], loss: float
) -> None:
    assert reader().loss_db(Exponents(tensors), frozenset(low)) == pytest.approx(loss)


def test_loss_behind_an_added_multiplication_is_that_of_its_readers() -> None:
    product = Exponents({("relu_rescaled", 0): 16}, readers={"relu": frozenset({"mul"})})
    assert reader().loss_db(product, frozenset({"mul"})) == pytest.approx(40 * math.log10(2))
    assert reader().loss_db(product, frozenset({"add"})) == 0.0
    both = Exponents({("relu", 0): 16}, readers={"relu": frozenset({"mul"})})
    assert reader().loss_db(both, frozenset({"mul"})) == 0.0  # `mul` reads the product


def test_excess_is_the_mean_square_of_errors_by_that_of_normal_numbers() -> None:
    def of(k: int, *magnitudes: float) -> float:
        return float(_excess(np.array([bins(*magnitudes)]), FLOAT16)[0, k + REACH])

    assert [of(k, 1.0) for k in (-64, 0, 14, 15, 16)] == [1.0, 1.0, 1.0, 4.0, 16.0]
    assert [of(k, 2.0**-3) for k in (11, 12)] == [1.0, 4.0]
    assert of(64, 1.0) == 48 * 2.0**20  # it is 0, and the error is no more than itself
    # Two of 1 and one of 1/2: squares of steps 1, 1 and 1/4 of 2^-20; at 2^-15 4, 4 and 4 times a quarter... of 2^-20.
    assert of(15, 1.0, 1.0, 0.5) == pytest.approx((4 + 4 + 4) / 2.25)
    nothing = _excess(np.array([[5.0] + [0.0] * 254 + [5.0]]), FLOAT16)
    assert nothing.max() == 0.0
