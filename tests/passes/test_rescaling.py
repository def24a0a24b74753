"""Exact rescaling: any solution keeps every bit, the scaled table is a new calibration's, proposals are judged."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import torch
from calibcast.calib.calibration import calibrate
from calibcast.calib.ranges import RangeTable
from calibcast.passes.cast_insertion import insert_casts
from calibcast.passes.classification import classify
from calibcast.passes.number_formats import format_of
from calibcast.passes.rescaling.costs import CostReader, Costs
from calibcast.passes.rescaling.measures import Measures
from calibcast.passes.rescaling.proposals import cheapest, cost_of
from calibcast.passes.rescaling.rescaling import rescale, solved
from calibcast.passes.rescaling.rewriting import rewritten
from calibcast.passes.rescaling.solving import solve
from calibcast.passes.rescaling.system import System, Tensor, system_of
from torch import nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.rescaling_laws import random_exponents, run
from benchmarks.zoo import ZOO
from tests.passes.rescaling_models import growing, measured, sqnr

ZOO_SAMPLE = ("mixer", "deit_distilled", "restoration")


@pytest.mark.parametrize("name", [name for name in ZOO_SAMPLE if name in ZOO] or list(ZOO)[:4])
def test_random_solutions_keep_every_bit(name: str) -> None:
    """Any solution of the equations leaves fp32 results as they are, and the scaled table is a new calibration's."""
    check_laws(name, seeds=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ZOO))
def test_random_solutions_keep_every_bit_in_the_zoo(name: str) -> None:
    check_laws(name, seeds=3)


def check_laws(name: str, seeds: int) -> None:
    entry = ZOO[name]
    program, batches = entry.program(), entry.batches(2)
    table = calibrate(program, batches, transform=entry.transform, rounding_batches=0, progress=False)
    before = run(program, batches, entry.transform)
    for seed in range(seeds):
        exponents = random_exponents(program, table, seed)
        made = rewritten(program, exponents)
        assert all(map(torch.equal, before, run(made, batches, entry.transform)))
        again = calibrate(made, batches, transform=entry.transform, rounding_batches=0, progress=False)
        scaled = table.scaled(exponents.tensors, made)
        assert scaled.frame.equals(again.frame)
        assert scaled.hidden.equals(again.hidden)
        assert scaled.calibration.digests == again.calibration.digests
        assert scaled.calibration.weights == again.calibration.weights
        assert scaled.true_values() == table


def test_exponents_and_their_negatives_give_the_state_back() -> None:
    program, data = growing()
    exponents = random_exponents(program, measured(program, data), 1)
    back = rewritten(rewritten(program, exponents), exponents.negated())
    assert all(torch.equal(back.state_dict[name], value) for name, value in program.state_dict.items())
    assert not all(
        torch.equal(rewritten(program, exponents).state_dict[name], value) for name, value in program.state_dict.items()
    )


def test_overflowing_network_fits() -> None:
    """A residual stream above 65504 is stored smaller: all work in fp16, the same bits in fp32."""
    program, data = growing()
    ranges = measured(program, data)
    fitted = rescale(program, ranges)
    assert fitted.changed
    assert fitted.before is not None
    assert fitted.after is not None
    assert fitted.after.work_low == 1.0 > fitted.before.work_low
    assert fitted.after.high < fitted.before.high
    x = torch.randn(4, 32)
    want = program.module()(x)
    assert torch.equal(fitted.program.module()(x), want)
    again = measured(fitted.program, data)
    assert fitted.ranges.frame.equals(again.frame)
    assert fitted.ranges.true_values() == ranges
    mixed = insert_casts(fitted.program, classify(fitted.program, fitted.ranges))
    assert sqnr(want, mixed.module()(x)) > 45
    assert "stored as 2^-" in str(fitted)
    assert "fp32 nodes" in str(fitted)


def test_rescaling_twice_changes_nothing() -> None:
    program, data = growing()
    fitted = rescale(program, measured(program, data))
    assert not rescale(fitted.program, fitted.ranges).changed
    assert not rescale(fitted.program, measured(fitted.program, data)).changed


def test_bfloat16_needs_none() -> None:
    program, data = growing()
    kept = rescale(program, measured(program, data), torch.bfloat16)
    assert kept.program is program
    assert "range of float32" in str(kept)


def test_what_fits_stays() -> None:
    program, data = growing(gain=1.0)
    kept = rescale(program, measured(program, data))
    assert not kept.changed
    assert kept.program is program


class Loud(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv1d(1, 16, 9), nn.ReLU(), nn.Conv1d(16, 16, 9), nn.ReLU())
        self.last = nn.Linear(16, 4)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.last(self.layers(audio).mean(-1)) * 1e-4)


def test_loud_input_is_multiplied_once() -> None:
    """Raw 16-bit audio: one multiplication behind the input, and its row in the table is a new calibration's."""
    data = [(torch.randn(2, 1, 800) * 8000,) for _ in range(2)]
    program = torch.export.export(Loud().eval(), data[0])
    ranges = measured(program, data)
    fitted = rescale(program, ranges)
    assert list(fitted.rewrite.multiplied) == ["audio"]
    assert torch.equal(fitted.program.module()(data[0][0]), program.module()(data[0][0]))
    again = measured(fitted.program, data)
    assert fitted.ranges.frame.equals(again.frame)
    assert fitted.ranges.hidden.equals(again.hidden)
    assert fitted.ranges.true_values() == ranges


def test_saved_program_and_table_come_back(tmp_path: Any) -> None:
    program, data = growing()
    fitted = rescale(program, measured(program, data))
    torch.export.save(fitted.program, tmp_path / "m.pt2")
    fitted.ranges.save(tmp_path / "r.parquet")
    loaded, table = torch.export.load(tmp_path / "m.pt2"), RangeTable.load(tmp_path / "r.parquet")
    assert table == fitted.ranges
    table.check(loaded, "refuse")
    assert torch.equal(loaded.module()(data[0][0]), program.module()(data[0][0]))


def test_caller_is_left_alone_and_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(F.layer_norm(self.table(ids), (8,)))

    ids = torch.randint(0, 10, (2, 5))
    program = torch.export.export(Tied(), (ids,))
    before = {name: value.clone() for name, value in program.state_dict.items()}
    exponents = random_exponents(program, measured(program, [(ids,)]), 3)
    made = rewritten(program, exponents)
    assert torch.equal(made.module()(ids), program.module()(ids))
    assert all(torch.equal(program.state_dict[name], value) for name, value in before.items())
    assert made.state_dict["table.weight"].data_ptr() == made.state_dict["head.weight"].data_ptr()


def test_solver_finds_all_small_solutions() -> None:
    """Against brute force: of every random system, the solutions in a box are those that the forms give."""
    for seed in range(60):
        draw = random.Random(seed)
        count = draw.randint(2, 5)
        system = System([Tensor(f"t{i}") for i in range(count)])
        for _ in range(draw.randint(1, 3)):
            row = {v: draw.choice([-3, -2, -1, 1, 2, 3]) for v in draw.sample(range(count), draw.randint(1, count))}
            system.rows.append(row)
        solutions = solve(system)
        every = {
            k
            for k in product(range(-3, 4), repeat=count)
            if all(sum(c * k[v] for v, c in row.items()) == 0 for row in system.rows)
        }
        found = {
            tuple(solutions.exponents(dict(zip(solutions.free, values, strict=True))))
            for values in product(range(-9, 10), repeat=len(solutions.free))
            if len(solutions.free) <= 3
        }
        assert every <= found or len(solutions.free) > 3
        assert all(sum(c * k[v] for v, c in row.items()) == 0 for row in system.rows for k in found)


def test_proposal_is_as_cheap_as_any() -> None:
    """Against brute force over the free exponents of a small network."""
    program, data = growing()
    measures = Measures.of(program, measured(program, data))
    system = system_of(program)
    solutions = solved(program, system)
    table = CostReader(measures, format_of(torch.float16)).table(solutions, Costs(512.0, 0.3))
    found = cheapest(table, solutions.free)
    best = cost_of(table, found)
    free = solutions.free[:2]
    for values in product(range(-12, 13), repeat=len(free)):
        other = {**found, **dict(zip(free, values, strict=True))}
        assert best <= cost_of(table, other) + 1e-6
