"""What decisions need of a program and its ranges: read once for all settings, low types and rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import getitem

import torch
from calibcast.calib.graph import input_kinds, size_hint, tensor_values
from calibcast.calib.ranges import RangeTable
from calibcast.calib.rounding_edges import is_mover, output_types, rounding_edges
from calibcast.passes.channels import channels_of
from calibcast.passes.constant_masks import ConstantMasks
from calibcast.passes.evidence import HiddenEvidence, evidence_of
from calibcast.passes.fact_reader import FactReader
from calibcast.passes.facts import WEIGHT_KINDS
from calibcast.passes.low_types import LOW_TYPES
from calibcast.passes.needs import lost_nodes
from calibcast.passes.node_types import Refusals
from calibcast.passes.outlines import NodeOutline, Outliner
from calibcast.passes.regions import Candidate, candidates
from calibcast.passes.rounding_evidence import RoundingEvidence, rounding_evidence
from calibcast.passes.sensitivity import magnified_tensors, offset_free_nodes
from calibcast.passes.ties import NamedTie, named_ties
from torch import fx
from torch.export import ExportedProgram


@dataclass(frozen=True)
class ProgramFacts:
    """The facts that neither settings nor the low type change.

    nodes: in the order in which they run. outlines: by name, of the nodes that are decided, in the same order. ties:
    nodes that must run in one type. readers: by low type. rounding: the measured noise, by low type. sizes: bytes that
    each node writes. leading: for each node that only moves data from nodes that are never low, the nodes that read
    it. Only `nodes`, `ties` and the refusals in `readers` refer to the graph.
    """

    nodes: Sequence[Candidate] = field(repr=False)
    outlines: Mapping[str, NodeOutline] = field(repr=False)
    ties: Sequence[NamedTie] = field(repr=False)
    readers: Mapping[torch.dtype, FactReader] = field(repr=False)
    rounding: Mapping[torch.dtype, RoundingEvidence] = field(default_factory=dict, repr=False)
    sizes: Mapping[str, int] = field(default_factory=dict, repr=False)
    leading: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, program: ExportedProgram, ranges: RangeTable | None) -> ProgramFacts:
        """Read a program, and the ranges that were measured of it, if any."""
        nodes = candidates(program)
        names, evidence, kinds = _names(nodes), evidence_of(ranges), input_kinds(program)
        hidden, channels = HiddenEvidence.of(ranges), channels_of(program)
        outliner = Outliner(names, evidence, hidden, ranges is not None, ConstantMasks(program).masks_a_row)
        outlines = {candidate.name: outliner.of(candidate.node) for candidate in nodes if candidate.kept is None}
        decided = {candidate.name: candidate.node for candidate in nodes if candidate.kept is None}
        rounding = _rounding(program, ranges)
        weights = {name for name, kind in kinds.items() if kind in WEIGHT_KINDS}
        offset_free = offset_free_nodes(names, weights)
        readers = {
            low_type: FactReader(
                evidence,
                kinds,
                low_type,
                magnified_tensors(names, evidence, low_type),
                offset_free,
                lost_nodes(names, evidence, hidden.least, channels, low_type),
                rounding.get(low_type),
                Refusals(decided, low_type),
            )
            for low_type in LOW_TYPES.values()
        }
        sizes = {candidate.name: _size(candidate.node) for candidate in nodes} if rounding else {}
        return cls(nodes, outlines, named_ties(nodes), readers, rounding, sizes, _leading(nodes, names, outlines))

    def reader(self, low_type: torch.dtype) -> FactReader:
        """The reader that turns outlines into facts for one low type."""
        return self.readers[low_type]


def _leading(
    nodes: Sequence[Candidate], names: Mapping[fx.Node, str], outlines: Mapping[str, NodeOutline]
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for candidate in nodes:
        outline = outlines.get(candidate.name)
        if outline is None or not outline.values["moves"]:
            continue
        makers = [maker for _, _, maker in outline.inputs]
        if all(maker not in outlines or maker in found for maker in makers):
            read = [user for n in candidate.node.users for user in ([n] if n.target is not getitem else n.users)]
            found[candidate.name] = [names[user] for user in read if names.get(user) in outlines]
    return found


def _rounding(program: ExportedProgram, ranges: RangeTable | None) -> dict[torch.dtype, RoundingEvidence]:
    if ranges is None or not ranges.rounding.height:
        return {}
    edges, kinds = rounding_edges(program), output_types(program, program.graph_module)
    integers = {i for i, kind in enumerate(kinds) if not (kind.is_floating_point or kind.is_complex)}
    found = {low: rounding_evidence(edges, ranges.rounding, name, integers) for name, low in LOW_TYPES.items()}
    return {low_type: evidence for low_type, evidence in found.items() if evidence is not None}


def _size(node: fx.Node) -> int:
    """Bytes that a node writes at the exported sizes; 0 where it only passes on what others wrote."""
    if is_mover(node):
        return 0
    sizes = [math.prod(map(size_hint, v.shape)) * v.dtype.itemsize for _, v in tensor_values(node)]
    return int(sum(sizes))


def _names(nodes: Sequence[Candidate]) -> dict[fx.Node, str]:
    """The qualified name of each node, and of what it reads."""
    names = {candidate.node: candidate.name for candidate in nodes}
    for candidate in nodes:
        for argument in candidate.node.all_input_nodes:
            names.setdefault(argument, argument.name)
    return names
