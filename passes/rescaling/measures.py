"""What was measured of a program's tensors, as arrays: how large and small they are, and how much each node does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch
from calibcast.calib.graph import base_op, input_targets, producer_of, size_hint, state_tensor, tensor_values
from calibcast.calib.operators import ADDS, MOVES
from calibcast.calib.plain_tensors import is_plain
from calibcast.calib.ranges import RangeTable
from calibcast.passes.work import WorkCounter
from torch import fx
from torch.export import ExportedProgram

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Measures:
    """rows: the row of each tensor, by node and output. absmax, smallest: NaN where nothing was seen; 0 where all is 0.

    histograms: [rows, 256], or None. largest, least: of what a node forms inside, by name. importance: for each node,
    the share of all bytes that it writes plus the share of all work that it does. summed: nodes that only sums read.
    """

    rows: Mapping[tuple[str, int], int]
    absmax: Array
    smallest: Array
    bin_zero: Array
    histograms: Array | None = field(repr=False)
    largest: Mapping[str, float]
    least: Mapping[str, float]
    importance: Mapping[str, float]
    summed: frozenset[str]
    program: ExportedProgram = field(repr=False)

    @classmethod
    def of(cls, program: ExportedProgram, ranges: RangeTable) -> Measures:
        """Read a table and its program."""
        frame = ranges.frame
        rows = {key: row for row, key in enumerate(frame.select("node", "output").iter_rows())}
        seen = pl.col("batches") > 0
        finite = (pl.col("elements") - pl.sum_horizontal("nan", "posinf", "neginf", "masked")) > 0
        zeros = pl.when(seen & finite & pl.col("absmax").is_not_null()).then(0.0)
        numbers = frame.select(
            absmax=pl.coalesce("absmax", zeros), smallest=pl.coalesce("smallest", zeros), zeros=pl.col("zeros")
        )
        known = frame["histogram"].null_count() == 0 and frame.height > 0
        histograms = np.array(frame["histogram"].explode().to_list(), np.float64).reshape(-1, 256) if known else None
        subnormal = np.zeros(frame.height) if histograms is None else histograms[:, 0] - numbers["zeros"].to_numpy()
        hidden = ranges.hidden.filter(pl.col("output") == 0).select("node", "hidden_max", "hidden_min").rows()
        return cls(
            rows, numbers["absmax"].to_numpy().astype(np.float64), numbers["smallest"].to_numpy().astype(np.float64),
            subnormal, histograms, {n: v for n, v, _ in hidden if v is not None},
            {n: v for n, _, v in hidden if v is not None}, _importance(program), _summed(program), program,
        )  # fmt: skip

    @cached_property
    def weights(self) -> Mapping[str, Array]:
        """By placeholder: the mean square of each row and column of a weight of two dimensions or more."""
        found = {}
        for name, target in input_targets(self.program).items():
            tensor = state_tensor(self.program, target)
            if tensor is not None and tensor.dtype == torch.float32 and tensor.dim() > 1 and is_plain(tensor):
                found[name] = _sides(tensor)
        return found


def _sides(weight: torch.Tensor) -> Array:
    squares = weight.detach().double().square()
    rows, columns = squares.flatten(1).mean(1), squares.transpose(0, 1).flatten(1).mean(1)
    sides = torch.cat([rows, columns]).cpu().numpy()
    top = float(sides.max()) if sides.size else 0.0
    return np.asarray(sides[sides > 1e-8 * top])  # rows and columns that are almost 0 need not be kept


def _importance(program: ExportedProgram) -> dict[str, float]:
    count, work, size = WorkCounter(), dict[str, float](), dict[str, float]()
    for node in program.graph.nodes:
        work[node.name] = float(count(node))
        views = base_op(node.target) in MOVES or node.op != "call_function"
        size[node.name] = 0.0 if views else float(sum(_elements(v) for _, v in tensor_values(node)))
    works, sizes = sum(work.values()) or 1.0, sum(size.values()) or 1.0
    return {name: 1e-4 / max(1, len(work)) + work[name] / works + size[name] / sizes for name in work}


def _elements(value: torch.Tensor) -> int:
    found = 1
    for length in value.shape:
        found *= size_hint(length)
    return found


def _summed(program: ExportedProgram) -> frozenset[str]:
    """Nodes that only sums read, directly or through movers: for an addend, only its effect on the sum matters."""
    found: dict[fx.Node, bool] = {}
    for node in reversed(program.graph.nodes):
        readers = [u for u in node.users if u.op != "output"]
        found[node] = (
            len(readers) == len(node.users)
            and bool(readers)
            and all(base_op(u.target) in ADDS or (_hands_on(u) and found[u]) for u in readers)
        )
    return frozenset(producer_of(node)[0].name for node, only in found.items() if only)


def _hands_on(node: fx.Node) -> bool:
    return base_op(node.target) in MOVES
