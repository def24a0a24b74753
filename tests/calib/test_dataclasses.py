"""What data classes promise: to stay as they are, to be compared by fields or not, to have slots where many are made.

Each was changed once without any test noticing.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator

import calibcast.calib
import calibcast.passes

# Filled while something runs.
CHANGING = {
    "Call", "Found", "Layout", "Made", "MeasuredGroup", "RoundingStatistics", "Run", "System", "Tally",
    "_Filling", "_Seen", "_Tuning",
}  # fmt: skip
# Two of these with the same contents are not the same thing, or are compared by rules of their own.
NOT_BY_FIELDS = {
    "Call", "Comparison", "Made", "MeasuredGroup", "RangeData", "RangeDiff", "RoundingRecord", "RoundingStatistics",
}  # fmt: skip
SLOTTED = {
    "Call", "CallSite", "Candidate", "Cast", "CastSites", "MeasuredEdge", "NodeOutline", "Number", "Operand",
    "Operator", "Pole", "Step", "Tally", "Tensor", "Term", "Training",
}  # fmt: skip
# Graphs, tables and caches, which would fill a terminal.
NOT_SHOWN = """
Batch.flat Batch.results Course.edges Course.follows Course.steps Course.steps_of Course.thresholds FactReader._known
FactReader.evidence FactReader.kinds FactReader.refused FactReader.rounding Judge.rounding Judge.settings
Measures.histograms Measures.program NodeOutline.values NodeTypes.outputs Outcome.bad Outcome.plan PrecisionPlan.budgets
PrecisionPlan.digests PrecisionPlan.exponents PrecisionPlan.flips ProgramFacts.leading ProgramFacts.nodes
ProgramFacts.outlines ProgramFacts.readers ProgramFacts.rounding ProgramFacts.sizes ProgramFacts.ties
Rescaling.exponents Rescaling.program Rescaling.ranges Rescaling.rewrite RoundingEvidence.edges RoundingPlan.nodes
RoundingPlan.peaks Solutions.forms Solutions.system System.solutions TensorFacts.histogram WeightReaders.program
"""
NEED_GPU = ("triton_",)


def classes() -> Iterator[type]:
    for package in (calibcast.calib, calibcast.passes):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.rsplit(".", 1)[1].startswith(NEED_GPU):
                continue
            for found in vars(importlib.import_module(module.name)).values():
                if isinstance(found, type) and found.__module__ == module.name and dataclasses.is_dataclass(found):
                    yield found


def test_data_classes_keep_their_promises() -> None:
    every = list(classes())
    assert len(every) > 100
    assert {c.__name__ for c in every if not c.__dataclass_params__.frozen} == CHANGING
    assert {c.__name__ for c in every if not c.__dataclass_params__.eq} == NOT_BY_FIELDS
    assert {c.__name__ for c in every if "__slots__" in vars(c)} == SLOTTED


def test_what_is_large_is_not_printed() -> None:
    found = {f"{c.__name__}.{f.name}" for c in classes() for f in dataclasses.fields(c) if not f.repr}
    assert set(NOT_SHOWN.split()) - found == set()
