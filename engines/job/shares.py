"""Which batches of a source a process takes: by their numbers in the order of one process alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice


@dataclass(frozen=True)
class Share:
    """The numbers of a part of the batches, of one process among several.

    held_out_share: of all batches, evenly spread, so that it is the same whatever the length, and never moves.
    held_out: take these, or the others. most: at most so many, over all processes. rank, world: every world-th of
    them, from the rank-th on: the same batches as one process has, so that counts and extrema are the same.
    """

    held_out_share: float = 0.0
    held_out: bool = False
    most: int | None = None
    rank: int = 0
    world: int = 1

    def numbers(self, length: int | None) -> Iterator[int]:
        """The numbers of this process's batches, ascending; without end where the length is unknown."""
        every = count() if length is None else range(length)
        mine = (number for number in every if self._is_held_out(number) == self.held_out)
        return islice(islice(mine, self.most), self.rank, None, self.world)

    def own_numbers(self) -> Iterator[int]:
        """As `numbers`, of a loader that already gives only this process's shard: its k-th is k * world + rank."""
        for number in count(self.rank, self.world):
            if self._is_held_out(number) == self.held_out:
                before = math.floor(number * self.held_out_share + 0.5)
                if self.most is not None and (before if self.held_out else number - before) >= self.most:
                    return
                yield number

    def _is_held_out(self, number: int) -> bool:
        share = self.held_out_share
        return math.floor((number + 1) * share + 0.5) > math.floor(number * share + 0.5)
