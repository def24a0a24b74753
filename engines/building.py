"""`build`: from a program whose graph spells out its types to an engine."""

from __future__ import annotations

import logging
from typing import Any

from torch.export import ExportedProgram

from calib.ranges import RangeTable
from engines.backends import chosen
from engines.engine import Engine
from passes.plan import PrecisionPlan

_log = logging.getLogger("calibcast")


def build(
    mixed: ExportedProgram,
    plan: PrecisionPlan | None = None,
    ranges: RangeTable | None = None,
    backend: str = "auto",
    **settings: Any,
) -> Engine:
    """Build an engine that runs `mixed` in exactly the types of its graph.

    Args:
        mixed: from `insert_casts`, or any exported program.
        plan, ranges: what decided the types; kept with the engine. Of dynamic inputs, `ranges` also gives the sizes
            that the engine is built for.
        backend: "tensorrt", "eager", or "auto": TensorRT where a GPU and Torch-TensorRT are present, else eager.
        settings: of the backend, by its own names; for TensorRT those of `torch_tensorrt.dynamo.compile`.

    Raises:
        BuildError: unknown backend or setting, a missing package, or the builder said no.
    """
    found, why = chosen(backend)
    _log.info("backend %s (%s)", found.name, why)
    runtime = found.build(mixed, ranges, dict(settings))
    return Engine(mixed, runtime, found.name, why, plan, ranges, settings, found.versions())
