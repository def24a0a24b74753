"""Makes the facts that rules are called with, from outlines and evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from calibcast.passes.evidence import Evidence, with_values
from calibcast.passes.facts import Lost, NodeFacts, TensorFacts
from calibcast.passes.number_formats import NumberFormat, format_of
from calibcast.passes.outlines import NodeOutline
from calibcast.passes.rounding_evidence import RoundingEvidence


@dataclass(frozen=True)
class FactReader:
    """Makes `NodeFacts` from outlines, for one low type. kinds: of placeholders, by name; a table may lack them.

    magnified, offset_free: tensors and nodes that `passes.sensitivity` found; lost: what `passes.needs` found.
    rounding: the evidence of rounding to that type, if it was measured. refused: by name, why a node cannot run in that
    type.
    """

    evidence: Evidence = field(repr=False)
    kinds: Mapping[str, str] = field(repr=False)
    low_type: torch.dtype
    magnified: frozenset[tuple[str, int]] = frozenset()
    offset_free: frozenset[str] = frozenset()
    lost: Mapping[str, Lost] = field(default_factory=dict)
    rounding: RoundingEvidence | None = field(default=None, repr=False)
    refused: Callable[[str], str | None] = field(default=lambda name: None, repr=False, compare=False)
    _known: dict[tuple[str, int, str | None], TensorFacts] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _low(self) -> NumberFormat:
        return format_of(self.low_type)

    def read(self, outline: NodeOutline, precisions: Mapping[str, str]) -> NodeFacts:
        """The facts of a node, given how the nodes before it were decided."""
        decided, look_up = precisions.get, self._look_up
        facts = object.__new__(NodeFacts)  # keywords are slow on large graphs; the result is frozen, too
        facts.__dict__.update(
            outline.values,
            inputs=tuple([look_up((name, output, decided(maker))) for name, output, maker in outline.inputs]),
            outputs=tuple([look_up((name, output, None)) for name, output, _ in outline.outputs]),
            low_type=self.low_type,
            low=self._low,
            rounding_known=self.rounding is not None and self.rounding.knows(outline.name),
            lost=self.lost.get(outline.name),
            refused=self.refused(outline.name),
        )
        return facts

    def _look_up(self, key: tuple[str, int, str | None]) -> TensorFacts:
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._placed(*key)
        return found

    def _placed(self, name: str, output: int, precision: str | None) -> TensorFacts:
        found = self.evidence.get((name, output))
        if found is None:
            kind = self.kinds.get(name, "activation")
            return TensorFacts(name, kind, measured=False, precision=precision)
        magnified, counts = (name, output) in self.magnified, name not in self.offset_free
        if precision is None and counts and not magnified:
            return found
        return with_values(vars(found), precision=precision, magnified=magnified, offset_counts=counts)
