"""A range table in the form in which rules read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import polars as pl
from calibcast.calib.range_scaling import exponents_of
from calibcast.calib.ranges import RangeTable
from calibcast.passes.facts import TensorFacts

Evidence = Mapping[tuple[str, int], TensorFacts]

_COPIED = ("min", "max", "absmax", "smallest", "mean", "rms", "masked", "absmax_batch", "nonfinite_batch")
_DEFAULTS = {name.name: name.default for name in fields(TensorFacts)}


class Histogram(Sequence[int]):
    """The histogram of one tensor, read from the table when it is first used: few rules need it, and for few
    tensors.
    """

    __slots__ = ("_column", "_counts", "_row")

    def __init__(self, column: pl.Series, row: int) -> None:
        self._column, self._row = column, row
        self._counts: tuple[int, ...] | None = None

    def _read(self) -> tuple[int, ...]:
        if self._counts is None:
            self._counts = tuple(self._column[self._row].to_list())
        return self._counts

    def __getitem__(self, index: Any) -> Any:
        return self._read()[index]

    def __len__(self) -> int:
        return len(self._read())

    def __iter__(self) -> Iterator[int]:
        return iter(self._read())

    def __eq__(self, other: object) -> bool:
        return self._read() == (other._read() if isinstance(other, Histogram) else other)

    def __hash__(self) -> int:
        return hash(self._read())

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (self._read(),)  # a copy does not need the table


def evidence_of(ranges: RangeTable | None) -> Evidence:
    """The rows of a table as facts, by (node, output)."""
    if ranges is None:
        return {}
    frame, hidden = ranges.frame, ranges.hidden
    lowest = {(node, output): least for node, output, least in hidden.select("node", "output", "mask_min").iter_rows()}
    nonfinite, known = pl.sum_horizontal("nan", "posinf", "neginf"), pl.col("histogram").is_not_null()
    columns = frame.select(
        "node", "output", "batches", "kind", nonfinite.alias("nonfinite"), known.alias("known"), *_COPIED
    )
    histograms, k = frame["histogram"], exponents_of(ranges)
    found: dict[tuple[str, int], TensorFacts] = {}
    for row, (node, output, batches, kind, lost, counted, *copied) in enumerate(columns.iter_rows()):
        if batches:
            found[node, output] = with_values(
                _DEFAULTS, name=node, kind=kind, nonfinite=lost, mask_min=lowest.get((node, output)),
                histogram=Histogram(histograms, row) if counted else None, exponent=k[row],
                **dict(zip(_COPIED, copied, strict=True)),
            )  # fmt: skip
    return found


def with_values(facts: Mapping[str, Any], **changes: Any) -> TensorFacts:
    """Like `dataclasses.replace`, but faster: that takes longer than a decision."""
    made = object.__new__(TensorFacts)
    made.__dict__.update(facts)
    made.__dict__.update(changes)
    return made


@dataclass(frozen=True)
class HiddenEvidence:
    """What calibration measured inside nodes, by name: the largest sum, and the least spread; None for not measured."""

    largest: Mapping[str, float | None] = field(default_factory=dict)
    least: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, ranges: RangeTable | None) -> HiddenEvidence:
        """The hidden rows of a table."""
        if ranges is None:
            return cls()
        rows = ranges.hidden.filter(pl.col("output") == 0).select("node", "hidden_max", "hidden_min").rows()
        return cls({node: largest for node, largest, _ in rows}, {node: least for node, _, least in rows})
