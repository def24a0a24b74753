"""Bounds and the verdict on a report: what was set, what was seen, and whether it holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from typing import Any

from calibcast.calib.errors import CalibcastError, SettingError

# bound -> the column of the report that it limits, and what it is called in a verdict.
_COLUMNS = {
    "min_sqnr_db": ("sqnr_db", " dB"),
    "min_variation_db": ("variation_db", " dB of the variation"),
    "min_channel_db": ("worst_channel_db", " dB in the worst channel"),
    "min_channel_variation_db": ("worst_variation_db", " dB of the variation of the worst channel"),
    "max_rel_l2": ("rel_l2", " relative L2"),
    "min_cosine": ("cosine", " cosine"),
    "min_top1": ("top1", " top1"),
    "max_abs": ("max_abs", " absolute"),
    "min_equal": ("equal", " equal"),
}
# The least and the most that a bound may ask for. Below 0 dB an error is larger than what it is an error of.
_LEAST = {**dict.fromkeys(_COLUMNS, 0.0), "min_cosine": -1.0}
_MOST = {"min_cosine": 1.0, "min_top1": 1.0, "min_equal": 1.0}


@dataclass(frozen=True)
class Bounds:
    """What a user asks of a report. None: not asked.

    min_sqnr_db: of each output, its power to the error. min_variation_db: its variation to the error, each channel
    about its own mean. min_channel_db, min_channel_variation_db: the same two of the worst channel alone. max_rel_l2,
    min_cosine, max_abs: of each floating-point output. min_top1: share of rows whose largest element is the
    reference's. min_equal: share of equal elements of each integer or boolean output. min_metrics: of the user's own
    metrics.
    """

    min_sqnr_db: float | None = None
    max_rel_l2: float | None = None
    min_cosine: float | None = None
    min_top1: float | None = None
    max_abs: float | None = None
    min_metrics: Mapping[str, float] = field(default_factory=dict)
    min_variation_db: float | None = None
    min_channel_db: float | None = None
    min_channel_variation_db: float | None = None
    min_equal: float | None = None

    @classmethod
    def of(cls, bounds: Mapping[str, Any]) -> Bounds:
        """From names and numbers; None is no bound.

        Raises CalibcastError for an unknown name, SettingError for what is no number, or one that says nothing.
        """
        known = {entry.name for entry in fields(cls)}
        for name, value in bounds.items():
            if name not in known:
                raise CalibcastError(f"there is no bound {name!r}; known are {', '.join(sorted(known))}")
            if name == "min_metrics" and not isinstance(value, Mapping | None):
                raise SettingError(f"min_metrics: give {{name: least value}}, got {value!r}")
            given = {f"{name}.{n}": v for n, v in value.items()} if isinstance(value, Mapping) else {name: value}
            for one, number in given.items():
                if number is not None and (why := _why_no_bound(one, number)) is not None:
                    raise SettingError(f"{one}: {number!r} is no bound: {why}; give another, or leave it out")
        return cls(**{name: value for name, value in bounds.items() if value is not None})

    def set(self) -> dict[str, Any]:
        """The bounds that were set, by name."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}

    def and_also(self, others: Bounds) -> Bounds:
        """These bounds and `others`; where both set one, that of `others` counts."""
        metrics = {**self.min_metrics, **others.min_metrics}
        return Bounds(**{**self.set(), **others.set(), "min_metrics": metrics})


def _why_no_bound(name: str, number: Any) -> str | None:
    """Why a number says nothing as this bound; None where it does."""
    if isinstance(number, bool) or not isinstance(number, Real):
        return "it is no number"
    number = float(number)
    if not math.isfinite(number):
        return "it is not finite"
    if name in _LEAST and number < _LEAST[name]:
        return f"no engine is below {_LEAST[name]:g}" if name in _MOST else "it is negative"
    return f"no engine is above {_MOST[name]:g}" if name in _MOST and number > _MOST[name] else None


@dataclass(frozen=True)
class Seen:
    """What was seen for a bound: the worst value, where it was, and whether the bound holds."""

    name: str
    bound: float
    value: float
    place: str
    holds: bool

    @property
    def at_least(self) -> bool:
        return self.name.startswith("min_")

    def __str__(self) -> str:
        unit = _COLUMNS[self.name][1] if self.name in _COLUMNS else f" {self.name.removeprefix('min_metrics.')}"
        seen = f"{self.value:.1f}" if unit.startswith(" dB") else f"{self.value:.4g}"
        if self.holds:
            return f"{self.bound:g}{unit} with {seen}"
        sign = "<" if self.at_least else ">"
        value = "nothing to compare" if math.isnan(self.value) else f"{seen} {sign} {self.bound:g}{unit}"
        return f"{self.place}: {value}" if self.place else value

    @property
    def failure(self) -> str:
        """A sentence of a GateError."""
        column = _COLUMNS[self.name][0] if self.name in _COLUMNS else self.name.replace("min_metrics.", "metric ")
        words = f"{column} {self.value:.6g}, required at {'least' if self.at_least else 'most'} {self.bound:g}"
        return f"{self.place}: {words}" if self.place else words


@dataclass(frozen=True)
class Verdict:
    """Whether a report passes. problems: what makes it fail under any bounds. seen: every bound that was set. unheld:
    outputs that differ, and that no bound was set for."""

    problems: tuple[str, ...]
    seen: tuple[Seen, ...]
    unheld: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems and all(one.holds for one in self.seen)

    @property
    def failures(self) -> list[str]:
        """Everything that does not hold, with numbers."""
        return [*self.problems, *(one.failure for one in self.seen if not one.holds)]

    def __str__(self) -> str:
        if not self.passed:
            return "failed: " + "; ".join([*self.problems, *(str(one) for one in self.seen if not one.holds)])
        if not self.seen:
            return "no bounds were set"
        rest = f"; not judged: {', '.join(self.unheld)}" if self.unheld else ""
        return "passed " + ", ".join(map(str, self.seen)) + rest


def judged(
    bounds: Bounds, rows: Sequence[Mapping[str, Any]], floating: Iterable[str], metrics: Mapping[str, float],
    problems: Sequence[str],
) -> Verdict:  # fmt: skip
    """Judge the rows of a report, and its metrics, by bounds.

    A bound on outputs counts for floating-point ones, `min_equal` for the others. A bound that applies to no output
    does not hold: nothing was compared. Raises CalibcastError for a bound of a metric that was not given.
    """
    found = [*_of_outputs(bounds, rows, set(floating)), *_of_metrics(bounds.min_metrics, metrics)]
    return Verdict(tuple(problems), tuple(found), _unheld(bounds, rows, set(floating)))


def _unheld(bounds: Bounds, rows: Sequence[Mapping[str, Any]], floating: set[str]) -> tuple[str, ...]:
    """The outputs that differ, and that no bound on outputs of their kind was set for."""
    asked = {name == "min_equal" for name in _COLUMNS if getattr(bounds, name) is not None}
    found = []
    for row in rows:
        exact = row["output"] not in floating
        if exact not in asked and (row["equal"] != 1.0 if exact else row["max_abs"] != 0.0):
            seen = f"{100 * row['equal']:.4g}% equal, min_equal was not set" if exact else f"{row['sqnr_db']:.1f} dB"
            found.append(f"{row['output']} ({seen})")
    return tuple(found)


def _of_outputs(bounds: Bounds, rows: Sequence[Mapping[str, Any]], floating: set[str]) -> Iterator[Seen]:
    for name, (column, _) in _COLUMNS.items():
        bound = getattr(bounds, name)
        if bound is None:
            continue
        wanted = [row for row in rows if (row["output"] in floating) != (name == "min_equal")]
        held = [_held(name, bound, row, column) for row in wanted if row[column] is not None]
        failed = [one for one in held if not one.holds]
        if not held:
            yield Seen(name, bound, math.nan, "no output has one", False)
        elif failed:
            yield from failed
        else:
            yield min(held, key=lambda one: one.value if one.at_least else -one.value)


def _held(name: str, bound: float, row: Mapping[str, Any], column: str) -> Seen:
    seen = row[column]
    holds = bool(seen >= bound if name.startswith("min_") else seen <= bound)  # NaN never holds
    return Seen(name, bound, seen, row["output"], holds)


def _of_metrics(bounds: Mapping[str, float], metrics: Mapping[str, float]) -> Iterator[Seen]:
    for name, bound in bounds.items():
        if name not in metrics:
            raise CalibcastError(f"no metric {name!r} was given to verify; there are {sorted(metrics)}")
        yield Seen(f"min_metrics.{name}", bound, metrics[name], "", bool(metrics[name] >= bound))
