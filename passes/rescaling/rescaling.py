"""`rescale`: a program that fits a low type by exact powers of two, found from its ranges."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from calibcast.calib.execution import require_program
from calibcast.calib.gc_pause import paused
from calibcast.calib.graph import argument_of, dtype_name, input_targets
from calibcast.calib.masks import mask_tensors
from calibcast.calib.ranges import RangeTable, require_table
from calibcast.calib.rounding_scaling import NumberScale
from calibcast.passes.number_formats import format_of
from calibcast.passes.rescaling.breaks import input_breaks, segment_breaks
from calibcast.passes.rescaling.checking import Check
from calibcast.passes.rescaling.costs import CostReader, Costs
from calibcast.passes.rescaling.equations import implied
from calibcast.passes.rescaling.exactness import Refusal, refusals
from calibcast.passes.rescaling.inlining import inlined, inlined_ranges, with_own_names
from calibcast.passes.rescaling.judging import LOUDEST_DB, Judgement, judged
from calibcast.passes.rescaling.measures import Measures
from calibcast.passes.rescaling.proposals import cheapest
from calibcast.passes.rescaling.result import Rescaling
from calibcast.passes.rescaling.rewriting import SUFFIX, Exponents, rewritten
from calibcast.passes.rescaling.solving import solve
from calibcast.passes.rescaling.system import Breaks, Solutions, System, Tensor, system_of
from calibcast.passes.settings import Settings, low_type_of
from torch.export import ExportedProgram

_log = logging.getLogger("calibcast")
# Ways of weighing: the limit, as a share of the plan's own, and the weight of loss below the smallest normal number.
_WEIGHINGS = ((1.0, 0.3), (0.125, 0.3), (1 / 64, 0.1), (1.0, 2.0))
_ROUNDS = 4  # how often to propose again, without the nodes that were not shown to be exact
_HEADROOM = 4.0  # as plans from measured rounding have it
_DEFAULT_LIMIT = 512.0


@dataclass(frozen=True)
class Proposal:
    """Exponents, and the program and ranges that they make. loss_db: of the low nodes, see `CostReader.loss_db`."""

    exponents: Exponents
    program: ExportedProgram
    ranges: RangeTable
    refused: tuple[Refusal, ...]
    loss_db: Callable[[frozenset[str]], float]


def rescale(  # noqa: PLR0913 - the public contract
    program: ExportedProgram,
    ranges: RangeTable,
    low_precision_type: torch.dtype | str = torch.float16,
    weights: str = "warn",
    dataloader: Iterable[Any] | None = None,
    transform: Callable[[Any], Any] | None = None,
    device: torch.device | str | None = None,
    carry_state: bool = False,
    **settings: Any,
) -> Rescaling:
    """Store tensors multiplied by powers of two where that lets more of the network run in the low type.

    No operator is added, except a multiplication at an input or in a growing sum where that pays; the fp32 results
    have the same bits. Proposals are judged by the plan of `classify` with the same settings, and the program stays as
    it is where none is better. Inputs, outputs, written buffers and operators without an equation
    (`calib.operators.exponents`) keep their true values. The rescaled weights are new tensors: train and save the
    original, and rescale again. Weight decay and gradients of rescaled weights are not those of the network.

    Args:
        ranges: from `calibrate`, of this program.
        low_precision_type: torch.float16; bfloat16 has the range of fp32, and nothing is changed.
        weights: what to do when the ranges were measured with other weights: "warn", "refuse" or "ignore".
        dataloader: batches as `calibrate` takes them. Both programs are run on the first two in fp32: where a result
            has other bits, the part to blame is left as it is, and `refused` says so. Without data the range table
            alone shows that all is exact, for what calibration has seen.
        transform, device, carry_state: as in `calibrate`.
        settings: further arguments of `classify`.

    Raises:
        SettingError: a setting is out of range. MismatchError: the ranges are of another program. BatchError: as in
        `calibrate`.
    """
    low_type, checked = low_type_of(low_precision_type), Settings(**settings)
    require_program(program)
    require_table(ranges)
    ranges.check(program, weights)
    why = _nothing_to_do(ranges, low_type)
    if why is not None:
        return Rescaling(program, ranges, {}, False, why)
    flat = inlined(program)
    table = ranges if flat is program else inlined_ranges(ranges, flat)
    check = None if dataloader is None else Check.of(flat, dataloader, transform, device, carry_state)
    with paused():
        found = _checked(_Search(flat, table, low_type, checked), check)
    if flat is program:
        return found
    own = with_own_names(found.ranges, ranges) if found.changed else ranges
    return replace(found, program=found.program if found.changed else program, ranges=own)


def _nothing_to_do(ranges: RangeTable, low_type: torch.dtype) -> str | None:
    if torch.finfo(low_type).smallest_normal <= torch.finfo(torch.float32).smallest_normal:
        return f"{dtype_name(low_type)} has the range of float32, so nothing has to be made to fit"
    if ranges.calibration.rescaled is not None:
        return "the program is rescaled already"
    return None


@dataclass(frozen=True)
class _Search:
    """What proposals are made for. held: nodes around which nothing is rescaled, as a run gave other bits there."""

    program: ExportedProgram
    ranges: RangeTable
    low_type: torch.dtype
    settings: Settings
    held: tuple[Refusal, ...] = ()


def _checked(search: _Search, check: Check | None) -> Rescaling:
    """The best proposal. Where there is data, it is run beside the original; a node that gave other bits is left as it
    is, and the search repeated.
    """
    for _ in range(_ROUNDS):
        found = _best(search)
        if check is None or not found.changed:
            return found
        wrong = check.difference(found.program, found.rewrite)
        if wrong is None:
            return found
        _log.warning("rescaling leaves %s as it is: %s", wrong.node, wrong.reason)
        search = replace(search, held=(*search.held, wrong))
    why = f"fp32 results were not the same bits: {'; '.join(str(refusal) for refusal in search.held)}"
    return Rescaling(search.program, search.ranges, {}, False, why, found.before, found.before, search.held)


def _best(search: _Search) -> Rescaling:
    program, ranges, low_type, settings = search.program, search.ranges, search.low_type, search.settings
    before = judged(program, ranges, low_type, settings)
    if before.work_low == before.bytes_low == 1.0:
        return Rescaling(program, ranges, {}, False, "all of it runs in the low type as it is", before, before)
    best: tuple[Proposal, Judgement] | None = None
    refused = search.held
    for proposal in proposals(search):
        refused = (*search.held, *proposal.refused) if len(refused) == len(search.held) else refused
        after = judged(proposal.program, proposal.ranges, low_type, settings, proposal.loss_db)
        after = replace(after, added=_added_share(proposal))
        measured = ranges.rounding.height > 0  # then the budget says what is too loud
        if after.beats(before) and (measured or after.loss_db <= LOUDEST_DB):
            best = (proposal, after) if best is None or after.improves(best[1]) else best
        if best is not None and best[1].work_low == best[1].bytes_low == 1.0 and best[1].quiet:
            break
    if best is None:
        why = "no powers of two let more of it run in the low type"
        return Rescaling(program, ranges, {}, False, why, before, before, refused)
    found, after = best
    final = rewritten(program, found.exponents)
    scaled = _scaled_ranges(program, ranges, found.exponents, final, None)
    shown = (*search.held, *found.refused)
    return Rescaling(
        final, scaled, found.exponents.tensors, True, f"{before} -> {after}", before, after, shown, found.exponents
    )


def proposals(search: _Search) -> Iterator[Proposal]:
    """Programs worth a try, the cautious ones first: without added multiplications, then with them."""
    program, ranges = search.program, search.ranges
    limit = _limit(search.settings, ranges, search.low_type)
    measures = Measures.of(program, ranges)
    reader, seen = CostReader(measures, format_of(search.low_type)), set[str]()
    plain = system_of(program)
    segments = segment_breaks(measures, solved(program, plain), limit)
    inputs = input_breaks(measures, limit)
    names, masks = {refusal.node for refusal in search.held}, mask_tensors(program)
    several: list[Breaks] = [{}, inputs, segments, {**inputs, **segments}]
    for place, breaks in enumerate(several):
        if breaks in several[:place]:
            continue
        system = system_of(program, breaks) if breaks else plain
        for share, floor in _WEIGHINGS if not breaks else _WEIGHINGS[:2]:
            exponents, refused = _proposed(program, system, reader, Costs(limit * share, floor), measures, names)
            if exponents and repr(exponents) not in seen:
                seen.add(repr(exponents))
                made = rewritten(program, exponents)
                if mask_tensors(made) == masks:  # else a number became a mask, or no longer is one
                    scaled = _scaled_ranges(program, ranges, exponents, made, "")
                    yield Proposal(exponents, made, scaled, refused, partial(reader.loss_db, exponents))


def solved(program: ExportedProgram, system: System, held: set[int] | None = None) -> Solutions:
    """The solutions of a program's equations; weights are eliminated before activations."""
    asked = frozenset(held or ())
    if asked not in system.solutions:
        weights = set(input_targets(program))
        chosen = [v for v, kind in enumerate(system.kinds) if isinstance(kind, Tensor) and kind.node in weights]
        system.solutions[asked] = solve(system, chosen, asked)
    return system.solutions[asked]


def _proposed(
    program: ExportedProgram,
    system: System,
    reader: CostReader,
    costs: Costs,
    measures: Measures,
    left: Collection[str],
) -> tuple[Exponents, tuple[Refusal, ...]]:
    """The cheapest exponents that are shown to be exact. left: nodes that stay as they are."""
    held, refused = _around(program, system, left), list[Refusal]()
    for _ in range(_ROUNDS):
        solutions = solved(program, system, held)
        exponents = Exponents.of(solutions, cheapest(reader.table(solutions, costs), solutions.free))
        found = refusals(measures, exponents)
        if not found:
            return exponents, tuple(refused)
        refused.extend(found)
        held |= _around(program, system, {refusal.node for refusal in found})
    return Exponents(), tuple(refused)


def _around(program: ExportedProgram, system: System, names: Collection[str]) -> set[int]:
    """The variables of nodes, of the numbers in their calls, and of what they read."""
    near = {*names, *(n.name for node in program.graph.nodes if node.name in names for n in node.all_input_nodes)}
    own = {v for v, k in enumerate(system.kinds) if k is not None and k.node in names}
    return own | {v for v, k in enumerate(system.kinds) if isinstance(k, Tensor) and k.node in near}


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
