"""Several processes under torchrun: this process's rank, and messages between processes. No pickle: bytes only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from calibcast.calib.errors import CalibcastError
from calibcast.engines.job.errors import JobError

# torch is imported where it is needed: a wrong job file is told before that.
if TYPE_CHECKING:
    import torch

# Shards may differ by hours, so wait long. A process that died closes its connections, which is noticed at once.
_PATIENCE = timedelta(days=7)


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


@contextmanager
def connected(ranks: Ranks) -> Iterator[None]:
    """Inside the block, the processes can send each other bytes. Does nothing for a single process."""
    if ranks.world == 1:
        yield
        return
    import torch.distributed as dist

    with _told("connect to"):
        # Statistics are merged on the host, so gloo serves machines with and without GPUs.
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def tell_all(ranks: Ranks, content: bytes = b"") -> bytes:
    """Send the first process's `content` to all. Every process returns it."""
    if ranks.world == 1:
        return content
    import torch
    import torch.distributed as dist

    with _told("hear from"):
        size = torch.tensor([len(content)])
        dist.broadcast(size, 0)
        body = _tensor(content) if ranks.first else torch.empty(int(size), dtype=torch.uint8)
        if int(size):
            dist.broadcast(body, 0)
        return body.numpy().tobytes()


def give(content: bytes) -> None:
    """Send `content` to the first process, which receives it with `take`."""
    import torch
    import torch.distributed as dist

    with _told("reach"):
        dist.send(torch.tensor([len(content)]), 0)
        dist.send(_tensor(content), 0)


def take(rank: int) -> bytes:
    """Receive what process `rank` sends with `give`. Raises CalibcastError when that process is lost."""
    import torch
    import torch.distributed as dist

    with _told("hear from", rank):
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, rank)
        body = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(body, rank)
        return body.numpy().tobytes()


def _tensor(content: bytes) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


@contextmanager
def _told(what: str, rank: int | None = None) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # gloo's errors are RuntimeErrors
        who = "the other processes" if rank is None else f"process {rank}"
        text = (str(error).strip() or repr(error)).splitlines()[0]
        raise CalibcastError(
            f"cannot {what} {who}: {text}. Checkpoints stay: start the same command again to go on, or merge what "
            "there is with `calibcast merge`."
        ) from error
