"""Work recorded once and replayed: the same results as when each batch is computed anew. Without a GPU, a recorder on
the host stands in for the graph (`recorded_on_host`); on one, `tests/engines/test_on_gpu.py` asks the real thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibcast.calib import rounding_groups
from calibcast.calib.cuda_graphs import Replays
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.rounding_evidence import RoundingObserver
from polars.testing import assert_frame_equal
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from .recorded_on_host import recorded_on_host

CPU = torch.device("cpu")


def replays(work: Any, fixed: Any = (), prepare: Any = lambda inputs: None) -> Replays[Any, Any]:
    return Replays(CPU, work, prepare, fixed, recorded_on_host)


def test_each_batch_gets_its_own_result() -> None:
    """Of one recording for each size; weights are read where they are."""
    weight, ran = torch.ones(3), []

    def work(inputs: list[Any], _: Any) -> torch.Tensor:
        ran.append(len(inputs[1]))
        return (inputs[0] * inputs[1]).sum()

    made = replays(work, [True])
    for batch in (torch.arange(3.0), torch.full((3,), 4.0), torch.full((3,), -1.0)):
        before = batch.clone()
        assert made.of([weight, batch]).item() == batch.sum()
        assert torch.equal(batch, before)
    assert (ran, made.replayed) == ([3], 3)
    weight.fill_(2.0)
    assert made.of([weight, torch.ones(3)]).item() == 6.0
    assert made.of([torch.ones(4), torch.ones(4)]).item() == 4.0
    assert ran == [3, 4]


def test_a_number_among_the_inputs_is_part_of_what_was_recorded() -> None:
    made = replays(lambda inputs, _: inputs[0] * inputs[1])
    assert [made.of([torch.ones(1), number]).item() for number in (2, 2, 3, 2.5)] == [2.0, 2.0, 3.0, 2.5]


def test_what_cannot_be_recorded_is_tried_twice_and_left_to_the_caller() -> None:
    asked = []

    def work(inputs: list[Any], _: Any) -> float:
        asked.append(1)
        return float(inputs[0].sum())

    made = replays(work)
    assert [made.of([torch.ones(2)]) for _ in range(4)] == [None] * 4
    assert len(asked) == 2


class Attention(nn.Module):
    """With -inf in its mask, a number that is no half, and a bias behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 8, 3, padding=1), nn.LayerNorm(8)
        self.mask = nn.Buffer(torch.full((6, 6), -torch.inf).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x).transpose(1, 2))
        return torch.softmax(x @ x.mT * 0.3 + self.mask, -1) @ x


class Steps(nn.Module):
    """Rounds, compares, and returns integers beside numbers."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.where(x > 0.1, torch.floor(x * 3), x)
        return y.exp(), y.flatten(1).argmax(1)


class Ratio(nn.Module):
    """Divides by what may round to 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x - x.mean() + 1e-3)


MODELS = {
    "attention": (Attention, lambda: torch.randn(2, 4, 6)),
    "steps": (Steps, lambda: torch.randn(3, 40)),
    "ratio": (Ratio, lambda: torch.randn(5, 9)),
    "attention, one batch lost": (Attention, None),
}


def unnoted(work: Any) -> Any:
    """What the host computes for itself is no part of a recording."""

    def alone(*given: Any) -> Any:
        with _disable_current_modes():
            return work(*given)

    return alone


@pytest.mark.parametrize("name", MODELS)
def test_evidence_by_replays_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each edge and batch, with the same random signs. Where a batch shows what a recording must not take for
    granted (a value that is not finite in front of a bias), it is swept as if there were no recording."""
    monkeypatch.setattr(rounding_groups, "_is_same", lambda value, made: made is value.tensor)  # as on a GPU
    monkeypatch.setattr(rounding_groups, "rounded_number", unnoted(rounding_groups.rounded_number))
    model, batch = MODELS[name]
    torch.manual_seed(0)
    net = model().eval()
    batches = [(batch or (lambda: torch.randn(2, 4, 6)))() for _ in range(4)]
    if batch is None:
        batches[2][0, 0, 0] = torch.inf
    program = torch.export.export(net, (batches[0],))
    frames = []
    for by_replays in (False, True):
        observer = RoundingObserver(ProgramRunner(program), 4)
        if by_replays:
            specs = program.graph_signature.input_specs
            fixed = [spec.kind.name != "USER_INPUT" for spec in specs]
            made = replays(observer._launched, fixed, observer._signs)
            observer.__dict__["_replays"] = made
        for index, one in enumerate(batches):
            observer.measure([one], index, {})
        frames.append(observer.record.frame())
    assert made.replayed == (3 if batch is None else 4)
    assert_frame_equal(frames[0], frames[1], rel_tol=1e-4, abs_tol=1e-12)
    infinite = [frame["local_sqnr_db"].is_infinite().to_list() for frame in frames]  # which is near to any number
    assert infinite[0] == infinite[1]
