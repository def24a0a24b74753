"""Numbers as people read them, in one style everywhere."""

from __future__ import annotations


def percent(share: float) -> str:
    """A share as text: `99.5%`. Only nothing is 0%, and only all is 100%; NaN, a share of nothing, is `-`."""
    if share != share:
        return "-"
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{100 * share:.1f}%"
