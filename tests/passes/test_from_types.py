"""The law that a plan of the present types adds nothing, on programs that state types in every way that torch has."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calibcast.calib.artifacts import save_json
from calibcast.calib.process_settings import unlogged
from calibcast.passes.cast_insertion import insert_casts
from calibcast.passes.classification import classify
from calibcast.passes.plan import PrecisionPlan
from torch import nn

from tests.unmeasured import calibrate

HALF, FLOAT = torch.float16, torch.float32
# Each reads one type and gives another, or reads two.
STATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda x: x.mean(1, dtype=HALF),
    "sum": lambda x: x.sum(1, dtype=torch.bfloat16),
    "softmax": lambda x: x.softmax(-1, dtype=HALF),
    "log_softmax": lambda x: x.log_softmax(-1, dtype=HALF),
    "cumsum": lambda x: x.cumsum(-1, dtype=HALF),
    "prod": lambda x: x.prod(1, dtype=HALF),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1, dtype=torch.float64),
    "widened_mean": lambda x: x.half().mean(1, dtype=FLOAT),
    "widened_softmax": lambda x: x.half().softmax(-1, dtype=FLOAT),
    "type_as": lambda x: x.type_as(torch.zeros(1, dtype=HALF)),
    "type_as_wider": lambda x: x.half().type_as(torch.zeros(1)),
    "ones_like": lambda x: torch.ones_like(x, dtype=HALF) * x,
    "new_full": lambda x: x.new_full((16,), 0.5, dtype=HALF) + x,
    "promoted": lambda x: x + x.half(),
    "where": lambda x: torch.where(x > 0, x.half(), x),
    "to": lambda x: x.to(HALF) * 2,
}


class _Stating(nn.Module):
    def __init__(self, body: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x * 1.0).float() * 1.0


def _input() -> torch.Tensor:
    """Large values whose sums are small: in half precision another type gives another result."""
    x = torch.full((4, 16), 70000.0)
    x[:, ::2] = -70000.0
    x[0, 0] += 64
    return x


@pytest.mark.parametrize("name", STATED)
def test_a_plan_of_the_present_types_changes_nothing(name: str) -> None:
    """Neither for a program that was never cast, nor for what a plan of ours, with low nodes, has made of it."""
    x = _input()
    program = torch.export.export(_Stating(STATED[name]).eval(), (x,))
    same = insert_casts(program, PrecisionPlan.from_types(program))
    assert [n.target for n in same.graph.nodes] == [n.target for n in program.graph.nodes]
    assert [n.args for n in same.graph.nodes].__repr__() == [n.args for n in program.graph.nodes].__repr__()
    torch.testing.assert_close(same.module()(x), program.module()(x), rtol=0, atol=0, equal_nan=True)
    for ranges, small in ((None, x), (calibrate(program, [x / 1e5], progress=False), x / 1e5)):
        mixed = insert_casts(program, classify(program, ranges, nodes_to_include=() if ranges is None else ("^mul",)))
        again = insert_casts(mixed, PrecisionPlan.from_types(mixed))
        assert [n.target for n in again.graph.nodes] == [n.target for n in mixed.graph.nodes]
        assert [n.kwargs for n in again.graph.nodes] == [n.kwargs for n in mixed.graph.nodes]
        torch.testing.assert_close(again.module()(small), mixed.module()(small), rtol=0, atol=0, equal_nan=True)


def test_what_is_said_meanwhile_on_other_threads_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """torch's logger is quiet for the thread that asks for it, and as it was afterwards, however uses overlap."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = list(logger.filters), logger.disabled
    first, second = unlogged(logger.name), unlogged(logger.name)
    first.__enter__()
    second.__enter__()
    with caplog.at_level(logging.WARNING, logger.name):
        logger.warning("mine")
        other = threading.Thread(target=lambda: logger.warning("theirs"))
        other.start()
        other.join()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert [record.message for record in caplog.records] == ["theirs"]
    assert (logger.filters, logger.disabled) == before


def test_saving_never_touches_the_umask_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads would make files with it meanwhile."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
    save_json(tmp_path / "a.json", "x", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json"]
