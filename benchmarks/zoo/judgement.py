"""What casting did to a program: how much is low, how far the outputs moved, and whether that is good enough.

Errors are relative L2 over all batches, of the worst floating-point output. Tolerances: 1% in fp16, 5% in bf16, or
1.5 times the error of the same graph with everything low, where that is further.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from calibcast.calib import RangeTable, calibrate
from calibcast.calib.batches import signature_of
from calibcast.calib.execution import NodeError, ProgramRunner
from calibcast.calib.flattening import inlined_name
from calibcast.calib.graph import base_op, op_name, size_hint, tensor_values
from calibcast.calib.output_noise import channel_noise
from calibcast.calib.rounding_edges import is_mover
from calibcast.calib.rounding_table import empty_rounding
from calibcast.passes import PrecisionPlan, classify, insert_casts
from calibcast.passes.plan import Decision
from calibcast.passes.regions import candidates
from calibcast.passes.rounding_course import BLAMED_SHARE, MARGIN
from calibcast.passes.verdict import HIGH, KEPT
from torch.export import ExportedProgram

from benchmarks.zoo.architecture import Architecture

TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.05}
SLACK = 1.5
LEAST_WORK, LEAST_BYTES = 0.95, 0.90
# High not by a number but because it cannot be otherwise: no half kernels, or storage shared with fp32. What only moves
# the data of such nodes, by `FOLLOWS`, is high with them.
UNAVOIDABLE = frozenset({"legality", "alias"})
FOLLOWS = "follows"
Outputs = list[list[Any]]  # by batch, by output


@dataclass(frozen=True)
class Shares:
    """Shares in the low type: of classified nodes, of their work (FLOPs), of the bytes of their outputs; casts.

    NaN where there is nothing to share.
    """

    nodes: float
    work: float
    bytes: float
    casts: int


@dataclass(frozen=True)
class Outcome:
    """One model in one type.

    shares: of all that a plan decides on. avoidable: the same, without what cannot be low whatever the data.
    error, half_error: relative L2; inf where a value is not finite though the reference is. misses: what falls short.
    high: the decisions on nodes that stay high.
    """

    shares: Shares
    avoidable: Shares
    error: float
    half_error: float
    misses: tuple[str, ...]
    high: tuple[Decision, ...]


@dataclass(frozen=True)
class Trial:
    """A model, measured: its program, ranges, flat inputs (the last batch unseen) and reference outputs.

    ranges: with evidence of rounding where that was asked for. seconds: that calibration took.
    """

    program: ExportedProgram
    ranges: RangeTable
    inputs: list[list[Any]]
    reference: Outputs
    seconds: float

    @classmethod
    def of(cls, architecture: Architecture, rounding_batches: int = 0) -> Trial:
        """Export and calibrate; without evidence from rounding the plans are those of the rules."""
        program, batches = architecture.program(), architecture.batches()
        start = time.perf_counter()
        ranges = calibrate(program, batches, architecture.transform, progress=False, rounding_batches=rounding_batches)
        seconds = time.perf_counter() - start
        flat = flat_inputs(architecture, program)
        return cls(program, ranges, flat, outputs_of(program, flat), seconds)

    def plan(self, low_type: torch.dtype) -> PrecisionPlan:
        """The plan with all settings at their defaults: for the budget where rounding was measured, or by the rules."""
        return classify(self.program, self.ranges, low_precision_type=low_type)

    def plan_by_rules(self, low_type: torch.dtype) -> PrecisionPlan:
        """The plan of the rules alone."""
        return classify(self.program, replace(self.ranges, rounding=empty_rounding()), low_precision_type=low_type)

    def judged(self, plan: PrecisionPlan, mixed: ExportedProgram) -> Outcome:
        """What `mixed`, which carries out `plan`, is worth."""
        outputs = outputs_of(mixed, self.inputs)
        outcome = Outcome(
            shares=shares_of(self.program, plan, mixed),
            avoidable=shares_of(self.program, plan, mixed, unavoidable(self.program, plan)),
            error=worst_error(outputs, self.reference),
            half_error=self.half_error(plan.low_precision_type),
            misses=(),
            high=tuple(d for d in plan.decisions if d.precision == HIGH),
        )
        changed = changed_surface(self.program, mixed, outputs, self.reference)
        return replace(outcome, misses=(*changed, *misses_of(outcome, TOLERANCE[plan.low_precision_type])))

    def half_error(self, low_type: torch.dtype, by_channel: bool = False) -> float:
        """The error of the graph with everything low; inf where an operator refuses to run like that.

        by_channel: of the worst channel in the worst batch, as budgets count it, not of all together.
        """
        half = insert_casts(self.program, everything_low(self.program, low_type))
        try:
            outputs = outputs_of(half, self.inputs)
        except NodeError:  # such as a mask value that fp16 cannot hold
            return math.inf
        return worst_channel(outputs, self.reference) if by_channel else worst_error(outputs, self.reference)


def flat_inputs(architecture: Architecture, program: ExportedProgram) -> list[list[Any]]:
    """The calibration batches and an unseen one, as the program's flat inputs."""
    signature = signature_of(program)
    batches = [*architecture.batches(), architecture.unseen()]
    transform = architecture.transform or (lambda batch: batch)
    return [signature.flatten(transform(batch), index) for index, batch in enumerate(batches)]


def outputs_of(program: ExportedProgram, inputs: Iterable[list[Any]]) -> Outputs:
    """The flat outputs for each batch, every batch from the program's saved state."""
    runner = ProgramRunner(program)
    return [
        [value.clone() if isinstance(value, torch.Tensor) else value for value in runner.run(flat)] for flat in inputs
    ]


def everything_low(program: ExportedProgram, low_type: torch.dtype) -> PrecisionPlan:
    """The whole-half plan: every node low but what has no half kernels, custom operators, and what storage ties."""
    targets = {op_name(c.node.target) for c in candidates(program) if base_op(c.node.target)}
    return classify(program, None, low_precision_type=low_type, targets_to_include=targets)


def worst_error(outputs: Outputs, reference: Outputs) -> float:
    """Relative L2 of the worst floating-point output over all batches; inf where only `outputs` is not finite."""
    worst = 0.0
    for mine, theirs in zip(zip(*outputs, strict=True), zip(*reference, strict=True), strict=True):
        if isinstance(theirs[0], torch.Tensor) and theirs[0].dtype.is_floating_point:
            worst = max(worst, _relative_error(mine, theirs))
    return worst


def worst_channel(outputs: Outputs, reference: Outputs) -> float:
    """The largest relative error of one channel of one floating-point output in one batch, as budgets count it."""
    pairs = [pair for mine, theirs in zip(outputs, reference, strict=True) for pair in zip(mine, theirs, strict=True)]
    floating = [(a, b) for a, b in pairs if isinstance(b, torch.Tensor) and b.is_floating_point() and b.numel()]
    return max((math.sqrt(float(channel_noise(a, b).max())) for a, b in floating), default=0.0)


def _relative_error(mine: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> float:
    difference = total = 0.0
    for one, other in zip(mine, theirs, strict=True):
        finite = other.isfinite()
        one, other = one.double()[finite], other.double()[finite]
        if not one.isfinite().all():
            return math.inf
        difference += float((one - other).square().sum())
        total += float(other.square().sum())
    return math.sqrt(difference / total) if total else math.inf if difference else 0.0


def changed_surface(
    program: ExportedProgram, mixed: ExportedProgram, outputs: Outputs, reference: Outputs
) -> list[str]:
    """What callers would notice: another structure, or another type or shape of an output."""
    changed = [] if mixed.call_spec == program.call_spec else ["another structure"]
    for mine, theirs in zip(outputs, reference, strict=True):
        for place, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            if not isinstance(other, torch.Tensor):
                continue
            if (one.dtype, one.shape) != (other.dtype, other.shape):
                changed.append(f"output {place} is {one.dtype}{list(one.shape)}, not {other.dtype}{list(other.shape)}")
    return changed


# How far the table of edges is off in the median, dB, over many networks.
TABLE_DB = 1.5


def excess_of(outcome: Outcome, by_rules: Shares, half_error: float, tolerance: float) -> list[str]:
    """What a plan for a budget has in fp32 that the rules' plan has not, where whole-half is good with enough to spare.

    Where it is not, such fp32 is what meets the budget. Enough is what the table may be off by; or, where one edge that
    the plan avoids makes much of whole-half's noise, the margin that plans are made with. half_error: of the worst
    channel in the worst batch, as budgets count it.
    """
    avoided = max((10 ** (-d.evidence / 10) for d in outcome.high if d.rule == "rounding" and d.evidence), default=0.0)
    margin = MARGIN if avoided >= BLAMED_SHARE * half_error**2 else 10 ** (-TABLE_DB / 20)
    if not half_error <= tolerance * margin:
        return []
    pairs = {"work": (outcome.shares.work, by_rules.work), "bytes": (outcome.shares.bytes, by_rules.bytes)}
    return [
        f"{ours:.1%} of {what} low, {theirs:.1%} by the rules"
        for what, (ours, theirs) in pairs.items()
        if ours < theirs
    ]


def misses_of(outcome: Outcome, tolerance: float) -> list[str]:
    """Where an outcome falls short of the tolerances of this module."""
    short = []
    half_is_good = outcome.half_error <= tolerance
    allowed = tolerance if half_is_good or not math.isfinite(outcome.half_error) else SLACK * outcome.half_error
    if not outcome.error <= allowed:
        short.append(f"error {outcome.error:.2%}, above {allowed:.2%}")
    # Where whole-half is not good enough, the table lists what is high, with rule and numbers.
    if half_is_good and outcome.avoidable.work < LEAST_WORK:
        short.append(f"{outcome.avoidable.work:.1%} of work low, below {LEAST_WORK:.0%}")
    if half_is_good and outcome.avoidable.bytes < LEAST_BYTES:
        short.append(f"{outcome.avoidable.bytes:.1%} of activation bytes low, below {LEAST_BYTES:.0%}")
    return short


def shares_of(
    program: ExportedProgram, plan: PrecisionPlan, mixed: ExportedProgram, without: frozenset[str] = frozenset()
) -> Shares:
    """Shares of what a plan decides on, but for the nodes `without`; read off the cast graph."""
    counted = {d.node: d.work for d in plan.decisions if d.precision != KEPT and d.node not in without}
    nodes = {c.name: c.node for c in candidates(program) if c.name in counted and not c.inside}
    made = {node.name: node for node in mixed.graph.nodes}
    copies = {name: made[inlined_name(name)] for name in nodes if inlined_name(name) in made}
    low = {name for name, copy in copies.items() if _is_low(nodes[name], copy, plan.low_precision_type)}
    sizes = {name: _bytes(node) for name, node in nodes.items()}
    return Shares(
        nodes=_share(len(low), len(nodes)),
        work=_share(sum(counted[name] for name in low), sum(counted.values())),
        bytes=_share(sum(sizes[name] for name in low), sum(sizes.values())),
        casts=count_casts(program, mixed),
    )


def unavoidable(program: ExportedProgram, plan: PrecisionPlan) -> frozenset[str]:
    """The nodes that cannot be low whatever the data, and those that only move data to them or from them."""
    rules = {d.node: d.rule for d in plan.decisions if d.precision == HIGH}
    found = {name for name, rule in rules.items() if rule in UNAVOIDABLE}
    movers = [c for c in candidates(program) if rules.get(c.name) == FOLLOWS or _follows(c.node, rules.get(c.name))]
    while reached := {c.name for c in movers if c.name not in found and _touches(c.node, found)}:
        found |= reached
    return frozenset(found)


def _follows(node: torch.fx.Node, rule: str | None) -> bool:
    """Whether a node that only moves data is high for a budget: the rule then says why it goes with others, too."""
    return rule == "rounding" and is_mover(node)


def _touches(node: torch.fx.Node, names: set[str]) -> bool:
    return any(other.name in names for other in (*node.all_input_nodes, *node.users))


def _is_low(node: torch.fx.Node, copy: torch.fx.Node, low_type: torch.dtype) -> bool:
    """Whether what `node` gives in fp32, or takes in fp32 where it gives no fp32, is in the low type in its copy."""
    found = {mine.dtype for mine in _counterparts([node], [copy])}
    return (found or {v.dtype for v in _counterparts(node.all_input_nodes, copy.all_input_nodes)}) == {low_type}


def _counterparts(nodes: list[torch.fx.Node], copies: list[torch.fx.Node]) -> list[torch.Tensor]:
    pairs = [
        pair for one, other in zip(nodes, copies, strict=False)
        for pair in zip(tensor_values(one), tensor_values(other), strict=True)
    ]  # fmt: skip
    return [mine for (_, theirs), (_, mine) in pairs if theirs.dtype == torch.float32]


def count_casts(program: ExportedProgram, mixed: ExportedProgram) -> int:
    """How many conversions `mixed` has that `program` has not."""
    return _conversions(mixed) - _conversions(program)


def _conversions(program: ExportedProgram) -> int:
    names = {"aten._to_copy.default", "aten.to.dtype"}
    return sum(str(node.target) in names for node in program.graph.nodes)


def _bytes(node: torch.fx.Node) -> int:
    """Bytes of a node's fp32 outputs at the exported sizes."""
    values = [value for _, value in tensor_values(node) if value.dtype == torch.float32]
    return 4 * sum(math.prod(size_hint(size) for size in value.shape) for value in values)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
