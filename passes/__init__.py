"""Decide and rewrite: ranges to a precision plan to a graph with casts."""

from typing import TYPE_CHECKING

from calibcast.calib.lazy_names import lazy_names

if TYPE_CHECKING:
    from calibcast.passes.alternatives import what_if
    from calibcast.passes.cast_insertion import insert_casts
    from calibcast.passes.classification import classify
    from calibcast.passes.comparison import compare
    from calibcast.passes.comparison_result import Comparison
    from calibcast.passes.emulation import emulate
    from calibcast.passes.facts import Hidden, Literal, Lost, NodeFacts, TensorFacts
    from calibcast.passes.plan import Decision, PrecisionPlan
    from calibcast.passes.proof import Proof, RoundingSummary
    from calibcast.passes.rescaling.rescaling import rescale
    from calibcast.passes.rescaling.result import Rescaling
    from calibcast.passes.tuning import tune
    from calibcast.passes.verdict import Rule, Verdict

__all__ = [
    "Comparison",
    "Decision",
    "Hidden",
    "Literal",
    "Lost",
    "NodeFacts",
    "PrecisionPlan",
    "Proof",
    "Rescaling",
    "RoundingSummary",
    "Rule",
    "TensorFacts",
    "Verdict",
    "classify",
    "compare",
    "emulate",
    "insert_casts",
    "rescale",
    "tune",
    "what_if",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("Hidden", "Literal", "Lost", "NodeFacts", "TensorFacts"), "calibcast.passes.facts"),
        **dict.fromkeys(("Decision", "PrecisionPlan"), "calibcast.passes.plan"),
        **dict.fromkeys(("Proof", "RoundingSummary"), "calibcast.passes.proof"),
        **dict.fromkeys(("Rule", "Verdict"), "calibcast.passes.verdict"),
        "compare": "calibcast.passes.comparison",
        "Comparison": "calibcast.passes.comparison_result",
        "classify": "calibcast.passes.classification",
        "emulate": "calibcast.passes.emulation",
        "insert_casts": "calibcast.passes.cast_insertion",
        "rescale": "calibcast.passes.rescaling.rescaling",
        "Rescaling": "calibcast.passes.rescaling.result",
        "tune": "calibcast.passes.tuning",
        "what_if": "calibcast.passes.alternatives",
    },
)
