"""What an engine met in service that its calibration did not. Pure functions: from numbers to findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from calibcast.engines.monitoring.ends import End

# A peak within this factor of the low type's limit is reported before it overflows: one more doubling, one more bin.
_NEAR = 2.0
# Data whose peak is this many times smaller than the calibration's are other data (another unit, a lost scale): four
# bins of the histogram. A single quiet call proves nothing, so it takes a few.
_FAINT, _FAINT_CALLS = 16.0, 8
_NONFINITE = ("nan", "posinf", "neginf")
_SHOWN = {"nan": "NaN", "posinf": "Inf", "neginf": "-Inf"}


@dataclass(frozen=True)
class Seen:
    """What was seen at one end so far. least, most: of its finite values; inf and -inf where there was none."""

    least: float
    most: float
    nan: int = 0
    posinf: int = 0
    neginf: int = 0

    @property
    def peak(self) -> float:
        """Largest finite magnitude; -inf where nothing was finite."""
        return max(self.most, -self.least)


@dataclass(frozen=True)
class Finding:
    """One cause at one input or output.

    cause: `nonfinite` (NaN or Inf where calibration had none), `overflow` (an output is NaN or Inf, and all inputs were
    finite), `near_limit` (within a factor of two of what the low type holds, or beyond), `outside` (beyond the
    calibrated range), `faint` (the peak of several calls is a sixteenth of the calibrated one, or less). call: the
    number of about the call at which it was seen. text: a sentence with the numbers, and what to do.
    """

    cause: str
    name: str
    call: int
    text: str

    def __str__(self) -> str:
        return self.text


def findings_of(ends: Sequence[End], seen: Sequence[Seen], watched: int, tolerance: float, call: int) -> list[Finding]:
    """What the watched calls so far have shown, at each end in order."""
    # Integer inputs are no ends, and always finite.
    finite_inputs = not any(s.nan or s.posinf or s.neginf for end, s in zip(ends, seen, strict=True) if end.is_input)
    found: list[Finding] = []
    for end, s in zip(ends, seen, strict=True):
        for cause, text in _causes(end, s, watched, tolerance, finite_inputs):
            found.append(Finding(cause, end.what, call, f"{end.what} {text}"))
    return found


def _causes(end: End, s: Seen, watched: int, tolerance: float, finite_inputs: bool) -> Iterator[tuple[str, str]]:
    row = end.calibrated or {}
    new = [kind for kind in _NONFINITE if getattr(s, kind) and not row.get(kind)]
    if new:
        counts = ", ".join(f"{getattr(s, kind)} {_SHOWN[kind]}" for kind in new)
        where = f" ({end.low_type})" if end.limit is not None else ""
        if end.is_input or not finite_inputs:
            yield "nonfinite", f"had {counts}; calibration saw none. Look at what feeds the engine."
        else:
            text = f"had {counts} though all inputs were finite{where}: an overflow begins"
            yield "overflow", f"{text}. Calibrate with data like these."
    if s.peak < 0:  # nothing was finite
        return
    was = row.get("absmax")
    if end.limit is not None and s.peak * _NEAR > end.limit:
        over = s.peak > end.limit
        # Calibration came as near, or as far beyond: the plan was made with that in mind.
        known = was is not None and was * (1 if over else _NEAR) > end.limit
        text = f"reached {s.peak:.4g}, and {end.low_type} holds {end.limit:.5g}"
        if not known:
            when = "overflows" if over else "is about to overflow"
            yield "near_limit", f"{text}: it {when}. Calibrate with data like these."
    if was is None:
        return
    low, high = row["min"], row["max"]
    if s.least < low - tolerance * was or s.most > high + tolerance * was:
        yield (
            "outside",
            f"reached {s.least:.4g} to {s.most:.4g}; calibration saw {low:.4g} to {high:.4g}. "
            "The plan was not proven on such data: calibrate with data like these.",
        )
    if was > 0 and watched >= _FAINT_CALLS and s.peak * _FAINT <= was:
        yield (
            "faint",
            f"peaked at {s.peak:.4g} in {watched} watched calls; calibration saw {was:.4g}. "
            "Has its unit or scale changed? Small values lose precision in the low type.",
        )
