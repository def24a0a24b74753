"""Whose error is it? An engine differs from the fp32 model by what the plan rounds and by what TensorRT does on top.

The cast graph, run in PyTorch, has only the plan's part of the error. It is compared with fp32 and with the engine, on
the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
import torch
from calibcast.calib.execution import ProgramRunner, output_names
from calibcast.engines.judging.metrics import OutputError
from torch.export import ExportedProgram

SCHEMA: dict[str, Any] = {
    "output": pl.String,
    "plan_rel_l2": pl.Float64,
    "plan_sqnr_db": pl.Float64,
    "plan_nonfinite": pl.Int64,
    "engine_rel_l2": pl.Float64,
    "engine_sqnr_db": pl.Float64,
    "engine_nonfinite": pl.Int64,
    "blame": pl.String,
}
# One part alone is to blame when its error is this many times the other's.
_MUCH_LARGER = 2.0


class Attribution:
    """Compares, batch by batch, the cast graph with fp32 (the plan's error) and the engine with the cast graph."""

    def __init__(self, mixed: ExportedProgram, device: torch.device, carry_state: bool = False) -> None:
        self._runner = ProgramRunner(mixed, device, carry_state=carry_state)
        names = output_names(mixed)
        self._plan, self._engine = ([OutputError(name) for name in names] for _ in range(2))

    def reset(self) -> None:
        """Begin a new sequence."""
        self._runner.reset()

    def update(self, flat: Sequence[Any], engine: Sequence[Any], reference: Sequence[Any], index: int) -> None:
        """Add one batch: flat inputs, and the flat outputs of engine and fp32 model."""
        cast = self._runner.run_batch(flat, index)
        for plan, ours, mine, middle, theirs in zip(self._plan, self._engine, engine, cast, reference, strict=True):
            if isinstance(middle, torch.Tensor) and isinstance(theirs, torch.Tensor):
                plan.update(middle, theirs, index)
                ours.update(mine.to(middle.device), middle, index)  # of another shape: counted, not compared

    def frame(self, compared: set[int]) -> pl.DataFrame:
        """One row per compared output, with the columns of `SCHEMA`.

        *_nonfinite: elements that are NaN or Inf where the results that they are compared with are finite. blame:
        "plan", "engine", "both", or "none" when nothing differs.
        """
        pairs = [pair for i, pair in enumerate(zip(self._plan, self._engine, strict=True)) if i in compared]
        return pl.DataFrame([_row(plan, engine) for plan, engine in pairs], schema=SCHEMA)


def _row(plan: OutputError, engine: OutputError) -> dict[str, Any]:
    return {
        "output": plan.output,
        "plan_rel_l2": plan.rel_l2,
        "plan_sqnr_db": plan.sqnr_db,
        "plan_nonfinite": plan.only_engine,
        "engine_rel_l2": engine.rel_l2,
        "engine_sqnr_db": engine.sqnr_db,
        "engine_nonfinite": engine.only_engine,
        "blame": _blame(plan, engine),
    }


def _blame(plan: OutputError, engine: OutputError) -> str:
    if plan.only_engine or engine.only_engine:
        return "both" if plan.only_engine and engine.only_engine else "plan" if plan.only_engine else "engine"
    ours, theirs = plan.rel_l2, engine.rel_l2
    if ours == theirs == 0.0:
        return "none"
    if ours > _MUCH_LARGER * theirs:
        return "plan"
    return "engine" if theirs > _MUCH_LARGER * ours else "both"
