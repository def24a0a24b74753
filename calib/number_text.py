"""Numbers as people read them, in one style everywhere."""

from __future__ import annotations


def percent(share: float) -> str:
    """`99.5%`; never 0% of something, nor 100% of less than all; `-` where there is nothing to share."""
    if share != share:
        return "-"
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{100 * share:.1f}%"
