"""Evidence of rounding for a program whose tensors are stored times powers of two.

The noise-to-signal ratio does not depend on the scale as long as the low type holds all values in full: then it is
carried over unchanged. Elsewhere it is estimated from what was measured, and marked "scaled":

- Where float16 gave finite results: its noise times the ratio of its squared rounding error at the new scale to that at
  the old one, by the histogram. This estimate is never below what was measured.
- Where it overflowed or vanished: from bfloat16, which has the range of fp32 and so was measured at any scale. It
  rounds 2^3 times as coarsely, so float16's noise is a 64th of its noise wherever float16 holds the values in full.
  Where rounding changed steps, or the program had to be run, noise is proportional to the number of changes: an 8th.
- At a pole, such as a division's, small values count most: there the ratio is that of the smallest value.

To measure it, use `tune` or calibrate the rescaled program. What cannot be estimated is a gap; there the rules that
judge by magnitude decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import polars as pl
from calibcast.calib.operators import operator_of
from calibcast.calib.range_schema import RangeData, Rescaled
from calibcast.calib.rounding_table import LITERAL, ROUNDING_KEY, ROUNDING_SCHEMA, SCALED

Key = tuple[str, str, int]  # reader, maker, output
_FINE, _COARSE = "float16", "bfloat16"
# Bits of the mantissa, the smallest normal and the largest value.
_TYPES = {_FINE: (10, 2.0**-14, 65504.0), _COARSE: (7, 2.0**-126, 3.3895313892515355e38)}
_MOST = 65504.0
_LOST = 2.0**-25  # half of the smallest value of float16: what is below becomes 0
_MEASURED = (
    "noise", "noise_worst", "worst_batch", "noise_by_output", "nonfinite", "steps", "local_sqnr_db", "method",
)  # fmt: skip
_WHY = "rescaled, and neither type was measured where this one holds the values: calibrate the rescaled program"


@dataclass(frozen=True)
class NumberScale:
    """A number in a call: its value before, and its exponent."""

    value: float
    exponent: int


def scaled_rounding(
    table: RangeData, record: Rescaled, numbers: Mapping[tuple[str, str], NumberScale], edges: Iterable[Key]
) -> pl.DataFrame:
    """`rounding` of the rescaled program: one row per edge and low type, in the order of `edges`."""
    if not table.rounding.height:
        return table.rounding
    source, keys = _Source(table, record, numbers), list(edges)
    behind: dict[str, list[Key]] = {}
    for key in keys:
        behind.setdefault(key[1], []).append(key)
    rows = []
    for key in keys:
        for low in _TYPES:
            found = source.multiplication(key, low, behind) if key[0] in record.added else source.edge(key, low)
            rows.append({**dict(zip(ROUNDING_KEY, (*key, low), strict=True)), **found})
    return pl.DataFrame(rows, schema=ROUNDING_SCHEMA)


class _Source:
    """The evidence of the original program, and how its tensors are stored now."""

    def __init__(self, table: RangeData, record: Rescaled, numbers: Mapping[tuple[str, str], NumberScale]) -> None:
        self._record, self._numbers, self._frame = record, numbers, table.frame
        names = [name for name in ROUNDING_SCHEMA if name not in ROUNDING_KEY]
        places, values = table.rounding.select(ROUNDING_KEY).iter_rows(), table.rounding.select(names).iter_rows()
        self._rows = {place: dict(zip(names, row, strict=True)) for place, row in zip(places, values, strict=True)}
        ops = dict(table.frame.select("node", "op").iter_rows())
        self._at_pole = {n: bool(operator_of(_base(op)).poles) for n, op in ops.items()}
        by_output = table.rounding["noise_by_output"].drop_nulls()
        apart = {"noise_by_output": None if by_output.is_empty() else [0.0] * len(by_output[0])}
        self._nothing = {**_NOTHING, **apart, "batches": int(table.rounding["batches"].max() or 0)}  # type: ignore[arg-type]

    @cached_property
    def _tensors(self) -> dict[tuple[str, int], Spread]:
        columns = self._frame.select("node", "output", "absmax", "smallest", "histogram").iter_rows()
        return {(n, o): Spread(most or 0.0, least or 0.0, bins) for n, o, most, least, bins in columns}

    def edge(self, key: Key, low: str, k: int | None = None) -> dict[str, Any]:
        """Evidence of an edge; `k`: the exponent of its tensor, where it is not the tensor's own."""
        node, maker, output = key
        if maker.startswith(LITERAL):
            return self._literal(key, low)
        original = self._record.added.get(maker, maker)
        exponent = self._record.exponents.get(f"{maker}:{output}", 0) if k is None else k
        own, other = (self._rows.get((node, original, output, kind)) for kind in (low, _COARSE))
        spread = self._tensors.get((original, output))
        if own is None:
            return _missing(_WHY)
        if low == _COARSE or spread is None or exponent == 0 or spread.whole(exponent):
            return own
        if spread.most * 2.0**-exponent > _MOST:
            return _missing("rescaled, and it overflows there")
        return self._estimated(own, other, spread, exponent, self._at_pole.get(node, False))

    def _estimated(
        self, own: dict[str, Any], other: dict[str, Any] | None, spread: Spread, k: int, pole: bool
    ) -> dict[str, Any]:
        now = spread.rounding(_FINE, k, pole)
        found = []
        if _finite(own) and spread.most <= _MOST:
            found.append(_times(own, max(1.0, _ratio(now, spread.rounding(_FINE, 0, pole)))))
        if other is not None and _finite(other):
            found.append(_times(other, _ratio(now, spread.rounding(_COARSE, 0, pole))))
        found = [row for row in found if math.isfinite(row["noise"])]
        return min(found, key=lambda row: row["noise_worst"]) if found else _missing(_WHY)

    def _literal(self, key: Key, low: str) -> dict[str, Any]:
        """The rounding error of a number is known, before and after: noise is proportional to its square."""
        node, maker, _ = key
        number = self._numbers.get((node, maker.removeprefix(LITERAL)))
        own, other = (self._rows.get((*key, kind)) for kind in (low, _COARSE))
        if number is None:
            return own or self._nothing  # the number of an added multiplication is a power of two
        now, before = (_number_error(number.value * 2.0**-k, low) for k in (number.exponent, 0))
        if now == 0.0:
            return self._nothing
        if own is not None and _finite(own) and before:
            return own if now == before else _times(own, (now / before) ** 2)
        coarse = _number_error(number.value, _COARSE)
        if other is not None and _finite(other) and coarse and math.isfinite(now):
            return _times(other, (now / coarse) ** 2)
        return _missing(_WHY)

    def multiplication(self, key: Key, low: str, behind: Mapping[str, list[Key]]) -> dict[str, Any]:
        """The edge into an added multiplication: the sum of what its readers would see if that tensor were rounded."""
        node, maker, output = key
        if maker.startswith(LITERAL):
            return self._nothing
        k = self._record.exponents.get(f"{maker}:{output}", 0)
        rows = [self.edge((reader, maker, output), low, k) for reader, _, _ in behind.get(node, ())]
        gap = next((row for row in rows if row["noise"] is None), None)
        return (gap or _sum(rows)) if rows else self._nothing


@dataclass(frozen=True)
class Spread:
    """The magnitudes of a tensor, at their true values: largest, smallest, and counts by exponent, where kept."""

    most: float
    least: float
    bins: list[int] | None

    def whole(self, k: int) -> bool:
        """Whether float16 holds all values in full, as they are and as 2^-k of themselves."""
        _, tiny, largest = _TYPES[_FINE]
        scale = 2.0**-k
        return self.most == 0.0 or (max(1.0, scale) * self.most <= largest and min(1.0, scale) * self.least >= tiny)

    def rounding(self, low: str, k: int, pole: bool) -> float:
        """Squared error of rounding 2^-k of the tensor, at its true scale: summed over all elements, or, at a pole or
        without a histogram, that of the smallest relative to its square; inf where the smallest vanishes."""
        if self.most == 0.0:
            return 0.0
        if pole or self.bins is None:
            bits, tiny, _ = _TYPES[low]
            if self.least * 2.0**-k < _LOST and low == _FINE:
                return math.inf
            return (max(1.0, tiny / (self.least * 2.0**-k)) * 2.0**-bits) ** 2
        return float(np.dot(self.bins, _noise(low, k)))


@cache
def _noise(low: str, k: int) -> np.ndarray[Any, Any]:
    """Squared rounding error of an element in each bin of a histogram, with that element at its true size."""
    bits, tiny, _ = _TYPES[low]
    least = np.exp2(np.arange(256) - 127.0)
    step = np.maximum(least, tiny * 2.0**k) * 2.0**-bits
    # A value far below a step is lost entirely.
    found: np.ndarray[Any, Any] = np.minimum(step * step / 12, 4 * least * least)
    found[0] = found[255] = 0.0  # zeros, and what is not finite
    return found


def _ratio(now: float, before: float) -> float:
    return now / before if before else (math.inf if now else 1.0)


def _finite(row: Mapping[str, Any]) -> bool:
    return row["noise"] is not None and math.isfinite(row["noise"]) and not row["nonfinite"]


def _times(row: dict[str, Any], factor: float) -> dict[str, Any]:
    """The row of an edge, with `factor` times the power of its rounding error."""
    if factor < 1.0 and (row["steps"] or row["method"] == "run"):
        factor = math.sqrt(factor)
    by_output = row["noise_by_output"]
    local = row["local_sqnr_db"]
    return {
        **row,
        "noise": row["noise"] * factor,
        "noise_worst": row["noise_worst"] * factor,
        "noise_by_output": None if by_output is None else [noise * factor for noise in by_output],
        "local_sqnr_db": local - 10 * math.log10(factor) if 0 < factor < math.inf else local,
        "method": SCALED,
    }


def _sum(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row from those of several readers, whose noise adds up."""
    worst = max(rows, key=lambda row: row["noise_worst"])
    by_output = [row["noise_by_output"] for row in rows]
    return {
        **worst,
        **{name: sum(row[name] for row in rows) for name in ("noise", "noise_worst", "nonfinite", "steps")},
        "noise_by_output": None if None in by_output else [sum(several) for several in zip(*by_output, strict=True)],
        "local_sqnr_db": min(row["local_sqnr_db"] for row in rows),
        "method": SCALED,
    }


def _missing(why: str) -> dict[str, Any]:
    return {**dict.fromkeys(_MEASURED), "batches": 0, "why_missing": why}


# The evidence for a value that the low type holds exactly.
_NOTHING: dict[str, Any] = {
    "noise": 0.0, "noise_worst": 0.0, "worst_batch": 0, "noise_by_output": None, "nonfinite": 0, "steps": 0,
    "local_sqnr_db": math.inf, "batches": 1, "method": SCALED, "why_missing": None,
}  # fmt: skip


def _number_error(value: float, low: str) -> float:
    """The error of rounding a number, as a share of itself; inf where it overflows."""
    if value == 0.0 or not math.isfinite(value):
        return 0.0
    if abs(value) > _TYPES[low][2]:
        return math.inf
    bits, tiny, _ = _TYPES[low]
    single = float(np.float32(value))
    step = max(2.0 ** math.floor(math.log2(abs(single))), tiny) * 2.0**-bits
    return abs(round(single / step) * step - single) / abs(single)


def _base(op: str) -> str:
    parts = op.split(".")
    return parts[1].rstrip("_") if len(parts) > 1 else op
