"""Batches in sequence, for a program that keeps state between calls, such as a decoder with its cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NewSequence:
    """A batch at which a new sequence begins. With `carry_state=True`, what the program keeps between calls is reset to
    its initial value before the batch is run. A dataloader or a transform yields this in place of the batch."""

    batch: Any


class FlatInputs(list[Any]):
    """Flat inputs of a program. begins: whether a new sequence begins here."""

    def __init__(self, values: Iterable[Any] = (), begins: bool = False) -> None:
        super().__init__(values)
        self.begins = begins


def begins_anew(flat: Sequence[Any]) -> bool:
    """Whether a new sequence begins at these inputs; a plain list goes on."""
    return isinstance(flat, FlatInputs) and flat.begins


def unwrapped(batch: Any) -> tuple[bool, Any]:
    """Whether a new sequence begins at a batch, and the batch itself."""
    return (True, batch.batch) if isinstance(batch, NewSequence) else (False, batch)
