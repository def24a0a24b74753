"""Range tables with rounding evidence made by hand, so that a test says itself what rounding costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import polars as pl
import torch
from calibcast import RangeTable, calibrate
from calibcast.calib.rounding_edges import rounding_edges
from calibcast.calib.rounding_table import LOW_TYPE_NAMES, ROUNDING_SCHEMA
from torch.export import ExportedProgram

from tests.functions import ApplyToX

# Noise-to-signal power of an edge, by (reader, what it reads); one number for both types.
Noise = Mapping[tuple[str, str], float | None]


def exported(function: Callable[..., Any], x: torch.Tensor) -> ExportedProgram:
    return torch.export.export(ApplyToX(function), (x,))


def with_noise(program: ExportedProgram, batches: Iterable[Any], noise: Noise, rest: float = 1e-9) -> RangeTable:
    """Ranges of the batches, in which these edges make that much noise and all others `rest`. None: not measured."""
    rows = [
        {
            "node": edge.node, "input": edge.input, "output": edge.output, "low_precision_type": name,
            "noise": noise.get((edge.node, edge.input), rest), "noise_worst": noise.get((edge.node, edge.input), rest),
            "worst_batch": 0, "nonfinite": 0, "steps": 0, "local_sqnr_db": 60.0, "batches": 1, "method": "gradient",
        }
        for edge in rounding_edges(program)
        for name in LOW_TYPE_NAMES
    ]  # fmt: skip
    return replace(calibrate(program, batches, progress=False), rounding=pl.DataFrame(rows, schema=ROUNDING_SCHEMA))
