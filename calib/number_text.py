"""Numbers as people read them, in one style everywhere."""

from __future__ import annotations


def counted(count: int, noun: str, several: str | None = None) -> str:
    """`1 batch`, `2 batches`: a number and what it counts. several: of irregular nouns, the plural."""
    plural = several or (f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s")
    return f"{count} {noun if count == 1 else plural}"


def size(count: int) -> str:
    """A number of bytes as text: `12.3 MB`."""
    number, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"


def percent(share: float) -> str:
    """A share as text: `99.5%`. Only nothing is 0%, and only all is 100%; NaN, a share of nothing, is `-`."""
    if share != share:
        return "-"
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{100 * share:.1f}%"
