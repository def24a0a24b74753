"""What `verify` finds: evidence, the bounds that were set, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl
from calibcast.calib.errors import GateError
from calibcast.calib.number_text import counted
from calibcast.calib.text_table import Column, text_table
from calibcast.engines.judging.bounds import Bounds, Verdict, judged

SCHEMA: dict[str, Any] = {
    "output": pl.String,
    "max_abs": pl.Float64,
    "mean_abs": pl.Float64,
    "rel_l2": pl.Float64,
    "sqnr_db": pl.Float64,
    "cosine": pl.Float64,
    "nonfinite": pl.Int64,
    "nonfinite_reference": pl.Int64,
    "top1": pl.Float64,
    "passing_atol": pl.Float64,
    "variation_db": pl.Float64,
    "worst_channel_db": pl.Float64,
    "worst_variation_db": pl.Float64,
    "worst_channel": pl.Int64,
    "equal": pl.Float64,
    "unlike": pl.Int64,
}


@dataclass(eq=False)  # not frozen: it keeps the bounds that it is judged by
class VerificationReport:
    """Evidence, not a bool: how far each output is from the reference, over all batches.

    frame: one row per tensor output. Columns that need an explanation:

    - `sqnr_db`: the reference's power to the error's, over all elements. `variation_db`: the same with each channel's
      mean subtracted from the reference, so that an offset does not count.
    - `worst_channel_db`, `worst_variation_db`: the least of both over single channels (dimension 1 of images and
      volumes, else the last); `worst_channel`: where the latter is. Null for integers and booleans.
    - `equal`: for an integer or boolean output, the share of elements that are equal; null for others.
    - `unlike`: batches that were not compared, as a size that depends on the data was not that of the reference.

    metrics: the user's own, averaged over samples. attribution: whose error it is, as in `engines.judging.attribution`;
    None where that was not asked. problems: what makes the engine fail before any threshold. reference_problem: where
    fp32 itself is NaN or Inf. bounds: those that were set, by `verify` or by `require`.
    """

    frame: pl.DataFrame
    batches: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    reference_problem: str | None = None
    floating: tuple[str, ...] = field(default=(), repr=False)
    attribution: pl.DataFrame | None = field(default=None, repr=False)
    bounds: Bounds = field(default_factory=Bounds)

    @property
    def verdict(self) -> Verdict:
        """Whether it passes, and why: against the bounds, and finite wherever the reference is.

        Where there are bounds, the report fails if the reference itself is NaN, since nothing can be judged against
        NaN, or if an output was not compared in all batches.
        """
        problems = list(self.problems)
        if self.bounds.set():
            problems += self._unjudged()
        return judged(self.bounds, self.frame.to_dicts(), self.floating, self.metrics, problems)

    def _unjudged(self) -> list[str]:
        found = []
        if self.reference_problem is not None:
            found.append(f"the fp32 reference itself is not finite, so nothing can be judged: {self.reference_problem}")
        if set(self.bounds.set()) != {"min_metrics"}:
            found += [
                f"{row['output']}: of another size in {row['unlike']} of {self.batches} batches, so not compared "
                "element by element; judge it by metrics"
                for row in self.frame.filter(pl.col("unlike") > 0).iter_rows(named=True)
            ]
        return found

    @property
    def passed(self) -> bool:
        """Whether the bounds that were set hold, and the engine is finite wherever the reference is."""
        return self.verdict.passed

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        lines = [f"VerificationReport: {counted(self.batches, 'batch')}, {self.verdict}"]
        lines += text_table(map(_cells, self.frame.iter_rows(named=True)), _COLUMNS, indent="  ")
        for row in () if self.attribution is None else self.attribution.iter_rows(named=True):
            lines.append(
                f"  {row['output']}: the plan alone {row['plan_sqnr_db']:.1f} dB, the engine against the plan "
                f"{row['engine_sqnr_db']:.1f} dB: to blame is {row['blame']}"
            )
        lines += [f"  {name}: {value:.6g}" for name, value in self.metrics.items()]
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join(lines + ([f"  reference: {self.reference_problem}"] if self.reference_problem else []))

    def require(
        self,
        min_sqnr_db: float | None = None,
        max_rel_l2: float | None = None,
        min_cosine: float | None = None,
        min_top1: float | None = None,
        max_abs: float | None = None,
        min_metrics: Mapping[str, float] | None = None,
        **more: float | None,
    ) -> VerificationReport:
        """The gate: this report, or GateError with every bound that does not hold, and the numbers.

        The report keeps the bounds: from now on `passed` and `verdict` use them. `more`: `min_variation_db`,
        `min_channel_db`, `min_channel_variation_db`, `min_equal`; see `engines.judging.bounds.Bounds`.

        An engine that is NaN or Inf where fp32 is finite never passes, nor does a reference that is NaN itself:
        nothing can be judged against it. Thresholds apply to floating-point outputs; a NaN statistic fails.
        """
        asked: dict[str, Any] = {
            "min_sqnr_db": min_sqnr_db, "max_rel_l2": max_rel_l2, "min_cosine": min_cosine, "min_top1": min_top1,
            "max_abs": max_abs, "min_metrics": min_metrics, **more,
        }  # fmt: skip
        bounds = self.bounds.and_also(Bounds.of(asked))
        judged(bounds, (), (), self.metrics, ())  # an unknown metric is no verdict
        self.bounds = bounds
        failures = self.verdict.failures
        if not bounds.set() and self.reference_problem is not None:
            failures += self._unjudged()
        if failures:
            raise GateError("the gate says no: " + "; ".join(failures), self)
        return self


_COLUMNS = (
    Column("output", "output"),
    Column("max_abs", "max_abs", 9, number=True, drop=2),
    Column("rel_l2", "rel_l2", 9, number=True),
    Column("sqnr_db", "sqnr_db", 7, number=True),
    Column("variation", "variation", 9, number=True),
    Column("channel", "channel", 7, number=True),
    Column("cosine", "cosine", 9, number=True, drop=3),
    Column("top1", "top1", 6, number=True, drop=4),
    Column("equal", "integers", 13, number=True, drop=1),
    Column("nonfinite", "NaN/Inf", 9, number=True),
    Column("unlike", "other size", 10, number=True, drop=1),
)


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of an output; for integers, only the share that is equal."""
    unlike = {"output": row["output"], "unlike": row["unlike"] or None}
    if row["equal"] is not None:
        return {**unlike, "equal": f"{100 * row['equal']:.4g}% equal"}
    decibels = {
        name: None if row[key] is None else f"{row[key]:.1f}"
        for name, key in (("sqnr_db", "sqnr_db"), ("variation", "variation_db"), ("channel", "worst_variation_db"))
    }
    return {
        **unlike,
        **decibels,
        "max_abs": f"{row['max_abs']:.3g}",
        "rel_l2": f"{row['rel_l2']:.3g}",
        "cosine": f"{row['cosine']:.7f}",
        "top1": None if row["top1"] is None else f"{row['top1']:.4f}",
        "nonfinite": row["nonfinite"],
    }
