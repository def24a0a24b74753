"""What `rescale` gives: the rescaled program with its ranges, and what was done in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from calibcast.calib.number_text import counted, size
from calibcast.calib.ranges import RangeTable
from calibcast.passes.rescaling.exactness import Refusal
from calibcast.passes.rescaling.judging import Judgement
from calibcast.passes.rescaling.rewriting import Exponents
from torch.export import ExportedProgram

_MOST_LINES = 12


@dataclass(frozen=True)
class Rescaling:
    """A program, rescaled where that is a gain, and its range table.

    program: its fp32 outputs have the bits of the original's. ranges: of `program`; `ranges.true_values()` are the
    network's own. exponents: k by (node, output) of each tensor that is stored as 2^-k times itself. changed: False
    where the program is the caller's own. reason: why it is, or what was gained. before, after: how plans judge the two
    programs. refused: where exactness could not be shown. rewrite: the exponents, also of numbers and added nodes.
    """

    program: ExportedProgram = field(repr=False)
    ranges: RangeTable = field(repr=False)
    exponents: Mapping[tuple[str, int], int] = field(repr=False)
    changed: bool
    reason: str
    before: Judgement | None = None
    after: Judgement | None = None
    refused: tuple[Refusal, ...] = ()
    rewrite: Exponents = field(default_factory=Exponents, repr=False)

    def __str__(self) -> str:
        return described(self)


def described(rescaling: Rescaling) -> str:
    """In words: which tensors are stored times which power of two, what was rewritten, and what is gained."""
    if not rescaling.changed:
        return f"Rescaling: unchanged; {rescaling.reason}" + _refused(rescaling)
    kinds = dict(rescaling.ranges.frame.select("node", "kind").iter_rows())
    modules = dict(rescaling.ranges.frame.select("node", "module").iter_rows())
    by_exponent: dict[int, list[str]] = defaultdict(list)
    weights = 0
    for (node, _), k in rescaling.exponents.items():
        if kinds.get(node) == "activation":
            by_exponent[k].append(node)
        else:
            weights += 1
    lines = [
        f"  {counted(len(names), 'tensor')} {'is' if len(names) == 1 else 'are'} stored as 2^{-k} of "
        f"{'itself' if len(names) == 1 else 'themselves'}: {_places(names, modules)}"
        for k, names in sorted(by_exponent.items(), key=lambda found: -len(found[1]))
    ]
    numbers, added = len(rescaling.rewrite.numbers), rescaling.rewrite.multiplied
    what = f"  rewritten: {counted(weights, 'weight')}, {counted(numbers, 'literal')}"
    if added:
        what += f"; added: {', '.join(f'{node} times 2^{-k}' for node, k in added.items())}"
    more = [f"  and {len(lines) - _MOST_LINES} more powers"] if len(lines) > _MOST_LINES else []
    title = "Rescaling: fp32 results keep their bits"
    return "\n".join([title, *lines[:_MOST_LINES], *more, what, _gain(rescaling)]) + _refused(rescaling)


def _gain(rescaling: Rescaling) -> str:
    before, after = rescaling.before, rescaling.after
    if before is None or after is None:
        return f"  {rescaling.reason}"
    return (
        f"  fp32 nodes {before.high} -> {after.high}, work {before.work_low:.0%} -> {after.work_low:.0%}, "
        f"bytes {before.bytes_low:.0%} -> {after.bytes_low:.0%}, casts {before.casts} -> {after.casts} "
        f"({size(before.bytes_cast)} -> {size(after.bytes_cast)})"
    )


def _refused(rescaling: Rescaling) -> str:
    if not rescaling.refused:
        return ""
    shown = "\n".join(f"  left as it is: {r}" for r in rescaling.refused[:5])
    return f"\n{shown}"


def _places(names: list[str], modules: dict[str, str]) -> str:
    found = list(dict.fromkeys(modules.get(name) or name for name in names))
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
