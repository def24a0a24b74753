"""What ATen operators do, in one table. Every other file looks operators up here, and names none itself.

This package does not import torch, which takes seconds. `operator_of("add")` is an entry; the sets below are the most
used selections. The entries are in one file for each kind: movement, arithmetic, functions, sums, unsupported.
"""

from __future__ import annotations

from calibcast.calib.operators import operator as terms
from calibcast.calib.operators.arithmetic import ARITHMETIC
from calibcast.calib.operators.functions import FUNCTIONS
from calibcast.calib.operators.movement import MOVEMENT
from calibcast.calib.operators.operator import Operator, Pole, Training
from calibcast.calib.operators.sums import PRODUCTS, REDUCTIONS
from calibcast.calib.operators.unsupported import NEVER, NEVER_LOW_PREFIXES

OPERATORS = (*MOVEMENT, *ARITHMETIC, *FUNCTIONS, *REDUCTIONS, *PRODUCTS, *NEVER)
_BY_NAME = {name: entry for entry in OPERATORS for name in (entry.name, *entry.aliases)}


def operator_of(name: str) -> Operator:
    """The entry of an operator, named without overload and in-place mark; an empty entry if the table has none."""
    return _BY_NAME.get(name) or Operator(name, never_low=name.startswith(NEVER_LOW_PREFIXES))


def is_known(name: str) -> bool:
    """Whether the table has an entry for an operator, or for all operators with its prefix."""
    return name in _BY_NAME or name.startswith(NEVER_LOW_PREFIXES)


def canonical(name: str) -> str:
    """`div` for `divide`: the name under which the table has an operator; `name` itself where it has none."""
    found = _BY_NAME.get(name)
    return name if found is None else found.name


def _all(field: str, *values: object) -> frozenset[str]:
    """The names of the operators whose `field` is one of `values`; without values, those whose `field` is set."""
    return frozenset(e.name for e in OPERATORS if (getattr(e, field) in values if values else e.says(field)))


MOVES = _all("moves")
CONVERTS = _all("converts")
ASSERTS = _all("asserts")

SUMS = _all("hides", terms.SUM)
SQUARES = _all("hides", terms.SQUARES)
EXPONENTIALS = _all("hides", terms.EXPONENTIALS)
ATTENTION = _all("product", terms.ATTENTION)
CONVOLUTIONS = _all("product", terms.CONVOLUTION)
TRANSPOSED = _all("product", terms.TRANSPOSED)
PRODUCTS_OF_MATRICES = _all("product", terms.MATRIX)
RECURRENT = _all("product", terms.RECURRENT)
WORKS = _all("product")

READS_MASKS = _all("mask_at")
MASKING = _all("masks")
MASK_CHOICE = _all("masks", terms.CHOOSES)
MASK_ARITHMETIC = _all("masks", terms.COMPUTES)
SELECTS = _all("selects")
COMPARES = _all("compares")
FILLS = _all("fills")
CHECKS_NUMBERS = _all("checks_numbers")

KEEPS_POLES = MOVES | _all("keeps_poles")
KEEPS_ROUNDED = MOVES | _all("keeps_rounded")
STEPS = _all("steps")
HANDS_ON = MOVES | _all("hands_on")
ADDS = _all("adds")
TAKES_OFFSET = _all("takes_offset")

EMPTIES = _all("empties")
OVERWRITES = _all("overwrites")

__all__ = [
    "ADDS",
    "ASSERTS",
    "ATTENTION",
    "CHECKS_NUMBERS",
    "COMPARES",
    "CONVERTS",
    "CONVOLUTIONS",
    "EMPTIES",
    "EXPONENTIALS",
    "FILLS",
    "HANDS_ON",
    "KEEPS_POLES",
    "KEEPS_ROUNDED",
    "MASKING",
    "MASK_ARITHMETIC",
    "MASK_CHOICE",
    "MOVES",
    "OPERATORS",
    "OVERWRITES",
    "PRODUCTS_OF_MATRICES",
    "READS_MASKS",
    "RECURRENT",
    "SELECTS",
    "SQUARES",
    "STEPS",
    "SUMS",
    "TAKES_OFFSET",
    "TRANSPOSED",
    "WORKS",
    "Operator",
    "Pole",
    "Training",
    "canonical",
    "is_known",
    "operator_of",
]
