"""The `data_max` at which each node flips: what any `data_max` would decide, without running the rules again.

Only the rule `data_max` depends on that limit; `follows` and ties pass its verdict on. So the rules run once:
`data_max` gives the number that it compares with its limit, and the others say whether they keep the node high anyway.
A node is then low from one `data_max` on: its own number, or the largest of the nodes that it follows or is tied to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from calibcast.passes.facts import NodeFacts
from calibcast.passes.judge import Judge
from calibcast.passes.program_facts import ProgramFacts
from calibcast.passes.rules import Follows
from calibcast.passes.tensor_rules import DataMax
from calibcast.passes.ties import NamedTie
from calibcast.passes.verdict import LOW

Flips = dict[str, float | None]


class LazyFlips(Mapping[str, Mapping[str, float | None]]):
    """The flips of a plan by low type, each computed on first use, as that takes as long as deciding.

    A copy, pickled or not, is the plain dict. `find` is released when nothing is left to find.
    """

    def __init__(self, names: Iterable[str], find: Callable[[str], Flips] | None = None) -> None:
        self._found: dict[str, Flips | None] = dict.fromkeys(names)
        self._find = find if self._found else None

    def __getitem__(self, name: str) -> Flips:
        found = self._found[name]
        if found is None:
            assert self._find is not None
            found = self._found[name] = self._find(name)
            if None not in self._found.values():
                self._find = None
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def settle(self) -> dict[str, Flips]:
        """Compute all, and return them."""
        return {name: self[name] for name in self}

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.settle(),)


def flips_of(program: ProgramFacts, judge: Judge) -> Flips:
    """For each node that is decided, in graph order: the least `data_max` at which it is low; None where it never is.

    inf: it is low only with the rule switched off (nothing finite was measured). The judge's own `data_max` is not
    used. A rule of the user's own is called once, with its inputs as if they were low.
    """
    reader, as_if_low = program.reader(judge.low_type), dict.fromkeys(program.outlines, LOW)
    asks = [replace(rule, limit=0.0, given=True) for rule in judge.rules if isinstance(rule, DataMax)]
    others = replace(judge, rules=tuple(rule for rule in judge.rules if not isinstance(rule, (DataMax, Follows))))
    flips: Flips = {}
    followed: dict[str, Sequence[str]] = {}
    for name, outline in program.outlines.items():
        facts = reader.read(outline, as_if_low)
        included = judge.included(facts)
        if others.keeps_high(facts):
            flips[name] = None
        else:
            flips[name] = 0.0 if included else max((_held(rule, facts) for rule in asks), default=0.0)
        if facts.moves and not included and not facts.rounding_known:
            # By `follows`: a high decided input keeps the node high; where no input is decided, a high reader does.
            made = [tensor.name for tensor in facts.inputs if tensor.precision is not None]
            followed[name] = [*made, *program.leading.get(name, ())]
    return _settled(flips, followed, program.ties)


def low_at(flips: Mapping[str, float | None], data_max: float) -> list[str]:
    """The nodes that are low at this `data_max`, in graph order."""
    return [name for name, least in flips.items() if least is not None and data_max >= least]


def _held(rule: DataMax, facts: NodeFacts) -> float:
    """The number that the rule compares with its limit: the rule is met while the limit is below it."""
    verdict = rule(facts)
    if verdict is None or verdict.evidence is None:
        return 0.0
    return math.inf if math.isnan(verdict.evidence) else verdict.evidence


def _settled(flips: Flips, followed: Mapping[str, Sequence[str]], ties: Sequence[NamedTie]) -> Flips:
    """Pass thresholds on, in graph order, until ties change nothing any more: each can only rise."""
    while True:
        moved = False
        for name, others in followed.items():
            before, flips[name] = flips[name], _later([flips[name], *(flips[other] for other in others)])
            moved |= flips[name] != before
        for tie, members in ties:
            decided = [name for name in members if name in flips]
            stays = tie.pinned is not None or len(decided) < len(members)
            last = None if stays else _later([flips[name] for name in decided])
            for name in decided:
                moved |= flips[name] != last
                flips[name] = last
        if not moved:
            return flips


def _later(thresholds: Sequence[float | None]) -> float | None:
    known = [threshold for threshold in thresholds if threshold is not None]
    return max(known, default=0.0) if len(known) == len(thresholds) else None
