"""What `compare` gives: a frame of errors node by node, the first node that is NaN or Inf, and both as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl
from calibcast.calib.number_text import counted
from calibcast.calib.text_table import Column, and_more, place, text_table
from calibcast.passes.tensor_errors import COLUMNS

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

    @classmethod
    def first(cls, frame: pl.DataFrame) -> NonfiniteNode | None:
        """The first of a comparison's frame in graph order; None where there is none."""
        bad = frame.filter(pl.col("nonfinite_alone") > 0)
        if not bad.height:
            return None
        row = bad.row(0, named=True)
        same = ("node", "output", "op", "module", "source", "dtype", "absmax_reference")
        return cls(
            **{name: row[name] for name in same}, batch=row["first_nonfinite_batch"], elements=row["nonfinite_alone"]
        )

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
