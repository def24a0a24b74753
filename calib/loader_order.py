"""Check that a loader repeats its order, and go on from the middle of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import xxhash
from calibcast.calib.errors import BatchError
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

_SHUFFLES = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def refuse_unseeded(dataloader: Any) -> None:
    """Raise BatchError for a DataLoader that shuffles without a generator: its order differs in every process."""
    if isinstance(dataloader, DataLoader):
        for sampler in _samplers(dataloader):
            if isinstance(sampler, _SHUFFLES) and sampler.generator is None:
                raise BatchError(
                    f"the DataLoader shuffles ({type(sampler).__name__}) without a seed, so its order does not repeat "
                    "and a run that was killed could not go on. Give "
                    "DataLoader(..., generator=torch.Generator().manual_seed(0)), or do not shuffle."
                )


def rewind(dataloader: Any) -> None:
    """Set the generators of a DataLoader back to their seeds, so that every pass has the same order."""
    if isinstance(dataloader, DataLoader):
        owners = [dataloader, *_samplers(dataloader)]
        for generator in {
            id(g): g for owner in owners if (g := getattr(owner, "generator", None)) is not None
        }.values():
            generator.manual_seed(generator.initial_seed())


def resumed(dataloader: Iterable[Any], position: int, last: str) -> Iterator[Any]:
    """The batches of `dataloader` after the first `position`, which are read and dropped.

    Raises BatchError when the loader ends earlier, or when the hash of the batch at `position - 1` is not `last` (if
    both are known): then the data or their order changed.
    """
    batches = iter(dataloader)
    batch: Any = None
    for index in range(position):
        try:
            batch = next(batches)
        except StopIteration:
            raise BatchError(
                f"the dataloader ended after {index} batches, but {position} were finished when the checkpoint was "
                "written: the data changed. Delete the checkpoint to start again."
            ) from None
    if position and last and (found := batch_hash(batch)) and found != last:
        raise BatchError(
            f"batch {position - 1} is not the one that it was when the checkpoint was written: the data or the order "
            "changed. Seed every shuffle of the loader, and delete the checkpoint to start again."
        )
    yield from batches


def batch_hash(batch: Any) -> str:
    """A hash of a batch as the loader gave it; empty when nothing in it can be hashed."""
    total, some = xxhash.xxh3_64(), False
    for leaf in pytree.tree_leaves(dict(batch) if hasattr(batch, "keys") else batch):
        if isinstance(leaf, torch.Tensor) and not leaf.is_nested and leaf.layout == torch.strided:
            flat = leaf.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            total.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        elif isinstance(leaf, (str, int, float, bool, bytes)):
            total.update(repr(leaf).encode())
        else:
            continue
        some = True
    return str(total.hexdigest()) if some else ""


def _samplers(dataloader: DataLoader[Any]) -> list[Any]:
    return [s for s in (dataloader.sampler, getattr(dataloader.batch_sampler, "sampler", None)) if s is not None]
