"""What a rule is and what it answers, and the three ways in which a node is decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from calibcast.passes.facts import NodeFacts

LOW, HIGH, KEPT = "low", "high", "kept"


@dataclass(frozen=True)
class Verdict:
    """Why a node stays high: the rule's id, a sentence, the number that was seen, and its limit."""

    rule: str
    reason: str
    evidence: float | None = None
    limit: float | None = None


Rule = Callable[[NodeFacts], Verdict | None]
