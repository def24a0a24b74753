"""What changed between two range tables: new and gone tensors, ranges that grew or shrank, headroom lost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import polars as pl
from calibcast.calib.alignment import aligned
from calibcast.calib.errors import MismatchError
from calibcast.calib.graph_digests import first_difference
from calibcast.calib.ranges import RangeTable
from calibcast.calib.rounding_table import LITERAL, OUTPUT, ROUNDING_KEY

HALF_MAX = 65504.0  # the largest finite fp16 value
_PLACES = ("node", "output", "op", "module", "source", "kind")
_NUMBERS = ("min", "max", "absmax", "smallest", "rms", "batches", "elements")
CHANGES = ("new", "gone", "grew", "shrank", "same")


@dataclass(frozen=True, eq=False)
class RangeDiff:
    """Two tables, row by row.

    frame: one row per tensor of either table, in the order of the new graph; tensors that are gone come last. `node`
    and the other columns of `_PLACES` are those of the new table; `node_old` is the old name. `change`: new, gone,
    grew, shrank or same. `growth`: the new peak divided by the old one.
    `headroom_old`, `headroom_new`: how many times the tensor could grow before it passes 65504; 0 where NaN or Inf was
    seen. `headroom_lost`: `headroom_old` divided by `headroom_new`. Each column of `_NUMBERS` appears as `.._old` and
    `.._new`.
    """

    old: RangeTable
    new: RangeTable
    pairs: pl.DataFrame
    frame: pl.DataFrame
    same_graph: bool

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors changed in which way."""
        found = dict(self.frame["change"].value_counts().iter_rows())
        return {change: found.get(change, 0) for change in CHANGES}

    def losses(self, below: float | None = None) -> pl.DataFrame:
        """Tensors whose headroom shrank by over 1%, the least headroom first; with `below`, only those now under it."""
        lost = self.frame.filter(pl.col("headroom_lost") > 1.01)
        lost = lost if below is None else lost.filter(pl.col("headroom_new") < below)
        return lost.sort("headroom_new", "headroom_lost", descending=[False, True], nulls_last=True)

    @cached_property
    def old_as_new(self) -> RangeTable:
        """The old statistics under the names of the new graph, as far as they have a partner there."""
        if self.same_graph:
            return self.old
        found = self.pairs.drop_nulls()
        where = self.new.frame.select("node", "output", "op", "module", "source", "kind", "dtype", "shape")
        there = where[found["new_row"].to_list()]
        numbers = self.old.frame[found["old_row"].to_list()].drop(where.columns)
        frame = pl.concat([there, numbers], how="horizontal").select(self.old.frame.columns)
        names = pl.DataFrame({"was": self.old.frame["node"][found["old_row"].to_list()], "output": there["output"],
                              "now": there["node"]})  # fmt: skip
        hidden = (
            self.old.hidden.join(names, left_on=["node", "output"], right_on=["was", "output"], how="inner")
            .with_columns(node="now")
            .select(self.old.hidden.columns)
        )
        calibration = replace(self.old.calibration, digests=self.new.calibration.digests)
        rounding = self._renamed(self.old.rounding)
        return replace(self.old, frame=frame, hidden=hidden, calibration=calibration, rounding=rounding)

    @cached_property
    def rounding(self) -> pl.DataFrame:
        """What rounding does, by edge and low type, for the edges that both tables have.

        `noise_old`, `noise_new`: as in `RangeTable.rounding`. `change_db`: how much the noise of an edge grew, in dB.
        Rows are sorted by it: noise that became infinite comes first, then what grew most.
        """
        old, new = (t.rounding.select(*ROUNDING_KEY, "noise", "noise_worst") for t in (self.old_as_new, self.new))
        both = new.join(old, on=ROUNDING_KEY, how="inner", suffix="_old", maintain_order="left")
        both = both.rename({"noise": "noise_new", "noise_worst": "noise_worst_new"})
        growth = 10 * (pl.col("noise_new") / pl.col("noise_old")).log10()
        same = pl.col("noise_new") == pl.col("noise_old")
        change = pl.when(same).then(0.0).otherwise(growth)
        return both.with_columns(change_db=change).sort("change_db", descending=True, nulls_last=True)

    def _renamed(self, rounding: pl.DataFrame) -> pl.DataFrame:
        """Edges of the old graph under the names of the new one; those that have no partner are left out."""
        found = self.pairs.drop_nulls()
        was, now = (
            self.old.frame["node"][found["old_row"].to_list()],
            self.new.frame["node"][found["new_row"].to_list()],
        )
        names = dict(zip(was, now, strict=True))
        literals = [name for name in rounding["input"].unique() if name.startswith(LITERAL)]
        names |= {name: name for name in (OUTPUT, *literals)}
        renamed = rounding.with_columns(
            pl.col(name).replace_strict(names, default=None, return_dtype=pl.String) for name in ("node", "input")
        )
        return renamed.drop_nulls(["node", "input"]).unique(ROUNDING_KEY, keep="first", maintain_order=True)


def range_diff(old: RangeTable, new: RangeTable, tolerance: float = 0.01) -> RangeDiff:
    """Align two tables and compare them. `tolerance`: a peak that changed by less, relatively, counts as the same.

    The tables may be of the same graph, or of the same model, exported again or changed; see `aligned`.
    For the table of a rescaled program, the true values are compared. Raises MismatchError when no computed tensor of
    the two corresponds.
    """
    # Compare the networks, not how their tensors are stored.
    old, new = _shared_ends(old.true_values(), new.true_values())
    same_graph = first_difference(old.calibration.digests, new.calibration.digests) is None
    pairs = aligned(old.frame, new.frame, same_graph)
    matched = pairs.drop_nulls()
    kinds = new.frame["kind"].gather(matched["new_row"])
    compared = kinds.len() > 0 if new.calibration.ends_only and same_graph else (kinds == "activation").any()
    if len(old) and len(new) and not compared:
        raise MismatchError(
            "the two tables have no tensor in common: no module path and operator of one is in the other. "
            "Diff tables of the same model."
        )
    frame = pl.concat(
        [
            _side(new.frame, pairs["new_row"], "_new").rename({f"{name}_new": name for name in _PLACES}),
            _side(old.frame, pairs["old_row"], "_old"),
        ],
        how="horizontal",
    ).with_columns(pl.coalesce(name, f"{name}_old").alias(name) for name in _PLACES)
    return RangeDiff(old, new, pairs, _compared(frame, tolerance), same_graph)


def _shared_ends(old: RangeTable, new: RangeTable) -> tuple[RangeTable, RangeTable]:
    """The two tables. Where one has only inputs and outputs, the other is cut down to the tensors that both have."""
    if old.calibration.ends_only == new.calibration.ends_only:
        return old, new
    ends, whole = (old, new) if old.calibration.ends_only else (new, old)
    kept = whole.frame.join(ends.frame, on=["node", "output"], how="semi", maintain_order="left")
    fewer = replace(whole, frame=kept, calibration=replace(whole.calibration, ends_only=True))
    return (old, fewer) if ends is old else (fewer, new)


def _side(frame: pl.DataFrame, rows: pl.Series, suffix: str) -> pl.DataFrame:
    nonfinite = pl.sum_horizontal("nan", "posinf", "neginf")
    known = pl.when(nonfinite > 0).then(0.0).otherwise(HALF_MAX / pl.col("absmax"))
    columns = frame.select(*_PLACES, *_NUMBERS, nonfinite=nonfinite, headroom=known)
    return columns.select(pl.all().gather(rows)).rename(lambda name: f"{name}{suffix}")


def _compared(frame: pl.DataFrame, tolerance: float) -> pl.DataFrame:
    growth = pl.col("absmax_new") / pl.col("absmax_old")
    worse = pl.col("nonfinite_new") > pl.col("nonfinite_old")
    change = (
        pl.when(pl.col("batches_old").is_null())
        .then(pl.lit("new"))
        .when(pl.col("batches_new").is_null())
        .then(pl.lit("gone"))
        .when(worse | (growth > 1 + tolerance) & growth.is_finite() | growth.is_infinite())
        .then(pl.lit("grew"))
        .when(growth < 1 / (1 + tolerance))
        .then(pl.lit("shrank"))
        .otherwise(pl.lit("same"))
    )
    lost = pl.col("headroom_old") / pl.col("headroom_new")
    numbers = [f"{name}_{when}" for name in (*_NUMBERS, "nonfinite", "headroom") for when in ("old", "new")]
    return frame.with_columns(change=change, growth=growth, headroom_lost=lost.fill_nan(None)).select(
        *_PLACES, "node_old", "change", "growth", "headroom_lost", *numbers
    )


def headroom_text(row: dict[str, object]) -> str:
    """Text such as `block.7: 12x to 1.3x below 65504` for a row of `RangeDiff.frame`."""
    place = str(row["module"] or row["node"])
    was, now = row["headroom_old"], row["headroom_new"]
    assert isinstance(was, float)
    assert isinstance(now, float)
    if now == 0.0:
        return f"{place}: {_times(was)} below {HALF_MAX:g} to NaN or Inf"
    if now >= 1.0:
        return f"{place}: {_times(was)} to {_times(now)} below {HALF_MAX:g}"
    if was >= 1.0:
        return f"{place}: {_times(was)} below to {_times(1 / now)} above {HALF_MAX:g}"
    return f"{place}: {_times(1 / was)} to {_times(1 / now)} above {HALF_MAX:g}"


def _times(factor: float) -> str:
    return f"{factor:.0f}x" if factor >= 9.95 else f"{factor:.2g}x"
