"""What the builder is known to refuse in the low type: those nodes are put back to fp32 before the build.

Such a limit is a property of a builder and not of a model, so it is here and not among the rules of a plan. The
engine's plan then names it, by the rule `builder`. For failures that only some builds meet there are remedies instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from calibcast.calib.graph import base_op, is_transposed, tensor_values
from calibcast.engines.tensorrt.quirks import WIDE_SUMS
from calibcast.engines.tensorrt.remedies import raised
from calibcast.engines.tensorrt.widening import widenable, widened
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.regions import qualified_name
from torch import fx
from torch.export import ExportedProgram

# Seen in TensorRT-RTX 1.6.1 with every kernel, stride, padding, dilation and groups, in one to three dimensions, alone
# and between other layers: "Could not infer output types for operation: deconv". All of them build in fp16.
_NO_KERNEL = "TensorRT-RTX has no bf16 kernel for transposed convolutions"
# Seen in Torch-TensorRT 2.14: the converter starts the sum from an fp32 zero, so its result is fp32, unlike in the
# graph. The first layer after it that has no type promotion of its own (a matrix product) then fails.
_WIDE_SUM = "Torch-TensorRT makes an fp32 sum of it, whatever its input is"


@dataclass(frozen=True)
class Buildable:
    """What the builder gets. kept: node of the cast graph that now computes in fp32 -> why."""

    program: ExportedProgram
    plan: PrecisionPlan | None
    kept: dict[str, str]


def buildable(program: ExportedProgram, plan: PrecisionPlan | None, is_rtx: bool) -> Buildable:
    """`program`, where the nodes that the builder cannot take in the low type are in fp32, and the plan that says
    so."""
    found = {node: reason for node in program.graph.nodes if (reason := _limit(node, is_rtx)) is not None}
    able = widenable(program) if found else ()
    found = {node: reason for node, reason in found.items() if node in able}
    if not found:
        return Buildable(program, plan, {})
    kept = {node.name: reason for node, reason in found.items()}
    named = {qualified_name(node): reason for node, reason in found.items()}
    return Buildable(widened(program, kept), raised(plan, named), kept)


def _limit(node: fx.Node, is_rtx: bool) -> str | None:
    """Why the builder cannot take `node` as it is; None where no such limit is known."""
    if node.op != "call_function":
        return None
    types = {value.dtype for _, value in tensor_values(node)}
    if base_op(node.target) in WIDE_SUMS and types & {torch.float16, torch.bfloat16}:
        return _WIDE_SUM
    if is_rtx and torch.bfloat16 in types and is_transposed(node):
        return _NO_KERNEL
    return None
