"""Range tables scaled to a rewritten program: `RangeTable.scaled`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import polars as pl
from calibcast.calib.errors import MismatchError
from calibcast.calib.graph import tensor_specs
from calibcast.calib.hidden_exponents import hidden_exponents
from calibcast.calib.program_digests import node_digests, weights_hash
from calibcast.calib.range_scaling import Table, scaled_table, tensor_key
from calibcast.calib.range_schema import SCHEMA, RangeData, Rescaled
from calibcast.calib.rounding_edges import rounding_edges
from calibcast.calib.rounding_scaling import NumberScale
from torch.export import ExportedProgram

_IDENTITY = ("node", "output", "op", "module", "source", "kind", "dtype", "shape")


def scaled_to(
    table: Table,
    exponents: Mapping[tuple[str, int], int],
    program: ExportedProgram,
    added: Mapping[str, str],
    numbers: Mapping[tuple[str, str], NumberScale],
    weights: str | None,
) -> Table:
    """See `RangeTable.scaled`."""
    before = table.calibration
    if before.rescaled is not None:
        raise MismatchError("these ranges are of a rescaled program already: scale its `true_values()`")
    by_key = {tensor_key(*place): k for place, k in exponents.items() if k}
    record = Rescaled(by_key, hidden_exponents(program, exponents), dict(added), dict(before.digests), before.weights)
    edges = [edge.key for edge in rounding_edges(program)] if table.rounding.height else []
    found = scaled_table(table, record, _identity(table, program, added), numbers, edges)
    calibration = replace(
        before,
        digests=node_digests(program),
        weights=weights_hash(program) if weights is None else weights,
        rescaled=record,
    )
    return replace(found, calibration=calibration)


def _identity(table: RangeData, program: ExportedProgram, added: Mapping[str, str]) -> pl.DataFrame | None:
    """The rows of added nodes. `after`: the row of the table that the node follows in the graph."""
    if not added:
        return None
    rows, place = [], -1
    known = {key: row for row, key in enumerate(table.frame.select("node", "output").iter_rows())}
    for spec in tensor_specs(program):
        if spec.node in added:
            rows.append({**asdict(spec), "shape": list(spec.shape), "after": max(place, 0)})
        else:
            place = known.get((spec.node, spec.output), place)
    schema = {name: SCHEMA[name] for name in _IDENTITY}
    return pl.DataFrame(rows, schema={**schema, "after": pl.Int64})
