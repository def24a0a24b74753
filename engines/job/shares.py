"""Which batches of a source a process takes, by the numbers that they have in the order of a single process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

# Multiples of the golden ratio, modulo one, are spread evenly, and so are the multiples by every second or third number
# (Knuth, The Art of Computer Programming, volume 3, section 6.4). They are computed in 32-bit integers, so that they
# are exact.
_GOLDEN, _WHOLE = 2654435769, 1 << 32


@dataclass(frozen=True)
class Share:
    """Selects a part of the batches, for one process among several.

    held_out_share: the share of all batches that is held out, evenly spread. Whether a batch is held out does not
    depend on the length; the first one always is. held_out: take the held-out batches, else the others. most: at most
    this many, over all processes. rank, world: take every world-th of them, from the rank-th on. Together the processes
    have the same batches as a single process, so counts and extrema are the same.
    """

    held_out_share: float = 0.0
    held_out: bool = False
    most: int | None = None
    rank: int = 0
    world: int = 1

    def numbers(self, length: int | None) -> Iterator[int]:
        """The numbers of this process's batches, ascending; endless where the length is unknown."""
        every = count() if length is None else range(length)
        mine = (number for number in every if self._is_held_out(number) == self.held_out)
        return islice(islice(mine, self.most), self.rank, None, self.world)

    def own_numbers(self) -> Iterator[int]:
        """Like `numbers`, for a loader that already gives only this process's shard: its k-th batch has number k *
        world + rank."""
        of_all = islice((number for number in count() if self._is_held_out(number) == self.held_out), self.most)
        return (number for number in of_all if number % self.world == self.rank)

    def _is_held_out(self, number: int) -> bool:
        return number * _GOLDEN % _WHOLE < self.held_out_share * _WHOLE
