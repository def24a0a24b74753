"""Torch-TensorRT's own autocast: calibration and the pass, as `dynamo.compile(enable_autocast=True)` runs them.

With its defaults: 512 as the largest output, no limit on the depth of reductions. It takes positional batches only;
to be fair to it, it is given the flat inputs of each batch, whatever form the user had them in.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from benchmarks.rtx_builder import package

THRESHOLD = 512.0


class PeerError(Exception):
    """The peer failed; the message says at which step and how."""


def autocast(program: ExportedProgram, batches: Sequence[list[Any]], low_type: torch.dtype) -> ExportedProgram:
    """`program` itself, changed in place by the peer. Raises PeerError."""
    package()
    from torch_tensorrt.dynamo._settings import CompilationSettings
    from torch_tensorrt.dynamo.lowering.passes._aten_lowering_pass import ATEN_PRE_LOWERING_PASSES
    from torch_tensorrt.dynamo.lowering.passes.pass_utils import trace_intermediate_node_outputs

    settings = CompilationSettings(
        enable_autocast=True,
        autocast_low_precision_type=low_type,
        autocast_max_output_threshold=THRESHOLD,
        autocast_calibration_dataloader=[tuple(flat) for flat in batches],
    )
    skipped = [torch.ops.higher_order.wrap_with_autocast, operator.getitem]
    try:
        settings.autocast_intermediate_node_outputs = trace_intermediate_node_outputs(
            program.module(), settings.autocast_calibration_dataloader, skipped
        )
    except Exception as error:
        raise PeerError(f"calibration: {type(error).__name__}: {_first_line(error)}") from error
    try:
        ATEN_PRE_LOWERING_PASSES(program.graph_module, settings)
    except Exception as error:
        raise PeerError(f"pass: {type(error).__name__}: {_first_line(error)}") from error
    return program


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:120]
