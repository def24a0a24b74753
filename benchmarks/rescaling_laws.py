"""Laws of rescaling, for tests, the fuzz command and the benchmark: random solutions, and both programs run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from calibcast.calib.batches import numbered, signature_of
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.operators.exponents import EQUATIONS
from calibcast.calib.ranges import RangeTable
from calibcast.passes.number_formats import format_of
from calibcast.passes.rescaling.costs import IMPOSSIBLE, CostReader, Costs
from calibcast.passes.rescaling.exactness import refusals
from calibcast.passes.rescaling.measures import Measures
from calibcast.passes.rescaling.proposals import cost_of
from calibcast.passes.rescaling.rescaling import solved
from calibcast.passes.rescaling.rewriting import Exponents
from calibcast.passes.rescaling.system import system_of
from torch.export import ExportedProgram


def random_exponents(
    program: ExportedProgram, ranges: RangeTable, seed: int, table: Mapping[str, str] = EQUATIONS
) -> Exponents:
    """A random solution of the equations that is shown to be exact; exponents are taken back until it is."""
    measures, draw = Measures.of(program, ranges), random.Random(seed)
    solutions = solved(program, system_of(program, table=table))
    costs = CostReader(measures, format_of(torch.float16)).table(solutions, Costs(float("inf"), 0.0))
    values = {variable: draw.randint(-6, 6) for variable in solutions.free}
    order = list(values)
    draw.shuffle(order)
    while True:
        exponents = Exponents.of(solutions, values)
        if cost_of(costs, values) < IMPOSSIBLE and not refusals(measures, exponents):
            return exponents
        values[order.pop()] = 0


def run(
    program: ExportedProgram, batches: Iterable[Any], transform: Callable[[Any], Any] | None = None
) -> list[torch.Tensor]:
    """All outputs of all batches, in order, NaN as a number that equals itself."""
    runner = ProgramRunner(program)
    flat = [inputs for _, _, inputs in numbered(batches, signature_of(program), transform)]
    results = [result for inputs in flat for result in runner.run(inputs)]
    tensors = [result for result in results if isinstance(result, torch.Tensor)]
    return [torch.nan_to_num(t, nan=12345.0) if t.is_floating_point() else t for t in tensors]
