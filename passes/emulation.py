"""Run a plan on any machine: fp32 kernels, with rounding where the plan is low."""

from __future__ import annotations

from typing import Any

import torch
from calibcast.calib.batches import signature_of
from calibcast.calib.execution import output_structure, require_program
from calibcast.calib.flattening import flatten, qualified_name
from calibcast.calib.rounded_runner import RoundedRunner
from calibcast.passes.node_types import NodeTypes
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.weights import masks_to_saturate
from torch.export import ExportedProgram


def emulated(
    program: ExportedProgram,
    plan: PrecisionPlan,
    device: torch.device | str | None = None,
    carry_state: bool = False,
) -> RoundedRunner:
    """A runner of `program` on flat inputs under `plan`. It shows each node's result to a watch.

    The low nodes are those of `insert_casts`: nodes that share storage agree, and nodes that cannot be low are not. The
    outputs have the program's types. carry_state: each call goes on from what the one before left in the buffers.
    Raises MismatchError for a plan of another program.
    """
    require_program(program)
    plan.check(program)
    source = flatten(program.graph_module)
    low = [qualified_name(node) for node in NodeTypes.of(source, plan).low]
    masks = [qualified_name(node) for node in masks_to_saturate(program, source, plan.masks)]
    return RoundedRunner(program, low, plan.low_precision_type, masks, device, carry_state)


def emulate(program: ExportedProgram, plan: PrecisionPlan, *args: Any, **kwargs: Any) -> Any:
    """The outputs of `program` under `plan` for the model's own arguments, in the model's own structure.

    Raises MismatchError for a plan of another program, BatchError for arguments that do not fit, or a node that raises.
    """
    runner = emulated(program, plan)
    flat = signature_of(program).flatten((args, kwargs), 0)
    return output_structure(program, runner.run_batch(flat, 0))
