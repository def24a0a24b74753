"""Batches as the model's inputs: loaded, transformed and matched to its signature, or the error that prevented it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from calibcast.calib.batches import Signature
from calibcast.calib.errors import BatchError
from calibcast.calib.sequences import FlatInputs, NewSequence, unwrapped
from calibcast.engines.job.progress import Progress
from calibcast.engines.job.settings import Limits
from calibcast.engines.job.sources import Loaded
from calibcast.engines.job.trust import DataReport, check_share, refuse_nonfinite


@dataclass(frozen=True)
class Item:
    """Batch `number`: as loaded, as the model's inputs, and as flat inputs; or the error that occurred on the way."""

    number: int
    batch: Any = None
    inputs: Any = None
    flat: FlatInputs = field(default_factory=FlatInputs)
    error: str | None = None


def feed(loaded: Iterable[Loaded], transform: Callable[[Any], Any], signature: Signature) -> Iterator[Item]:
    """Put each loaded batch through `transform`, and match it to the program's signature."""
    for item in loaded:
        if item.error is not None:
            yield Item(item.number, error=f"loading raised {type(item.error).__name__}: {_first_line(item.error)}")
            continue
        try:
            begins, batch = unwrapped(item.batch)
            begins_too, inputs = unwrapped(transform(batch))
        except BatchError as error:
            yield Item(item.number, item.batch, error=str(error))
            continue
        except Exception as error:
            text = f"transform raised {type(error).__name__}: {_first_line(error)}"
            yield Item(item.number, item.batch, error=text)
            continue
        try:
            flat = FlatInputs(signature.flatten(inputs, item.number), begins or begins_too)
            yield Item(item.number, item.batch, inputs, flat)
        except BatchError as error:
            yield Item(item.number, item.batch, error=str(error))


class Feeding:
    """Held-out batches for `verify`: the usable ones, with the inputs that were already made of them."""

    def __init__(
        self, items: Iterator[Item], signature: Signature, limits: Limits, progress: Progress, total: int | None
    ) -> None:
        self._items, self._signature, self._limits = items, signature, limits
        self._progress, self._total = progress, total
        self._current: Item | None = None
        self.report = DataReport()

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self._items:
                if self._usable(item):
                    self._current = item
                    yield item.batch
                self._progress.advance()
        finally:
            self._progress.close()

    def _usable(self, item: Item) -> bool:
        if item.error is not None:
            self.report.note_raised(item.number, item.error, looked_at=False)
            check_share(self.report, self._limits, self._total)
            return False
        nonfinite = self.report.look(item.number, self._signature, item.flat)
        if not nonfinite:
            return True
        if self._limits.on_nonfinite_inputs == "stop":
            refuse_nonfinite(f"held-out batch {item.number}", nonfinite)
        return self._limits.on_nonfinite_inputs == "warn"

    def inputs(self, _: Any) -> Any:
        """The inputs of the batch that was yielded last. `verify` uses this as its `transform`."""
        assert self._current is not None
        inputs = self._current.inputs
        return NewSequence(inputs) if self._current.flat.begins else inputs


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
