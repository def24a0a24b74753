"""A program and its ranges as deciding sees them: read once for all settings, low types and rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from calibcast.calib.graph import input_kinds
from calibcast.calib.ranges import RangeTable
from calibcast.passes.cancellation import cancelled_nodes
from calibcast.passes.evidence import HiddenEvidence, evidence_of
from calibcast.passes.fact_reader import FactReader
from calibcast.passes.low_types import LOW_TYPES
from calibcast.passes.outlines import NodeOutline, Outliner
from calibcast.passes.regions import Candidate, candidates
from calibcast.passes.sensitivity import magnified_tensors, offset_free_nodes
from calibcast.passes.ties import NamedTie, named_ties
from torch import fx
from torch.export import ExportedProgram


@dataclass(frozen=True)
class ProgramFacts:
    """What neither settings nor the low type change.

    nodes: in the order in which they run. outlines: of those that are decided, by name, in the same order. ties: of
    nodes that share written storage. readers: by low type. Only `nodes` and `ties` refer to the graph.
    """

    nodes: Sequence[Candidate] = field(repr=False)
    outlines: Mapping[str, NodeOutline] = field(repr=False)
    ties: Sequence[NamedTie] = field(repr=False)
    readers: Mapping[torch.dtype, FactReader] = field(repr=False)

    @classmethod
    def of(cls, program: ExportedProgram, ranges: RangeTable | None) -> ProgramFacts:
        """Read a program, and the ranges that were measured of it, if any."""
        nodes = candidates(program)
        names, evidence, kinds = _names(nodes), evidence_of(ranges), input_kinds(program)
        outliner = Outliner(names, evidence, HiddenEvidence.of(ranges), ranges is not None)
        outlines = {candidate.name: outliner.of(candidate.node) for candidate in nodes if candidate.kept is None}
        offset_free = offset_free_nodes(names)
        readers = {
            low_type: FactReader(
                evidence,
                kinds,
                low_type,
                magnified_tensors(names, evidence, low_type),
                offset_free,
                cancelled_nodes(names, evidence, low_type),
            )
            for low_type in LOW_TYPES.values()
        }
        return cls(nodes, outlines, named_ties(nodes), readers)

    def reader(self, low_type: torch.dtype) -> FactReader:
        """Of the facts of outlines, in one low type."""
        return self.readers[low_type]


def _names(nodes: Sequence[Candidate]) -> dict[fx.Node, str]:
    """The qualified name of each node, and of what it reads."""
    names = {candidate.node: candidate.name for candidate in nodes}
    for candidate in nodes:
        for argument in candidate.node.all_input_nodes:
            names.setdefault(argument, argument.name)
    return names
