"""Which batches of a source a process takes: by their numbers in the order of one process alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

# Multiples of the golden ratio, modulo one, are spread evenly over any share, also those of every second or third
# number (Knuth, The Art of Computer Programming, volume 3, section 6.4); in 32-bit integers, to be exact.
_GOLDEN, _WHOLE = 2654435769, 1 << 32


@dataclass(frozen=True)
class Share:
    """The numbers of a part of the batches, of one process among several.

    held_out_share: of all batches, evenly spread: a batch is on the same side whatever the length, and the first one
    is always held out.
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
        of_all = islice((number for number in count() if self._is_held_out(number) == self.held_out), self.most)
        return (number for number in of_all if number % self.world == self.rank)

    def _is_held_out(self, number: int) -> bool:
        return number * _GOLDEN % _WHOLE < self.held_out_share * _WHOLE
