"""Decide and rewrite: ranges to a precision plan to a graph with casts."""

from typing import TYPE_CHECKING

from calib.lazy_names import lazy_names

if TYPE_CHECKING:
    from passes.alternatives import what_if
    from passes.cast_insertion import insert_casts
    from passes.classification import classify
    from passes.comparison import Comparison, compare
    from passes.facts import Cancelled, Hidden, Literal, NodeFacts, TensorFacts
    from passes.plan import Decision, PrecisionPlan
    from passes.tensor_rules import Rule, Verdict

__all__ = [
    "Cancelled",
    "Comparison",
    "Decision",
    "Hidden",
    "Literal",
    "NodeFacts",
    "PrecisionPlan",
    "Rule",
    "TensorFacts",
    "Verdict",
    "classify",
    "compare",
    "insert_casts",
    "what_if",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("Cancelled", "Hidden", "Literal", "NodeFacts", "TensorFacts"), "passes.facts"),
        **dict.fromkeys(("Decision", "PrecisionPlan"), "passes.plan"),
        **dict.fromkeys(("Rule", "Verdict"), "passes.tensor_rules"),
        **dict.fromkeys(("Comparison", "compare"), "passes.comparison"),
        "classify": "passes.classification",
        "insert_casts": "passes.cast_insertion",
        "what_if": "passes.alternatives",
    },
)
