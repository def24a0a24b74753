"""Several processes under torchrun: which one this is. Without torch: a wrong job file is told before its import."""

from __future__ import annotations

import os
from dataclasses import dataclass

from calibcast.engines.job.errors import JobError


@dataclass(frozen=True)
class Ranks:
    """This process among `world` processes: `rank` counts over all machines, `local` on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the artifacts."""
        return self.rank == 0

    @classmethod
    def here(cls) -> Ranks:
        """The values that torchrun sets in the environment; a single process without them. Raises JobError when they
        are not usable."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        try:
            rank, world, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        except ValueError as error:
            raise JobError(f"RANK, WORLD_SIZE and LOCAL_RANK in the environment are no numbers: {error}") from error
        if not 0 <= rank < world:
            raise JobError(f"RANK={rank} and WORLD_SIZE={world} in the environment do not fit each other")
        return cls(rank, world, local)
