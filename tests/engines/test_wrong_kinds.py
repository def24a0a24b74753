"""What is passed where something else belongs: a path for a table, a module for a program, a name for a number."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibcast.calib import CalibcastError, RangeTable, calibrate
from calibcast.engines import build, verify
from calibcast.passes import PrecisionPlan, classify, compare, insert_casts, what_if
from torch import nn

DATA = [torch.ones(2, 4)]


@pytest.fixture(scope="module")
def made() -> SimpleNamespace:
    model = nn.Linear(4, 4).eval()
    program = torch.export.export(model, (DATA[0],))
    ranges = calibrate(program, DATA, progress=False)
    plan = classify(program, ranges)
    engine = build(insert_casts(program, plan), plan, ranges, backend="eager")
    return SimpleNamespace(model=model, program=program, ranges=ranges, plan=plan, engine=engine)


MISTAKES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "calibrate a module": (lambda m: calibrate(m.model, DATA), r"program is a Linear.*torch\.export\.export"),
    "classify a module": (lambda m: classify(m.model, m.ranges), r"program is a Linear.*torch\.export\.export"),
    "classify with a path": (lambda m: classify(m.program, "r.parquet"), r"ranges is a str.*RangeTable\.load"),
    "classify with a frame": (lambda m: classify(m.program, m.ranges.frame), r"ranges is a DataFrame"),
    "cast a module": (lambda m: insert_casts(m.model, m.plan), r"program is a Linear"),
    "cast without a plan": (lambda m: insert_casts(m.program, None), r"plan is None.*classify"),
    "cast with a path": (lambda m: insert_casts(m.program, "plan.json"), r"plan is a str.*PrecisionPlan\.load"),
    "the types of a module": (lambda m: PrecisionPlan.from_types(m.model), r"program is a Linear"),
    "what if of a path": (lambda m: what_if(m.program, "r.parquet"), r"ranges is a str.*RangeTable\.load"),
    "what if without ranges": (lambda m: what_if(m.program, None), r"ranges is None"),
    "what if of a number in words": (lambda m: what_if(m.program, m.ranges, data_max=["much"]), r"data_max='much'"),
    "compare with a plan": (lambda m: compare(m.program, m.plan, DATA), r"mixed is a PrecisionPlan.*insert_casts"),
    "build a module": (lambda m: build(m.model, backend="eager"), r"mixed is a Linear"),
    "verify against a module": (lambda m: verify(m.engine, m.model, DATA), r"program is a Linear"),
    "metrics in a list": (lambda m: verify(m.engine, m.program, DATA, metrics=[max]), r"metrics is a list"),
    "merge a path": (lambda m: RangeTable.merge([m.ranges, "b.parquet"]), r"table 1 is a str.*RangeTable\.load"),
    "data_max in words": (lambda m: classify(m.program, m.ranges, data_max="512"), r"data_max='512'.*number"),
    "init_max in words": (lambda m: classify(m.program, m.ranges, init_max="1"), r"init_max='1'.*number"),
    "a quantile in words": (lambda m: classify(m.program, m.ranges, range_quantile="p99"), r"range_quantile='p99'"),
    "one number for rules": (lambda m: classify(m.program, m.ranges, rules=5), r"rules=5"),
    "one number for names": (lambda m: classify(m.program, m.ranges, nodes_to_exclude=5), r"nodes_to_exclude=5"),
    "numbers for names": (lambda m: classify(m.program, m.ranges, nodes_to_exclude=[5]), r"nodes_to_exclude: 5 "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_wrong_kind_of_argument_is_named_with_what_belongs_there(made: SimpleNamespace, mistake: str) -> None:
    call, message = MISTAKES[mistake]
    with pytest.raises(CalibcastError, match=message):
        call(made)
