"""Messages between the processes under torchrun. No pickle: bytes only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from calibcast.calib.errors import CalibcastError
from calibcast.engines.job.ranks import Ranks

# Shards may differ by hours, so wait long. A process that died closes its connections, which is noticed at once.
_PATIENCE = timedelta(days=7)


@contextmanager
def connected(ranks: Ranks) -> Iterator[None]:
    """Inside the block, the processes can send each other bytes. Does nothing for a single process."""
    if ranks.world == 1:
        yield
        return
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
    with _told("hear from"):
        size = torch.tensor([len(content)])
        dist.broadcast(size, 0)
        body = _tensor(content) if ranks.first else torch.empty(int(size), dtype=torch.uint8)
        if int(size):
            dist.broadcast(body, 0)
        return body.numpy().tobytes()


def give(content: bytes) -> None:
    """Send `content` to the first process, which receives it with `take`."""
    with _told("reach"):
        dist.send(torch.tensor([len(content)]), 0)
        dist.send(_tensor(content), 0)


def take(rank: int) -> bytes:
    """Receive what process `rank` sends with `give`. Raises CalibcastError when that process is lost."""
    with _told("hear from", rank):
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, rank)
        body = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(body, rank)
        return body.numpy().tobytes()


def _tensor(content: bytes) -> torch.Tensor:
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
