"""The ledger: for every planned node, which engine layer it went into, and in which types that layer runs.

`match` says how sure that is. exact: a layer of its own. fused: a layer that it shares with other nodes. The types of
such a layer are those of its edges, not of what happens inside. A node that lowering folded away is fused, too, and has
no layer. unknown: nothing in the engine could be traced back to it. `found_by` says how:

- "metadata": the node's name, carried by TensorRT from our network layer to the engine's.
- "layer name", "tensor name": an engine layer or tensor has the name of one of the node's network layers or outputs.
- "neighbours": between two layers where one reads what the other writes.
- "shapes": the only layer and the only node left with these output sizes.
- "lowering": no layer was made for it. "folding": its layers only move or hold data, and TensorRT kept none of them.
- "pytorch": it runs outside the engine. "graph": the eager backend runs the graph itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl
from calibcast.calib.graph import dtype_name, tensor_values
from calibcast.calib.operators import MOVES, canonical
from calibcast.engines.ledger.inspection import EngineLayer
from calibcast.engines.ledger.layer_tracing import traced
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.verdict import KEPT, LOW
from torch.export import ExportedProgram

EXACT, FUSED, UNKNOWN = "exact", "fused", "unknown"
SCHEMA: dict[str, Any] = {
    "node": pl.String,
    "op": pl.String,
    "module": pl.String,
    "planned": pl.String,
    "planned_type": pl.String,
    "layers": pl.List(pl.String),
    "actual_types": pl.List(pl.String),
    "match": pl.String,
    "found_by": pl.String,
    "agrees": pl.Boolean,
}
_OPTIONAL = ("found_by", "agrees")
# Kinds of network layers that compute nothing, so that an engine may have none of them.
_IDLE_KINDS = frozenset({"SHUFFLE", "CONSTANT", "IDENTITY", "SHAPE", "SLICE", "CONCATENATION"})


@dataclass(frozen=True)
class LedgerRow:
    """One planned node. agrees: whether the types allow what was planned; None where that cannot be told."""

    node: str
    op: str
    module: str
    planned: str
    planned_type: str
    layers: tuple[str, ...] = ()
    actual_types: tuple[str, ...] = ()
    match: str = UNKNOWN
    found_by: str | None = None
    agrees: bool | None = None


def empty_ledger() -> pl.DataFrame:
    """A ledger without rows."""
    return pl.DataFrame([], schema=SCHEMA)


def problem_of(ledger: pl.DataFrame) -> str | None:
    """What makes a frame no ledger: a column, or a gap in one that is always filled; None where it is one."""
    for name, dtype in SCHEMA.items():
        if ledger.schema.get(name) != dtype:
            return f"column {name} is {ledger.schema.get(name, 'missing')}, expected {dtype}"
        if name not in _OPTIONAL and ledger[name].null_count():
            return f"column {name} has a gap"
    return None


def ledger_of(
    plan: PrecisionPlan,
    made: Sequence[Mapping[str, Any]],
    layers: Sequence[EngineLayer],
    torch_types: Mapping[str, Sequence[str]],
    readers: Mapping[str, Sequence[str]] | None = None,
    inserted: frozenset[str] = frozenset(),
) -> pl.DataFrame:
    """The ledger of an engine: one row per low or high node of `plan`, with the columns of `SCHEMA`.

    made: the layers of the networks before fusion (`name`, `node`, `outputs`, `shapes`). layers: those of the engines,
    as inspected; empty where nothing could be inspected. torch_types: nodes that run in PyTorch, and their types.
    readers: for each node, the nodes that read it. inserted: the nodes that calibcast has put into the graph.
    """
    planned = [d for d in plan.decisions if d.precision != KEPT]
    types = {d.node: dtype_name(plan.low_precision_type) if d.precision == LOW else "float32" for d in planned}
    casts = inserted | {d.node for d in plan.decisions if d.rule == "stated_type"}
    found, how = traced(made, layers, readers or {})
    kinds: dict[str, set[str]] = defaultdict(set)
    for layer in made:
        kinds[str(layer["node"])].add(str(layer["kind"]))
    rows = []
    for decision in planned:
        name = decision.node
        row = LedgerRow(name, decision.op, decision.module, decision.precision, types[name])
        if name in torch_types:
            ours = tuple(torch_types[name])
            row = _filled(row, ["pytorch"], ours, EXACT, "pytorch", types[name] in ours if ours else None)
        elif name in found:
            held = [layers[index] for index in found[name]]
            match, seen, agrees = _judged(name, held, types, casts)
            # It makes no difference whether data moves before a cast or after it.
            agrees = None if agrees is False and _moves(decision.op) else agrees
            row = _filled(row, [layer.name for layer in held], seen, match, how[name], agrees)
        elif name not in kinds and "" not in kinds:
            row = _filled(row, [], (), FUSED, "lowering")
        elif name in kinds and kinds[name] <= _IDLE_KINDS and layers:
            row = _filled(row, [], (), FUSED, "folding")
        rows.append(row)
    return pl.DataFrame([asdict(row) for row in rows], schema=SCHEMA)


def eager_ledger(plan: PrecisionPlan, program: ExportedProgram) -> pl.DataFrame:
    """The ledger of the eager backend, which runs each node of the cast graph as it is."""
    given = {node.name: {dtype_name(v.dtype) for _, v in tensor_values(node) if v.dtype.is_floating_point}
             for node in program.graph.nodes}  # fmt: skip
    low = dtype_name(plan.low_precision_type)
    rows = []
    for d in plan.decisions:
        if d.precision == KEPT:
            continue
        kind = low if d.precision == LOW else "float32"
        row = LedgerRow(d.node, d.op, d.module, d.precision, kind)
        types = tuple(sorted(given.get(d.node, ())))
        if d.node in given:
            row = _filled(row, [d.node], types, EXACT, "graph", kind in types if types else None)
        rows.append(row)
    return pl.DataFrame([asdict(row) for row in rows], schema=SCHEMA)


def unknown_ledger(plan: PrecisionPlan) -> pl.DataFrame:
    """The ledger of an engine that does not tell which nodes its kernels come from: every planned node is unknown."""
    low = dtype_name(plan.low_precision_type)
    rows = [
        LedgerRow(d.node, d.op, d.module, d.precision, low if d.precision == LOW else "float32")
        for d in plan.decisions
        if d.precision != KEPT
    ]
    return pl.DataFrame([asdict(row) for row in rows], schema=SCHEMA)


def _filled(
    row: LedgerRow,
    layers: Iterable[str],
    types: tuple[str, ...],
    match: str,
    found_by: str | None = None,
    agrees: bool | None = None,
) -> LedgerRow:
    place = (row.node, row.op, row.module, row.planned, row.planned_type)
    return LedgerRow(*place, tuple(layers), types, match, found_by, agrees)


def _judged(
    name: str, layers: Sequence[EngineLayer], types: Mapping[str, str], casts: frozenset[str]
) -> tuple[str, tuple[str, ...], bool | None]:
    """Match, types and agreement of a node that these layers carry.

    A kernel's edges contradict a plan only where all planned nodes in it should run in one type. A fused kernel with a
    cast to fp32 and a cast back shows fp16 on both sides, although it computes in fp32.
    """
    seen = tuple(dict.fromkeys(kind for layer in layers for kind in layer.types))
    others = {node for layer in layers for node in layer.nodes if node != name}
    match = FUSED if others & set(types) else EXACT
    typed = any(layer.types for layer in layers)
    alone = {types[node] for node in (*others, name) if node in types} == {types[name]} and not others & casts
    agrees = (types[name] in seen) if typed and alone else (True if types[name] in seen else None)
    return match, seen, agrees


def _moves(op: str) -> bool:
    """Whether an operator, by its full name, only moves data."""
    parts = op.split(".")
    return len(parts) > 1 and canonical(parts[1].rstrip("_")) in MOVES


def plan_of(plan: PrecisionPlan | None, program: ExportedProgram) -> PrecisionPlan:
    """The plan that a ledger is compared with: the given one, else the types that the program has."""
    return plan if plan is not None else PrecisionPlan.from_types(program)


def readers_of(program: ExportedProgram) -> dict[str, list[str]]:
    """For each node that computes, the nodes that read it; the graph's inputs and outputs are left out."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return {node.name: [user.name for user in node.users if user.op == "call_function"] for node in calls}
