"""`rescale`: a program that fits a low type by exact powers of two, found from its ranges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from calibcast.calib.execution import require_program
from calibcast.calib.gc_pause import paused
from calibcast.calib.graph import argument_of, dtype_name, input_targets
from calibcast.calib.masks import mask_tensors
from calibcast.calib.range_scaling import NumberScale
from calibcast.calib.ranges import RangeTable, require_table
from calibcast.passes.number_formats import format_of
from calibcast.passes.rescaling.breaks import input_breaks, segment_breaks
from calibcast.passes.rescaling.costs import CostReader, Costs
from calibcast.passes.rescaling.equations import implied
from calibcast.passes.rescaling.exactness import Refusal, refusals
from calibcast.passes.rescaling.judging import Judgement, judged
from calibcast.passes.rescaling.measures import Measures
from calibcast.passes.rescaling.proposals import cheapest
from calibcast.passes.rescaling.result import Rescaling
from calibcast.passes.rescaling.rewriting import SUFFIX, Exponents, rewritten
from calibcast.passes.rescaling.solving import Solutions, solve
from calibcast.passes.rescaling.system import System, Tensor, system_of
from calibcast.passes.settings import Settings, low_type_of
from torch.export import ExportedProgram

# Limits as shares of the plan's own, and weights of what is lost below the smallest normal number.
_WEIGHINGS = ((1.0, 0.3), (0.125, 0.3), (1 / 64, 0.1), (1.0, 2.0))
_ROUNDS = 4  # of proposing again without what was not shown to be exact
_HEADROOM = 4.0  # as plans from measured rounding have it
_DEFAULT_LIMIT = 512.0


@dataclass(frozen=True)
class Proposal:
    """Exponents, and the program and ranges that they make."""

    exponents: Exponents
    program: ExportedProgram
    ranges: RangeTable
    refused: tuple[Refusal, ...]


def rescale(
    program: ExportedProgram,
    ranges: RangeTable,
    low_precision_type: torch.dtype | str = torch.float16,
    weights: str = "warn",
    **settings: Any,
) -> Rescaling:
    """Store tensors as powers of two of themselves where that lets more of the network run in the low type.

    No operator is added, but for a multiplication at an input or in a growing sum where that pays; the fp32 results
    have the same bits. The plan of `classify` with the same settings judges, and the program stays as it is where
    none is better. Inputs, outputs, written buffers and what has no equation (`calib.operators.exponents`) keep their
    true values. The rescaled weights are new tensors: train and save the original, and rescale again. Weight decay and
    gradients of rescaled weights are not those of the network.

    Args:
        ranges: from `calibrate`, of this program.
        low_precision_type: torch.float16; bfloat16 has the range of fp32, and nothing is changed.
        weights: what to do when the ranges were measured with other weights: "warn", "refuse" or "ignore".
        settings: further arguments of `classify`.

    Raises:
        SettingError: a setting is out of range. MismatchError: the ranges are of another program.
    """
    low_type, checked = low_type_of(low_precision_type), Settings(**settings)
    require_program(program)
    require_table(ranges)
    ranges.check(program, weights)
    why = _nothing_to_do(ranges, low_type)
    if why is not None:
        return Rescaling(program, ranges, {}, False, why)
    with paused():
        return _best(program, ranges, low_type, checked)


def _nothing_to_do(ranges: RangeTable, low_type: torch.dtype) -> str | None:
    if torch.finfo(low_type).smallest_normal <= torch.finfo(torch.float32).smallest_normal:
        return f"{dtype_name(low_type)} has the range of float32, so nothing has to be made to fit"
    if ranges.calibration.rescaled is not None:
        return "the program is rescaled already"
    return None


def _best(program: ExportedProgram, ranges: RangeTable, low_type: torch.dtype, settings: Settings) -> Rescaling:
    before = judged(program, ranges, low_type, settings)
    best: tuple[Proposal, Judgement] | None = None
    refused: tuple[Refusal, ...] = ()
    if before.work_low == before.bytes_low == 1.0:
        return Rescaling(program, ranges, {}, False, "all of it runs in the low type as it is", before, before)
    for proposal in proposals(program, ranges, low_type, settings):
        refused = refused or proposal.refused
        after = judged(proposal.program, proposal.ranges, low_type, settings)
        after = replace(after, added=_added_share(proposal))
        if after.beats(before if best is None else best[1]):
            best = proposal, after
        if best is not None and best[1].work_low == 1.0 and best[1].bytes_low == 1.0:
            break
    if best is None:
        why = "no powers of two let more of it run in the low type"
        return Rescaling(program, ranges, {}, False, why, before, before, refused)
    found, after = best
    why = f"{before} -> {after}"
    final = rewritten(program, found.exponents)
    scaled = _scaled_ranges(program, ranges, found.exponents, final, None)
    return Rescaling(final, scaled, found.exponents.tensors, True, why, before, after, found.refused, found.exponents)


def proposals(
    program: ExportedProgram, ranges: RangeTable, low_type: torch.dtype, settings: Settings
) -> Iterator[Proposal]:
    """Programs worth a look, the cautious ones first: without added multiplications, then with."""
    limit = _limit(settings, ranges, low_type)
    measures = Measures.of(program, ranges)
    reader, seen = CostReader(measures, format_of(low_type)), set[str]()
    plain = system_of(program)
    segments = segment_breaks(measures, solved(program, plain), limit)
    inputs = input_breaks(measures, limit)
    for breaks in dict.fromkeys([(), inputs, segments, (*inputs, *segments)]):
        system = system_of(program, breaks) if breaks else plain
        for share, floor in _WEIGHINGS if not breaks else _WEIGHINGS[:2]:
            exponents, refused = _proposed(program, system, reader, Costs(limit * share, floor), measures)
            if exponents and repr(exponents) not in seen:
                seen.add(repr(exponents))
                made = rewritten(program, exponents)
                if mask_tensors(made) == mask_tensors(program):  # else a number became a mask, or no longer is one
                    yield Proposal(exponents, made, _scaled_ranges(program, ranges, exponents, made, ""), refused)


def solved(program: ExportedProgram, system: System, held: set[int] | None = None) -> Solutions:
    """The solutions of a program's equations, weights let go before activations."""
    weights = set(input_targets(program))
    chosen = [v for v, kind in enumerate(system.kinds) if isinstance(kind, Tensor) and kind.node in weights]
    return solve(system, chosen, held or ())


def _proposed(
    program: ExportedProgram, system: System, reader: CostReader, costs: Costs, measures: Measures
) -> tuple[Exponents, tuple[Refusal, ...]]:
    """The cheapest exponents that are shown to be exact."""
    held, refused = set[int](), list[Refusal]()
    for _ in range(_ROUNDS):
        solutions = solved(program, system, held)
        exponents = Exponents.of(solutions, cheapest(reader.table(solutions, costs), solutions.free))
        found = refusals(measures, exponents)
        if not found:
            return exponents, tuple(refused)
        refused.extend(found)
        names = {refusal.node for refusal in found}
        held |= {v for v, k in enumerate(system.kinds) if k is not None and k.node in names}
        held |= _inputs_of(program, system, names)
    return Exponents(), tuple(refused)


def _inputs_of(program: ExportedProgram, system: System, names: set[str]) -> set[int]:
    read = {n.name for node in program.graph.nodes if node.name in names for n in node.all_input_nodes}
    return {v for v, k in enumerate(system.kinds) if isinstance(k, Tensor) and k.node in read}


def _limit(settings: Settings, ranges: RangeTable, low_type: torch.dtype) -> float:
    most = float(torch.finfo(low_type).max) / _HEADROOM
    given = settings.data_max
    if given is None:
        return most if ranges.rounding.height else _DEFAULT_LIMIT
    return min(float(given), most)


def _scaled_ranges(
    program: ExportedProgram, ranges: RangeTable, exponents: Exponents, made: ExportedProgram, weights: str | None
) -> RangeTable:
    added = {f"{name}{SUFFIX}": name for name in exponents.multiplied}
    nodes = {node.name: node for node in program.graph.nodes}
    numbers = {}
    for (node, argument), k in exponents.numbers.items():
        value = argument_of(nodes[node], argument)
        value = implied(nodes[node], argument) if value is None else value
        numbers[node, argument] = NumberScale(float(value), k)  # type: ignore[arg-type]
    return ranges.scaled(exponents.tensors, made, added, numbers, weights)


def _added_share(proposal: Proposal) -> float:
    """What added multiplications read and write, as a share of the bytes of all activations."""
    if not proposal.exponents.multiplied:
        return 0.0
    frame = proposal.ranges.frame
    counts = dict(frame.select("node", "elements").iter_rows())
    whole = int(frame.filter(frame["kind"] == "activation")["elements"].sum())
    return float(2 * sum(counts[name] for name in proposal.exponents.multiplied) / max(1, whole))
