"""Errors in front of steps: what they are expected to change, where no edge alone changes much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib import calibrate, rounding_step_sweep
from calibcast.calib.flattening import flatten
from calibcast.calib.graph import input_targets
from calibcast.calib.output_noise import channel_noise
from calibcast.calib.rounding_gradients import Gradients
from calibcast.calib.rounding_steps import End, step_ends
from calibcast.calib.rounding_tape import record

from tests.functions import ApplyToX

GENERATOR = torch.Generator().manual_seed(0)
TABLE, WEIGHT = torch.randn(66, 8, generator=GENERATOR), torch.randn(16, 64, generator=GENERATOR)
MANY = torch.randn(1 << 16, generator=GENERATOR)


def ends(function: Callable[[torch.Tensor], Any], x: torch.Tensor) -> list[End]:
    program = torch.export.export(ApplyToX(function).eval(), (x,))
    with torch.no_grad():
        tape = record(flatten(program.graph_module), [*program.constants.values(), x])
    return step_ends(tape, Gradients(tape), frozenset(input_targets(program)), len(tape.outputs), 0)


def curve(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x * 3) * 4


def test_the_noise_of_a_step_is_that_of_errors_of_the_size_that_was_tried() -> None:
    """An error e of a number whose fraction is anything changes its floor, by 1, with probability |e|."""
    [end] = ends(lambda x: (x * 3).floor(), MANY)
    assert [step.name for step in end.steps] == ["floor"]
    sizes = 1 / end.slope
    probability = (sizes * (2 / torch.pi) ** 0.5).mean()
    power = (MANY * 3).floor().square().mean()
    noise = end.weights[0] * len(MANY)
    torch.testing.assert_close(noise, float(probability / power), rtol=0.1, atol=0)


@pytest.mark.parametrize(("low", "kind"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize(("node", "source"), [("tanh", "mul"), ("mul_1", "tanh"), ("floor", "mul_1")])
def test_edges_in_front_of_a_step_have_the_noise_that_they_make_in_many_batches(
    low: str, kind: torch.dtype, node: str, source: str
) -> None:
    """Measured on one batch of 256, in which most of them change nothing in fp16."""

    def rounded(name: str, value: torch.Tensor) -> torch.Tensor:
        return value.to(kind).float() if name == source else value

    def run(x: torch.Tensor) -> torch.Tensor:
        return (rounded("mul_1", rounded("tanh", torch.tanh(rounded("mul", x * 3))) * 4)).floor()

    x = MANY[:256]
    program = torch.export.export(ApplyToX(lambda x: curve(x).floor()).eval(), (x,))
    table = calibrate(program, [x], progress=False).rounding
    row = table.filter(
        (pl.col("node") == node) & (pl.col("input") == source) & (pl.col("low_precision_type") == low)
    ).row(0, named=True)
    seen = float(channel_noise(run(MANY), curve(MANY).floor()).mean())
    # In fp16 a single step of these 256 is already -34 dB, so the table may be far above what many batches show.
    assert seen / 4 < row["noise"] < max(4 * seen, 1 / 100)


def interpolated(x: torch.Tensor) -> torch.Tensor:
    """Between two rows of a table: where the index steps, both rows change, and the result does not."""
    place = torch.sigmoid(x[:, :1]) * 63
    index = place.floor()
    share, left = place - index, index.long()[:, 0]
    table = TABLE.cumsum(0)
    return table[left] * (1 - share) + table[left + 1] * share


def kept_largest(x: torch.Tensor) -> torch.Tensor:
    """What is compared was picked from what it is compared with, so one element is always equal to it."""
    apart = x.argsort(-1) * 2.5 + 1.0
    least = apart.topk(4, -1).values[:, -1:]
    return torch.where(apart >= least, apart * 1e-3, apart)


def router(x: torch.Tensor) -> torch.Tensor:
    """Two of 16 experts, whose scores are far apart. What errors do to the shares is no step."""
    best = (x.argsort(-1) * 4.0 + x).topk(2)
    return (TABLE[best.indices] * (best.values * 8).softmax(-1)[..., None]).sum(1)


HARMLESS: dict[str, Callable[[torch.Tensor], Any]] = {
    "interpolated": interpolated,
    "picked": kept_largest,
    "relu": lambda x: torch.where(x * 2 > 0, x * 2, 0 * x),
    "zeros": lambda x: torch.where(torch.relu(x.sign() * 2) > 0, 1.0, x),
    "smooth": lambda x: curve(x),
    "integers": lambda x: (curve(x).floor().long(), x * 2),  # these are counted where they change
    "places": lambda x: x * (torch.arange(16) * 0.3).floor(),  # the same in each batch: what was seen is all there is
    "router": router,
    "masked": lambda x: (x * 2).masked_fill(x * 2 < -1e9, float("-inf")).softmax(-1),
}


def noise(function: Callable[[torch.Tensor], Any], x: torch.Tensor) -> dict[tuple[str, str, str], list[float]]:
    program = torch.export.export(ApplyToX(function).eval(), (x,))
    table = calibrate(program, [x], progress=False).rounding
    assert not table["why_missing"].drop_nulls().len()
    columns = ("node", "input", "low_precision_type", "noise_by_output")
    return {(node, source, low): parts for node, source, low, parts in table.select(columns).iter_rows()}


def test_errors_that_overflow_in_front_of_a_step_are_left_to_the_first_sweep() -> None:
    """exp passes what fp16 holds, and only the second output sees it: the comparison gives the same."""

    def overflowing(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p = (x * 5).exp()
        return torch.where(p > 1.0, 1.0, 0.0), p

    found = noise(overflowing, torch.randn(256, 16, generator=GENERATOR))
    assert found["gt", "exp", "float16"][0] < 1
    assert found["output", "exp", "float16"][1] == float("inf")


def test_a_step_that_reads_a_slice_is_judged_by_that_slice() -> None:
    """A detection head: the loud half of the channels has no part in the quiet half's steps."""

    def head(loud: float) -> Callable[[torch.Tensor], Any]:
        def run(x: torch.Tensor) -> torch.Tensor:
            both = torch.cat([torch.tanh(x) * loud, torch.sin(x) * 3.3], 1) * 1.1
            return both[:, 16:].floor() + 0.001 * both[:, :16] / loud

        return run

    x = torch.randn(512, 16, generator=GENERATOR)
    quiet, loud = ([e.weights for e in ends(head(k), x)] for k in (3.3, 1000.0))
    assert len(quiet) == len(loud) == 1
    assert quiet[0][0] == pytest.approx(loud[0][0], rel=0.1)


def test_a_batch_keeps_its_evidence_where_the_second_sweep_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    x = MANY[:4096]
    whole = noise(lambda x: curve(x).floor(), x)
    monkeypatch.setattr(rounding_step_sweep._StepSweep, "noise", refuse)
    found = noise(lambda x: curve(x).floor(), x)
    assert found.keys() == whole.keys()
    assert found["tanh", "mul", "bfloat16"][0] < whole["tanh", "mul", "bfloat16"][0]


@pytest.mark.parametrize("name", HARMLESS)
def test_steps_that_show_in_no_floating_point_output_have_no_noise(name: str) -> None:
    assert not ends(HARMLESS[name], torch.randn(256, 16, generator=GENERATOR))
