"""Numbered batches: from a dataset with random access, from a stream, or from the user's loader."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from calibcast.calib.errors import BatchError
from calibcast.calib.loader_order import batch_hash, refuse_unseeded, rewind
from calibcast.engines.job.shares import Share
from torch.utils.data import DataLoader, IterableDataset, Sampler
from torch.utils.data.distributed import DistributedSampler

_log = logging.getLogger("calibcast")


@dataclass(frozen=True)
class Loaded:
    """Batch `number` as the source gave it, or the error that it raised instead."""

    number: int
    batch: Any = None
    error: Exception | None = None


@dataclass(frozen=True)
class Done:
    """What an earlier run has finished: how many of this process's batches, and the hash of the last one."""

    count: int = 0
    last: str = ""


class Batches(Protocol):
    """A source of numbered batches, the same in every pass and every process."""

    @property
    def length(self) -> int | None:
        """How many batches there are over all processes; None where that is unknown."""

    def read(self, share: Share, done: Done) -> Iterator[Loaded]:
        """The batches of `share`, without those in `done`. Raises BatchError when the source cannot continue."""


class _Rows:
    """A `datasets.Dataset` as batches with random access, for a DataLoader's workers."""

    def __init__(self, dataset: Any, batch_size: int) -> None:
        self._dataset, self._size = dataset, batch_size

    def __getitem__(self, number: int) -> Any:
        return self._dataset[number * self._size : (number + 1) * self._size]

    def __len__(self) -> int:
        return -(-len(self._dataset) // self._size)


def as_it_is(batch: Any) -> Any:
    """The batch itself: a `collate_fn` that changes nothing."""
    return batch


@dataclass(frozen=True)
class RowBatches:
    """Batches of a `datasets.Dataset`: only the wanted ones are read."""

    dataset: Any
    batch_size: int
    workers: int = 0

    @property
    def length(self) -> int:
        return len(_Rows(self.dataset, self.batch_size))

    def read(self, share: Share, done: Done) -> Iterator[Loaded]:
        numbers = list(share.numbers(self.length))[done.count :]
        rows: Any = _Rows(self.dataset, self.batch_size)
        loader: DataLoader[Any] = DataLoader(
            rows, batch_size=None, sampler=numbers, num_workers=self.workers, collate_fn=as_it_is
        )
        yield from _one_by_one(loader, iter(numbers))


@dataclass(frozen=True)
class StreamBatches:
    """Batches of a `datasets.IterableDataset`. Every process reads the whole stream, and decodes only its own
    batches."""

    dataset: Any
    batch_size: int

    @property
    def length(self) -> None:
        return None

    def read(self, share: Share, done: Done) -> Iterator[Loaded]:
        from datasets.formatting import get_formatter

        tables = self.dataset.with_format("arrow").iter(batch_size=self.batch_size)
        formatter = get_formatter("torch", features=self.dataset.features)
        numbers = iter(share.numbers(None))
        for loaded in _one_by_one(tables, _Merged(numbers, done.count)):
            if loaded.error is not None:
                yield loaded
                continue
            try:
                yield Loaded(loaded.number, dict(formatter.format_batch(loaded.batch)))
            except Exception as error:  # an image that cannot be decoded raises any error of its library
                yield Loaded(loaded.number, error=error)


class LoaderBatches:
    """Batches of the user's own loader, which is made again for each pass.

    make: returns a DataLoader, or any iterable. sharded: the loader gives only this process's shard.
    """

    def __init__(self, make: Callable[[], Iterable[Any]], sharded: bool = False) -> None:
        self._make, self._sharded = make, sharded
        self._made: list[Any] = []  # loaders made to ask for the length, and not read yet

    @property
    def length(self) -> int | None:
        loader = self._take()
        self._made.append(loader)
        try:
            return None if self._gives_shard(loader) else len(loader)
        except (TypeError, NotImplementedError):  # an iterator, or an iterable-style dataset
            return None

    def _take(self) -> Any:
        return self._made.pop() if self._made else self._make()

    def _gives_shard(self, loader: Any) -> bool:
        return self._sharded or any(isinstance(sampler, DistributedSampler) for sampler in _samplers(loader))

    def read(self, share: Share, done: Done) -> Iterator[Loaded]:
        loader = self._take()
        refuse_unseeded(loader)
        rewind(loader)
        _warn_of_repeats(loader)
        sharded = self._gives_shard(loader)
        numbers = share.own_numbers() if sharded else share.numbers(None)
        # The last finished batch is read again, but not run, to check that the order repeats.
        merged = _Merged(iter(numbers), max(done.count - 1, 0), share.world if sharded else 1, share.rank * sharded)
        chosen = _only(loader, merged)
        items = _one_by_one(loader, merged) if chosen is None else _one_by_one(*chosen)
        for position, loaded in enumerate(items, max(done.count - 1, 0)):
            if position >= done.count:
                yield loaded
            elif done.last and loaded.error is None and batch_hash(loaded.batch) not in {"", done.last}:
                raise BatchError(
                    f"batch {loaded.number} is not the one that it was when the checkpoint was written: the data or "
                    "their order changed. Seed every shuffle and every random change of the loader."
                )


class _Merged:
    """Tells which of a source's consecutive batches are wanted: those in `numbers`, after the first `skipped` of
    them."""

    def __init__(self, numbers: Iterator[int], skipped: int, step: int = 1, first: int = 0) -> None:
        self._numbers, self._step, self._at = numbers, step, first - step
        for _ in range(skipped):
            next(numbers, None)
        self._next = next(numbers, None)

    @property
    def over(self) -> bool:
        """Nothing more is wanted."""
        return self._next is None

    def advance(self) -> int | None:
        """Move to the next batch: its number if it is wanted, else None."""
        self._at += self._step
        if self._at != self._next:
            return None
        self._next = next(self._numbers, None)
        return self._at


def _one_by_one(source: Iterable[Any], wanted: _Merged | Iterator[int]) -> Iterator[Loaded]:
    """Number the batches of `source`. A batch that raises is passed on as an error. Raises BatchError when the source
    gives nothing after an error."""
    try:
        batches = iter(source)
    except Exception as error:
        raise BatchError(f"the data cannot be read: {type(error).__name__}: {error}") from error
    failed: tuple[int, Exception] | None = None
    while not (isinstance(wanted, _Merged) and wanted.over):
        raised: Exception | None = None
        batch: Any = None
        try:
            batch = next(batches)
        except StopIteration:
            if failed is None:
                return
            raise BatchError(
                f"the loader raised {type(failed[1]).__name__} at batch {failed[0]} and gave nothing after it, so what "
                f"follows is lost: {failed[1]}"
            ) from failed[1]
        except Exception as error:
            raised = error
        number = wanted.advance() if isinstance(wanted, _Merged) else next(wanted, None)
        if raised is not None and number is None and not isinstance(wanted, _Merged):
            raise BatchError(f"the loader cannot go on: {type(raised).__name__}: {raised}") from raised
        if number is not None:
            failed = None if raised is None else (number, raised)
            yield Loaded(number, batch, raised)


class _Chosen(Sampler[Any]):
    """A sampler that leaves out the unwanted batches, so that they are not loaded."""

    def __init__(self, sampler: Iterable[Any], wanted: _Merged, numbers: deque[int]) -> None:
        self._sampler, self._wanted, self._numbers = sampler, wanted, numbers

    def __iter__(self) -> Iterator[Any]:
        for indices in self._sampler:
            if self._wanted.over:
                return
            number = self._wanted.advance()
            if number is not None:
                self._numbers.append(number)
                yield indices


def _only(loader: Any, wanted: _Merged) -> tuple[Iterable[Any], Iterator[int]] | None:
    """A DataLoader that loads only the wanted batches, and their numbers; None where `loader` does not allow it."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return None
    numbers: deque[int] = deque()  # filled ahead of the batches, as far as the workers prefetch
    batched = loader.batch_sampler is not None
    sampler = _Chosen(loader.batch_sampler if loader.batch_sampler is not None else loader.sampler, wanted, numbers)
    chosen: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_size=1 if batched else None,
        batch_sampler=sampler if batched else None,
        sampler=None if batched else sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )

    def taken() -> Iterator[int]:
        while numbers:
            yield numbers.popleft()

    return chosen, taken()


def _samplers(loader: Any) -> list[Any]:
    found = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    return [sampler for sampler in found if sampler is not None]


def _warn_of_repeats(loader: Any) -> None:
    for sampler in _samplers(loader)[:1]:
        if isinstance(sampler, DistributedSampler):
            samples = len(sampler.dataset)  # type: ignore[arg-type]
            if extra := sampler.total_size - samples:
                what = f"repeats {extra}" if extra > 0 else f"leaves out {-extra}"
                _log.warning(
                    "the DistributedSampler %s of %d samples to make the shards even: counts differ from those of one "
                    "process. Return a plain DataLoader, and the job shares its batches out exactly.", what, samples
                )  # fmt: skip
