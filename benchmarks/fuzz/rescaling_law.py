"""The law of rescaling: any solution of the equations keeps every bit, and its range table is a new calibration's."""

from __future__ import annotations

import torch
from calibcast.calib import calibrate
from calibcast.calib.execution import ProgramRunner, input_structure
from calibcast.passes.rescaling.rewriting import rewritten

from benchmarks.fuzz.case import Case, fresh
from benchmarks.rescaling_laws import random_exponents


def rescaling_keeps_every_bit(case: Case) -> None:
    """Random exponents, then the same negated: the results, the table and the state are those of the program."""
    batch = [input_structure(case.program, fresh(case.inputs))]
    ranges = calibrate(case.program, batch, rounding_batches=0, progress=False)
    exponents = random_exponents(case.program, ranges, len(case.before[1]))
    made = rewritten(case.program, exponents)
    for mine, theirs in zip(ProgramRunner(made).run(fresh(case.inputs)), case.reference, strict=True):
        same = isinstance(mine, torch.Tensor) and torch.equal(torch.nan_to_num(mine), torch.nan_to_num(theirs))
        assert same or mine == theirs
    again = calibrate(made, batch, rounding_batches=0, progress=False)
    scaled = ranges.scaled(exponents.tensors, made)
    assert scaled.frame.equals(again.frame)
    assert scaled.hidden.equals(again.hidden)
    back = rewritten(made, exponents.negated())
    assert all(torch.equal(back.state_dict[name], value) for name, value in case.program.state_dict.items())
