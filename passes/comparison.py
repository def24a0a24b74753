"""`compare`: a program and its cast graph in lockstep, node by node, on the user's data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from operator import getitem
from typing import Any

import polars as pl
import torch
from calibcast.calib.batches import numbered, signature_of
from calibcast.calib.errors import MismatchError
from calibcast.calib.execution import ProgramRunner, Ran, naming_batch, require_program, tensors_of
from calibcast.calib.graph import (
    REGION_CHILD,
    TensorSpec,
    dtype_name,
    op_name,
    tensor_specs,
    tensor_values,
    walk,
    where,
)
from calibcast.calib.masks import mask_tensors
from calibcast.calib.number_text import counted
from calibcast.calib.sentinels import MASK_AT_MOST
from calibcast.calib.text_table import Column, and_more, place, text_table
from calibcast.calib.uninitialised import undefined_tensors
from calibcast.passes.cast_insertion import CAST, CLAMP
from calibcast.passes.lineage import readings
from calibcast.passes.tensor_errors import COLUMNS, TensorErrors, decibels_of_changed, rounding_db
from torch import fx
from torch.export import ExportedProgram
from tqdm.auto import tqdm

_log = logging.getLogger("calibcast")
# The columns that the frame is sorted by come first: polars prints only the first four and the last four of many.
SCHEMA: dict[str, Any] = {
    "node": pl.String,
    "module": pl.String,
    "sqnr_db": pl.Float64,
    "loss_db": pl.Float64,
    "output": pl.Int64,
    "op": pl.String,
    "source": pl.String,
    "kind": pl.String,
    "dtype": pl.String,
    "dtype_reference": pl.String,
    "input_sqnr_db": pl.Float64,
    **{name: dtype for name, dtype in COLUMNS.items() if name != "sqnr_db"},
}
# Losses below this are normal variation of rounding from one node to the next.
CULPRIT_DB = 20.0


@dataclass(frozen=True)
class NonfiniteNode:
    """The first node, in graph order, whose result is NaN or Inf where the program's is finite.

    batch: the first in which that happened. elements: how many, over all batches. absmax_reference: the largest finite
    magnitude of the program's result.
    """

    node: str
    output: int
    op: str
    module: str
    source: str
    dtype: str
    batch: int
    elements: int
    absmax_reference: float

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.op, self.module, self.source) if part)
        return (
            f"{self.node} ({place}), batch {self.batch}\n"
            f"  {self.elements} elements of its {self.dtype} result are NaN or Inf over all batches; the program's are "
            f"finite, up to {self.absmax_reference:.4g}"
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """How far each tensor of a cast graph is from the program's, over all batches.

    frame: one row per tensor of the program, worst first, with the columns of `SCHEMA`:

    - `node`, `output`, `op`, `module`, `source`, `kind` as in `RangeTable.frame`; `dtype` is the type in the cast
      graph, `dtype_reference` in the program.
    - `sqnr_db`, `rel_l2`, `max_abs` of the difference, over elements that are finite in both: inf dB when equal, NaN
      when there were none. `absmax`, `absmax_reference`: over finite elements.
    - `changed`: for integer and boolean tensors, such as indices, the share of elements that differ; null for others.
      Such tensors have no `sqnr_db` and `rel_l2` (null). For sorting and for losses, a share counts as the SQNR of the
      budget that allows it: half the error amplitude, so that 0.5% counts as 40 dB.
    - `input_sqnr_db`: the least SQNR among the tensors that the node reads, inf where it reads none; -inf when one has
      `nonfinite_alone`. `loss_db`: how far the SQNR falls from there to the node's result, 0 where it does not. With
      exact inputs, what rounding to the low type costs does not count as a loss (71 dB remain in fp16, 53 dB in bf16).
      A node with a large loss is a culprit; a node with a low SQNR but no loss is a victim. Values of a mask that are
      at or below -1e4 in both count as equal: they are left out, as in calibration.
    - `nonfinite`, `nonfinite_reference`: counts of NaN and Inf; `nonfinite_alone`: those in the cast graph where the
      program is finite; `first_nonfinite_batch`: the first batch that has any.
    - `unlike`: batches in which the two had different shapes, where sizes depend on data. These are not compared.

    culprits: the rows whose loss is above `CULPRIT_DB`, largest first and then in graph order: where error enters.
    """

    frame: pl.DataFrame
    culprits: pl.DataFrame
    batches: int
    first_nonfinite: NonfiniteNode | None = None

    def __str__(self) -> str:
        return self.table()

    def table(self, rows: int = 12) -> str:
        """A report to read: the first non-finite node, where error enters, and the worst tensors, `rows` of each."""
        # Of a tensor without elements both are NaN, which polars holds to be above every number.
        numbers = pl.col("rel_l2").fill_nan(0.0).ne(0.0) | pl.col("changed").fill_nan(0.0).gt(0)
        differs = numbers | pl.col("nonfinite_alone").gt(0)
        changed = self.frame.filter(differs).height
        tensors = counted(self.frame.height, "tensor")
        lines = [f"Comparison: {counted(self.batches, 'batch')}, {tensors}, {changed} differ from the program"]
        first = self.first_nonfinite
        lines.append(f"first non-finite node: {first or 'none'}")
        if self.culprits.height:
            lines += ["where error enters, by what the SQNR loses there:", *_table(self.culprits, rows)]
        else:
            lines.append(f"no node loses more than {CULPRIT_DB:g} dB")
        return "\n".join([*lines, "worst tensors:", *_table(self.frame, rows)])


def compare(  # noqa: PLR0913 - as calibrate
    program: ExportedProgram,
    mixed: ExportedProgram,
    dataloader: Iterable[Any],
    transform: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Comparison:
    """Run `program` and `mixed`, its cast graph, node by node in turns, and compare what each node gives.

    Both free each tensor after its last reader, so memory is that of two forward passes, plus a few numbers per tensor.
    Both programs are left unchanged.

    Args:
        program: the reference, as exported.
        mixed: from `insert_casts(program, plan)`; it may have been saved and loaded.
        dataloader, transform, max_batches, device: as in `calibrate`.

    Raises:
        MismatchError: `mixed` was not made from `program`. BatchError: as in `calibrate`.
    """
    require_program(program)
    require_program(mixed, "mixed", "Give what insert_casts(program, plan) returns.")
    comparing = _Comparing.of(program, mixed, device)
    batches = numbered(dataloader, signature_of(program), transform, max_batches)
    with tqdm(batches, "compare", max_batches, unit="batch", disable=None if progress else True) as bar:
        for index, _, flat in bar:
            with naming_batch(flat, index), torch.no_grad():
                comparing.run(flat, index)
    comparison = comparing.result()
    _log.info("%s", comparison)
    return comparison


class _Comparing:
    """Two programs, and what has been compared of them so far."""

    def __init__(self, ours: ProgramRunner, theirs: ProgramRunner, specs: list[TensorSpec]) -> None:
        self._ours, self._theirs, self._specs = ours, theirs, specs
        self._rows = {(spec.node, spec.output): row for row, spec in enumerate(specs)}
        self._weights = {spec.node for spec in specs if spec.kind not in {"activation", "input"}}
        self._named = {spec.node for spec in specs}
        self._undefined = undefined_tensors(theirs.program)
        self._masks = mask_tensors(theirs.program)
        exact = [row for row, spec in enumerate(specs) if not may_be_near(getattr(torch, spec.dtype))]
        self._errors = TensorErrors(len(specs), theirs.device, exact)
        self._types: dict[int, torch.dtype] = {}
        self._batches = 0

    @classmethod
    def of(cls, program: ExportedProgram, mixed: ExportedProgram, device: Any) -> _Comparing:
        _check(program, mixed)
        theirs = ProgramRunner(program, device)
        return cls(ProgramRunner(mixed, theirs.device), theirs, tensor_specs(program, lambda _: True))

    def run(self, flat: list[Any], index: int) -> None:
        """One batch through both."""
        flat = self._theirs.to_device(flat)
        ours = self._ours.steps(flat)
        for theirs in self._theirs.steps(flat):
            # A weight is the same in every batch.
            if theirs.name in self._named and not (self._batches and theirs.name in self._weights):
                self._compare(_advanced(ours, theirs.name), theirs, index)
        for _ in ours:
            pass
        self._batches += 1

    def _compare(self, ours: Ran, theirs: Ran, index: int) -> None:
        mine = dict(tensors_of(ours.node, ours.result))
        masked = MASK_AT_MOST if theirs.name in self._masks else None
        for output, tensor in tensors_of(theirs.node, theirs.result):
            row = self._rows.get((theirs.name, output))
            if row is None or output not in mine:
                continue
            self._types[row] = mine[output].dtype
            if theirs.name not in self._undefined:
                self._errors.update(row, mine[output], tensor, index, masked)

    def result(self) -> Comparison:
        columns = self._errors.columns()
        inputs, losses = self._losses(columns)
        types = [dtype_name(self._types[row]) if row in self._types else None for row in range(len(self._specs))]
        frame = pl.DataFrame(
            {
                **{name: [getattr(s, name) for s in self._specs] for name in ("node", "output", "op", "module")},
                **{name: [getattr(s, name) for s in self._specs] for name in ("source", "kind")},
                "dtype": types,
                "dtype_reference": [spec.dtype for spec in self._specs],
                "input_sqnr_db": inputs,
                "loss_db": losses,
                **columns,
            },
            schema=SCHEMA,
        )
        culprits = frame.filter(pl.col("loss_db") > CULPRIT_DB)
        worst = [pl.col("nonfinite_alone") == 0, pl.col("unlike") == 0, pl.Series("worth", _worth(columns))]
        return Comparison(
            frame=frame.sort(worst, maintain_order=True),
            culprits=culprits.sort("loss_db", descending=True, maintain_order=True),
            batches=self._batches,
            first_nonfinite=_first_nonfinite(frame),
        )

    def _losses(self, columns: dict[str, list[Any]]) -> tuple[list[float], list[float]]:
        """`input_sqnr_db` and `loss_db` of each row."""
        reads = readings(self._theirs.program.graph_module)
        sqnr = [
            -math.inf if alone else math.inf if math.isnan(db) else db
            for db, alone in zip(_worth(columns), columns["nonfinite_alone"], strict=True)
        ]
        changed = [t for row, t in self._types.items() if dtype_name(t) != self._specs[row].dtype]
        rounding = min((rounding_db(dtype) for dtype in changed), default=math.inf)
        inputs, losses = [], []
        for row, spec in enumerate(self._specs):
            rows = [self._rows[read] for read in reads.get(spec.node, ()) if read in self._rows]
            worst = min((sqnr[i] for i in rows), default=math.inf)
            inputs.append(worst)
            before = min(worst, rounding)
            losses.append(before - sqnr[row] if sqnr[row] < before else 0.0)
        return inputs, losses


def may_be_near(dtype: torch.dtype) -> bool:
    """Whether the distance between values of this type means something: not for indices, labels and masks."""
    return dtype.is_floating_point or dtype.is_complex


def _worth(columns: dict[str, list[Any]]) -> list[float]:
    """The SQNR of each row; for an integer row, the SQNR that its changed share counts as."""
    rows = zip(columns["sqnr_db"], columns["changed"], strict=True)
    return [decibels_of_changed(changed) if db is None else db for db, changed in rows]


def _advanced(steps: Generator[Ran, None, Any], name: str) -> Ran:
    """Run the cast graph until it has run the node that stands for `name`."""
    for ran in steps:
        if _key(ran.name) == _key(name):
            return ran
    raise AssertionError(f"{name} was checked to be in both graphs")


def _key(name: str) -> str:
    """One key for a node in the program and in the cast graph, which inlines the nodes of no_grad regions."""
    return name.replace(".", "__")


def _check(program: ExportedProgram, mixed: ExportedProgram) -> None:
    """Raise MismatchError unless `mixed` has the nodes of `program`, in their order, and otherwise only casts."""
    theirs, ours = _tensor_nodes(program), _tensor_nodes(mixed)
    problem = _difference(theirs, ours) or _signature_difference(program, mixed)
    if problem is not None:
        raise MismatchError(
            f"the cast graph was not made from this program: {problem}. Compare a program with what insert_casts makes "
            "of it."
        )


def _tensor_nodes(program: ExportedProgram) -> dict[str, fx.Node]:
    """The nodes that make tensors, by key, in order; not those that only pass tensors on."""
    return {
        _key(step.name): step.node
        for step in walk(program.graph_module)
        if step.node.op == "call_function" or (step.node.op == "placeholder" and not step.inside)
        if step.node.target is not getitem and step.node.target not in REGION_CHILD and tensor_values(step.node)
    }


def _difference(theirs: dict[str, fx.Node], ours: dict[str, fx.Node]) -> str | None:
    for key, node in theirs.items():
        if key not in ours:
            return f"it lacks {where(node)}"
        if node.target != ours[key].target and node.op == "call_function":
            return f"{where(node)} is {op_name(node.target)} in the program and {op_name(ours[key].target)} in it"
    for key, node in ours.items():
        if key not in theirs and node.target not in {CAST, CLAMP}:
            return f"the program lacks its {where(node)}"
    if [key for key in ours if key in theirs] != list(theirs):
        return "its nodes have another order"
    return None


def _signature_difference(program: ExportedProgram, mixed: ExportedProgram) -> str | None:
    theirs, ours = signature_of(program).leaves, signature_of(mixed).leaves
    if len(theirs) != len(ours):
        return f"it takes {len(ours)} inputs, the program {len(theirs)}"
    for leaf, other in zip(theirs, ours, strict=True):
        if (leaf.dtype, len(leaf.sizes)) != (other.dtype, len(other.sizes)):
            return f"input {leaf.name} is {leaf} in the program and {other} in it"
    return None


def _first_nonfinite(frame: pl.DataFrame) -> NonfiniteNode | None:
    bad = frame.filter(pl.col("nonfinite_alone") > 0)
    if not bad.height:
        return None
    row = bad.row(0, named=True)
    same = ("node", "output", "op", "module", "source", "dtype", "absmax_reference")
    return NonfiniteNode(
        **{name: row[name] for name in same}, batch=row["first_nonfinite_batch"], elements=row["nonfinite_alone"]
    )


_SHOWN = (
    Column("tensor", "node"),
    Column("module", "module", drop=3),
    Column("type", "dtype", 9),
    Column("apart", "sqnr_db", 11, number=True),
    Column("loss", "loss_db", 7, number=True),
    Column("absmax", "absmax", 9, number=True),
    Column("absmax_reference", "in fp32", 9, number=True, drop=2),
    Column("bad", "NaN/Inf", 9, number=True, drop=1),
)


def _table(frame: pl.DataFrame, rows: int) -> list[str]:
    shown = frame.head(rows)
    cells = [
        {
            **row,
            "tensor": place(row["node"], row["output"]),
            "type": row["dtype"] or "not run",
            "apart": _apart(row),
            "loss": f"{row['loss_db']:.1f}",
            "bad": row["nonfinite_alone"] or None,
        }
        for row in shown.iter_rows(named=True)
    ]
    return [*text_table(cells, _SHOWN, indent="  "), *(f"  {line}" for line in and_more(len(shown), len(frame)))]


def _apart(row: dict[str, Any]) -> str:
    """The SQNR of a row, or for integers the share that differs."""
    return f"{row['sqnr_db']:.1f}" if row["changed"] is None else f"{row['changed']:.2%} !="
