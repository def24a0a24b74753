"""`classify`: from a program and its ranges to a plan."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl
import torch
from calibcast.calib.execution import require_program
from calibcast.calib.fingerprint import node_digests
from calibcast.calib.gc_pause import paused
from calibcast.calib.graph import dtype_name
from calibcast.calib.ranges import RangeTable, require_table
from calibcast.passes.decisions import decide
from calibcast.passes.facts import WEIGHT_KINDS
from calibcast.passes.flips import LazyFlips, flips_of
from calibcast.passes.low_types import LOW_TYPES
from calibcast.passes.plan import Decision, PrecisionPlan
from calibcast.passes.program_facts import ProgramFacts
from calibcast.passes.settings import Settings, Target, low_type_of
from calibcast.passes.verdict import LOW, Rule
from calibcast.passes.work import WorkCounter
from torch.export import ExportedProgram


def classify(  # noqa: PLR0913 - the public contract
    program: ExportedProgram,
    ranges: RangeTable | None,
    low_precision_type: torch.dtype | str = torch.float16,
    data_max: float = 512.0,
    init_max: float | None = None,
    max_depth_of_reduction: int | None = None,
    nodes_to_exclude: Iterable[str] = (),
    targets_to_exclude: Iterable[Target] = (),
    nodes_to_include: Iterable[str] = (),
    targets_to_include: Iterable[Target] = (),
    range_quantile: float = 1.0,
    rules: Iterable[Rule] = (),
    weights: str = "warn",
    wide_accumulation: Iterable[str] = (),
) -> PrecisionPlan:
    """Decide for each node whether it runs in `low_precision_type` or stays in its exported type.

    Any rule that is met keeps a node high, and every verdict is kept with the number that was seen and its limit.

    Args:
        ranges: from `calibrate`; None leaves only the rules that need no ranges, and the plan says so.
        low_precision_type: torch.float16 or torch.bfloat16.
        data_max: largest magnitude of inputs and activations; inf switches the rule off.
        init_max: largest magnitude of weights; None is the largest finite value of the low type.
        max_depth_of_reduction: most terms summed into one element; None is no limit.
        nodes_to_exclude, nodes_to_include: regexes, `re.match`ed on node names and dotted module paths. Include
            beats exclude and every rule but legality.
        targets_to_exclude, targets_to_include: operators, or their names (`aten.add.Tensor`, `aten.add`).
        range_quantile: judge `data_max` by the magnitude that this share of elements stays within.
        rules: more rules, each called with a `NodeFacts` and answering a `Verdict` or None.
        wide_accumulation: operators (`layer_norm`, `mean`) that the backend accumulates in fp32 whatever their type, so
            that `interior` has nothing to say of them.
        weights: what to do when the ranges were measured with other weights: "warn", "refuse" or "ignore".

    Raises:
        PlanError: a setting is out of range, or a pattern or target matches nothing.
        MismatchError: the ranges are of another program.
    """
    low_type = low_type_of(low_precision_type)
    settings = Settings(
        data_max, init_max, max_depth_of_reduction, nodes_to_exclude, targets_to_exclude, nodes_to_include,
        targets_to_include, range_quantile, rules, wide_accumulation,
    )  # fmt: skip
    require_program(program)
    if ranges is not None:
        require_table(ranges)
        ranges.check(program, weights)
    with paused():
        facts = ProgramFacts.of(program, ranges)
        judge = settings.judge(facts.nodes, ranges, low_type)
        count = WorkCounter()
        decisions = decide(facts, judge, {candidate.name: count(candidate.node) for candidate in facts.nodes})
    # For both types, as a reader of the plan may ask for the other one, too.
    known = () if ranges is None else LOW_TYPES
    flips = LazyFlips(known, lambda name: flips_of(facts, judge.in_type(LOW_TYPES[name])))
    if settings.rules:
        flips.settle()  # now: a rule of the user's own may answer otherwise later
    # What a table fits has the digests of its graph.
    digests = node_digests(program) if ranges is None else dict(ranges.calibration.digests)
    notes = _notes(ranges, low_type, decisions)
    return PrecisionPlan(tuple(decisions), low_type, digests, judge.settings, notes, masked_nodes(ranges), flips)


def masked_nodes(ranges: RangeTable | None) -> tuple[str, ...] | None:
    """The nodes in which calibration has seen mask values; None without ranges."""
    if ranges is None:
        return None
    return tuple(ranges.frame.filter(pl.col("masked") > 0)["node"].unique(maintain_order=True))


def _notes(ranges: RangeTable | None, low_type: torch.dtype, decisions: list[Decision]) -> tuple[str, ...]:
    if ranges is None:
        return ("no ranges were given: only the rules that need none were applied, so nothing is known of overflow",)
    low = {decision.node for decision in decisions if decision.precision == LOW}
    return tuple(_lost_weights(ranges, low_type)) if low else ()


def _lost_weights(ranges: RangeTable, low_type: torch.dtype) -> list[str]:
    """Weights of which the low type makes inf or zero, by name."""
    info, name = torch.finfo(low_type), dtype_name(low_type)
    vanishing = float(info.smallest_normal * info.eps) / 2  # half the smallest subnormal rounds to zero
    notes = []
    for row in ranges.frame.filter(pl.col("kind").is_in(WEIGHT_KINDS)).iter_rows(named=True):
        weight, largest, smallest = f"{row['kind']} {row['node']}", row["absmax"], row["smallest"]
        if largest is not None and largest > info.max:
            notes.append(f"{weight} has values up to {largest:.4g}: inf in {name}")
        if smallest is not None and smallest <= vanishing:
            notes.append(f"{weight} has values down to {smallest:.4g}: zero in {name}")
    return notes
