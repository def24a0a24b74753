"""After `tune` has a plan that meets the budget: plans with more in the low type, run one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from calibcast.passes.classification import Planning
from calibcast.passes.packing import Packed, Packing
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.proving import Outcome, spare_db
from calibcast.passes.rounding_course import Course
from calibcast.passes.verdict import Verdict

# Runs, beside those that find the first plan. One that misses ends with the batch that shows it, and costs little; the
# others count by themselves, too.
MOST_RELAXING, MOST_TAKEN = 12, 4
# A plan is worth a run if this much more of the program is low, by `Packing.worth`.
GAIN = 0.01
# A group of nodes that the table sees no room for is tried by itself if it is this much.
LARGE_GAIN = 0.02
# A plan that is taken must have this much to spare, or as much as the one that it replaces: one that only just passes
# must not replace one that passes by far. So much is wanted, too, where a single channel decides, as it differs more
# from one set of data to the next.
RELAXED_DB = 2.0
# After a run that missed, the predicted noise must fall by half the miss, within these limits, dB: the noise of a
# channel of few elements is half chance. After one with more than ROOM_DB to spare, it may rise by half of that.
LEAST_DB, MOST_DB, ROOM_DB = 1.0, 5.0, 2.0


@dataclass
class _Filling:
    """Plans that the table makes from one beginning. limit: the noise that they may have; failing: one too much."""

    high: frozenset[str]
    limit: float
    failing: float = math.inf

    def learn(self, predicted: float, spare: float, taken: bool) -> None:
        """Set the limit by what a run has shown. spare: beyond what was wanted, dB."""
        if taken:
            raised = self.limit * 10 ** (spare / 20) if spare > ROOM_DB else self.limit
            self.limit = raised if raised < self.failing else math.sqrt(self.limit * self.failing)
            return
        self.failing = min(self.failing, self.limit)
        self.limit = min(predicted, self.limit) * 10 ** (-min(max(-spare / 2, LEAST_DB), MOST_DB) / 10)


@dataclass(frozen=True)
class _Candidate:
    """A plan to run, and the filling that it comes of; None for one large group by itself."""

    packed: Packed
    filling: _Filling | None = None


class Relaxing:
    """Tries plans with more in the low type than the best so far has, and no more bytes in fp32.

    The table makes them, from all nodes high that rounding decides, or from the nodes of the best plan; how much noise
    it may predict is learned from the runs. Where it sees no room, it may be wrong of a large node, or of the one that
    a large node stays for: each of these is tried by itself.
    """

    def __init__(
        self,
        planning: Planning,
        course: Course,
        budget: float,
        best: Outcome,
        tried: Iterable[PrecisionPlan],
        prove: Callable[[PrecisionPlan, float], Outcome],
    ) -> None:
        """course: of the planning. prove: runs a plan; it may end where the plan has less dB than that."""
        facts = planning.facts
        self.runs = self.taken = 0
        self._planning, self._course, self._budget, self._prove = planning, course, budget, prove
        self._packing = Packing(course, [members for _, members in facts.ties], facts.sizes, planning.work)
        self._best = best
        self._first = self._at = self._packing.lowered(best.plan.high_precision_nodes, ())
        self._tried = {self._at.high, *(self._packing.free.intersection(p.high_precision_nodes) for p in tried)}
        wanted = 10 ** (-self._wanted / 10)
        measured = 10 ** (-best.sqnr_db / 10)
        known = measured > 0 and self._at.noise > 0
        self._all = _Filling(self._packing.free, wanted)
        self._further = _Filling(self._at.high, wanted * self._at.noise / measured if known else wanted)

    def run(self, raised: Mapping[str, Verdict], most_taken: int = MOST_TAKEN) -> Outcome:
        """The best plan that was found. raised: nodes that must be high. most_taken: how many plans are taken at most,
        each in place of the one before.
        """
        while self.runs < MOST_RELAXING and self.taken < most_taken:
            candidate = self._candidate()
            if candidate is None:
                break
            packed = candidate.packed
            self._tried.add(packed.high)
            chosen = self._course.choosing(packed.high, packed.follows)
            outcome = self._prove(self._planning.plan(None, raised, course=chosen), self._wanted)
            self.runs += 1
            self._learn(candidate, outcome)
        return self._best

    @property
    def _wanted(self) -> float:
        return self._budget + max(0.0, min(RELAXED_DB, spare_db(self._best, self._budget)))

    def _candidate(self) -> _Candidate | None:
        if self._packing.worth(self._at.high) < GAIN:
            return None
        filled = [
            _Candidate(self._packing.packed(f.high, f.limit), f) for f in (self._all, self._further) if f.limit > 0
        ]
        found = [candidate for candidate in filled if self._gains(candidate.packed, GAIN)]
        return max(found, key=lambda c: c.packed.worth) if found else self._large()

    def _large(self) -> _Candidate | None:
        """Without the largest group that has not been tried: the best plan, or the one that all began with.

        What the table says must keep to the budget, too. A single run of few elements may do so by chance.
        """
        limit = max(10 ** (-self._budget / 10), self._further.limit)
        groups = sorted(self._packing.groups, key=lambda g: -self._packing.worth(g))
        large = [group for group in groups if self._packing.worth(group) >= LARGE_GAIN]
        for high in (self._at.high, self._first.high):
            for group in large:
                if group <= high:
                    packed = self._packing.lowered(high, group)
                    if packed.noise <= limit and self._gains(packed, GAIN):
                        return _Candidate(packed)
        return None

    def _gains(self, packed: Packed, least: float) -> bool:
        sizes = self._planning.facts.sizes
        now, before = (sum(sizes.get(name, 0) for name in high) for high in (packed.high, self._at.high))
        return packed.high not in self._tried and packed.worth >= self._at.worth + least and now <= before

    def _learn(self, candidate: _Candidate, outcome: Outcome) -> None:
        spare, taken = spare_db(outcome, self._wanted), outcome.meets(self._wanted)
        if candidate.filling is not None:
            candidate.filling.learn(candidate.packed.noise, spare, taken)
        if taken:
            self.taken += 1
            self._best, self._at = outcome, candidate.packed
            self._further.high = candidate.packed.high
