"""Decide and rewrite: ranges to a precision plan to a graph with casts."""

from passes.alternatives import what_if
from passes.cast_insertion import insert_casts
from passes.classification import classify
from passes.comparison import Comparison, compare
from passes.facts import Hidden, Literal, NodeFacts, TensorFacts
from passes.plan import Decision, PrecisionPlan
from passes.rules import Rule, Verdict

__all__ = [
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
