"""Counts the casts that `insert_casts` would insert, without making a graph: milliseconds per plan.

It uses the same cast sites as the insertion. A test over random programs and plans checks that the count equals the
casts in the rewritten graph.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import torch
from calibcast.passes.cast_sites import CallTable, CastSites, cast_sites
from calibcast.passes.low_types import LowTypes
from calibcast.passes.node_types import able_types, settled
from calibcast.passes.regions import flatten
from calibcast.passes.ties import Tie, ties_of
from calibcast.passes.weights import WeightReaders, masks_to_saturate
from torch.export import ExportedProgram


@dataclass(frozen=True)
class CastCount:
    """What a plan costs and gains in casts.

    casts: nodes inserted. bytes_cast: the bytes of the tensors that they read, at the exported sizes. low: (node,
    output) of every tensor that exists in the low type. activation_bytes_low: what the nodes themselves write in the
    low type, in bytes of the exported type, so that its share of `CastCounter.activation_bytes` is a share of elements.
    """

    casts: int
    bytes_cast: int
    low: frozenset[tuple[str, int]]
    activation_bytes_low: int


class CastCounter:
    """Counts for one program. Make it once, then ask `count` for each plan."""

    def __init__(
        self, program: ExportedProgram, keep_io_types: bool = True, masks: Collection[str] | None = None
    ) -> None:
        """`masks`: as `PrecisionPlan.masks`."""
        source = flatten(program.graph_module)
        self._table = CallTable(program, source, keep_io_types)
        self.activation_bytes = self._table.activation_bytes
        self._ties: list[Tie] = ties_of(source)
        self._readers = WeightReaders.of(program, source, masks_to_saturate(program, source, masks))
        self._by_name = {call.name: call.node for call in self._table.calls}
        self._low_types = cache(lambda low_type: LowTypes(source, low_type))
        self._able = cache(lambda node, low_type: able_types(node, self._low_types(low_type)))
        self._fits = cache(self._readers.fits)

    def count(self, low_nodes: Collection[str], low_type: torch.dtype) -> CastCount:
        """The casts of the plan in which just these nodes run in `low_type`."""
        # Only for the nodes in `low_nodes`: a kept node, such as an assertion on a type, may be unable to run low.
        nodes = (self._by_name[name] for name in low_nodes if name in self._by_name)
        outputs = {node: types for node in nodes if (types := self._able(node, low_type)) is not None}
        low = settled(set(outputs), self._ties)
        if not low:
            return CastCount(0, 0, frozenset(), 0)
        stored = frozenset(self._readers.stored_low(low, lambda name: self._fits(name, low_type)))
        return _counted(cast_sites(self._table, {node: outputs[node] for node in low}, stored, low_type), low_type)


def _counted(sites: CastSites, low_type: torch.dtype) -> CastCount:
    number = read = activations = 0
    names: set[tuple[str, int]] = set()
    for cast in sites.casts:
        before = cast.of.types[0]
        assert before is not None
        number, read = number + 1, read + cast.operand.elements * before.itemsize
        if cast.made.types[0] == low_type and cast.operand.exported == torch.float32:
            names.add(cast.operand.name)
    for site in sites.calls:
        call = site.call
        for output, (now, then, size) in enumerate(zip(site.made.types, call.exported, call.bytes, strict=True)):
            if now == low_type and then == torch.float32 and not call.passes_on:
                names.add((call.name, output))
                activations += size
    return CastCount(number, read, frozenset(names), activations)
