"""Inlines `torch.no_grad` regions: they mean nothing in inference, but what is in them would not be rescaled.

The nodes of a region are renamed from `submod_1.linear` to `submod_1__linear`, in the program and in its range table.
The true values of that table have the network's own names again.
Regions of `torch.autocast` stay: what they compute in another type has no fp32 values to keep.
"""

from __future__ import annotations

from dataclasses import replace

import polars as pl
from calibcast.calib.flattening import flatten, inlined_name, without_qualified_name
from calibcast.calib.program_digests import node_digests
from calibcast.calib.ranges import RangeTable
from calibcast.calib.rounding_table import LITERAL
from calibcast.passes.program_copies import with_graph
from torch.export import ExportedProgram


def inlined(program: ExportedProgram) -> ExportedProgram:
    """The program without `torch.no_grad` regions, with shared weights; the same program where it has none."""
    flat = flatten(program.graph_module)
    if flat is program.graph_module:
        return program
    for node in flat.graph.nodes:
        without_qualified_name(node)
    return with_graph(ExportedProgram, program, flat, flat.graph, program.state_dict, program.constants)


def inlined_ranges(ranges: RangeTable, program: ExportedProgram) -> RangeTable:
    """The range table of a program, renamed for the program that `inlined` made of it."""
    names = _renamed(ranges)
    rounding = ranges.rounding.with_columns(_under(name, names) for name in ("node", "input"))
    return replace(
        ranges,
        frame=ranges.frame.with_columns(_under("node", names)),
        hidden=ranges.hidden.with_columns(_under("node", names)),
        rounding=rounding,
        calibration=replace(ranges.calibration, digests=node_digests(program)),
    )


def with_own_names(scaled: RangeTable, ranges: RangeTable) -> RangeTable:
    """The scaled table of the inlined program, whose true values are to be `ranges`, those of the original program."""
    record = scaled.calibration.rescaled
    assert record is not None
    back = {made: name for name, made in _renamed(ranges).items()}
    record = replace(record, digests=dict(ranges.calibration.digests), renamed=back)
    return replace(scaled, calibration=replace(scaled.calibration, rescaled=record))


def _renamed(ranges: RangeTable) -> dict[str, str]:
    names = [*ranges.frame["node"], *ranges.rounding["node"], *ranges.rounding["input"]]
    inside = [name for name in dict.fromkeys(names) if "." in name and not name.startswith(LITERAL)]
    return {name: inlined_name(name) for name in inside}


def _under(column: str, names: dict[str, str]) -> pl.Expr:
    return pl.col(column).replace(names)
