"""The loop that measures batch after batch, and the file from which another process goes on if this one ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from calibcast.calib.calibration_run import Run, measure_weights
from calibcast.calib.checkpoint import Checkpoint, Pace
from calibcast.calib.errors import BatchError, MismatchError
from calibcast.calib.loader_order import batch_hash

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


class Keeper:
    """How many batches a run has done, saved in a file from time to time.

    path: the file; None saves nothing. made_of: fingerprints of everything that decides the results; a run with other
    fingerprints must not go on from this file. more: what else to write, by field of `Checkpoint`. kept: called when
    the file was written.
    """

    def __init__(
        self,
        run: Run,
        path: Path | None = None,
        pace: Pace | None = None,
        made_of: Mapping[str, str] | None = None,
        more: Callable[[], Mapping[str, Any]] = dict,
        kept: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self._run, self.path, self._pace, self._made_of = run, path, pace, dict(made_of or {})
        self._more, self._kept = more, kept
        self.position, self.last_hash = 0, ""
        self._last: Any = None
        self._came: tuple[Any, str] = (None, "")  # the batch that the loader gave last, with its hash

    def resume(self) -> Checkpoint | None:
        """Bring the run to the state in the file; without a file, measure the weights, which come first.

        Raises ArtifactError for a file that is no checkpoint, MismatchError for one of another run.
        """
        if self.path is None or not self.path.exists():
            measure_weights(self._run)
            return None
        found = Checkpoint.load(self.path)
        if (difference := found.difference(self._made_of)) is not None:
            raise MismatchError(f"{difference} changed since the checkpoint {self.path} was written")
        self._run.restore(found)
        self.position, self.last_hash = found.position, found.last
        return found

    def watched(self, loaded: Iterable[Loaded], batch_in: Callable[[Loaded], Any] = lambda it: it) -> Iterator[Loaded]:
        """What a loader gives, each batch hashed before anyone gets it: a transform may change it in place."""
        for item in loaded:
            batch = batch_in(item)
            self._came = batch, "" if self.path is None else batch_hash(batch)
            yield item

    def advance(self, batch: Any) -> None:
        """Count one more batch, measured or left out. Writes the file when it is due."""
        self.position += 1
        self._last, self.last_hash = batch, self._came[1] if self._came[0] is batch else ""
        if self._pace is not None and self._pace.tick():
            self.write()
            self._pace.reset()

    def write(self) -> Checkpoint:
        """Write the file now."""
        assert self.path is not None
        self.last_hash = self.last_hash or (batch_hash(self._last) if self._last is not None else "")
        made = self._run.checkpoint(self.position, self._made_of, self.last_hash, **self._more())
        made.save(self.path)
        self._kept(self.path)
        return made


def measure_all(
    run: Run,
    items: Iterable[tuple[Any, Item]],
    take: Callable[[Item], object],
    keeper: Keeper,
    held: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Call `take` for each of `items`, and let `keeper` count it. items: a batch as it came, and what `take` measures.

    held: a context in which no signal stops the process in the middle of a batch.
    Raises BatchError as `take` and the loader do, with the table of what was measured before.
    """
    try:
        for batch, item in items:
            with held():
                take(item)
                keeper.advance(batch)
    except BatchError as error:
        error.ranges = run.table() if run.batches else None
        raise
