"""What changed between two calibrations, or two plans, as one frame and as text."""

from __future__ import annotations

import polars as pl
from calibcast.calib.errors import GateError
from calibcast.calib.number_text import counted
from calibcast.calib.printable import printable
from calibcast.calib.range_diff import RangeDiff, headroom_text
from calibcast.calib.text_table import Column, and_more, listed, place, text_table

_FLIPS = ("to_high", "to_low")
_COLUMNS = (
    Column("tensor", "node"),
    Column("module", "module"),
    Column("change", "change", 6),
    Column("absmax_old", "was", 9, number=True),
    Column("absmax_new", "now", 9, number=True),
    Column("growth", "growth", 8, number=True, drop=2),
    Column("headroom_new", "headroom", 9, number=True, drop=1),
    Column("flip", "flip", 7),
)


def diff_frame(diff: RangeDiff, flips: pl.DataFrame) -> pl.DataFrame:
    """All that changed, one row per tensor: `RangeDiff.frame` without what stayed the same, with the node's flip.

    flip: `to_high`, `to_low`, `rule`, `new`, `gone` as in `plan_diff`, or null; reason: why. Nodes that flip and have
    no tensor of their own here have a row without ranges.
    """
    decided = flips.select("node", "op", "module", flip="change", rule="rule_new", reason="reason")
    joined = diff.frame.join(decided.drop("op", "module"), on="node", how="left", maintain_order="left")
    changed = joined.filter((pl.col("change") != "same") | pl.col("flip").is_not_null())
    others = decided.join(diff.frame, on="node", how="anti", maintain_order="left")
    front = ("node", "module", "growth", "flip")  # polars prints only the first four and last four of many columns
    both = pl.concat([changed, others], how="diagonal").select(*front, pl.exclude(*front))
    return both.sort(
        pl.col("flip").is_in(_FLIPS).fill_null(False), pl.col("growth").log().abs(), descending=True,
        nulls_last=True, maintain_order=True,
    )  # fmt: skip


def diff_text(diff: RangeDiff, flips: pl.DataFrame, by: str, rows: int | None = None) -> str:
    """What changed, with a table as wide as the terminal. `by`: how the flips were found."""
    frame = diff_frame(diff, flips)
    how = "the same graph" if diff.same_graph else "another export, matched by module path and structure"
    counts = ", ".join(f"{number} {change}" for change, number in diff.counts.items())
    lines = [f"{len(diff.old)} tensors before, {len(diff.new)} now; {how}: {counts}"]
    for change in ("new", "gone"):
        names = diff.frame.filter(pl.col("change") == change)["node"].to_list()
        if names:
            lines.append(f"{change}: {listed(names, 6)}")
    lines += _headroom_lines(diff)
    lines += _flip_lines(flips, by, compared_tensors(diff))
    shown = frame if rows is None else frame.head(rows)
    if len(shown):
        cells = [{**row, "tensor": place(row["node"], row["output"] or 0)} for row in shown.iter_rows(named=True)]
        lines += ["", "largest peak of each tensor, what flips first:", *text_table(cells, _COLUMNS)]
    lines += and_more(len(shown), len(frame), "; --rows 0 shows all")
    return "\n".join(lines)


def plan_diff_text(flips: pl.DataFrame, rows: int | None = None) -> str:
    """What differs between two plans: a line for each of the first `rows` nodes (None: all)."""
    if flips.is_empty():
        return "no decision changed"
    counts = dict(flips["change"].value_counts(sort=True).iter_rows())
    lines = [", ".join(f"{number} {change}" for change, number in counts.items())]
    shown = flips if rows is None else flips.head(rows)
    lines += [f"  {_flip_line(row)}" for row in shown.iter_rows(named=True)]
    return "\n".join(lines + and_more(len(shown), len(flips), "; --rows 0 shows all"))


def compared_tensors(diff: RangeDiff) -> int:
    """How many computed tensors are in both tables."""
    both = pl.col("change").is_in(["grew", "shrank", "same"]) & (pl.col("kind") == "activation")
    return diff.frame.filter(both).height


def fewest_tensors(diff: RangeDiff) -> int:
    """How many computed tensors the smaller of the two tables has."""
    return min(table.frame.filter(pl.col("kind") == "activation").height for table in (diff.old, diff.new))


def require_compared(count: int, of: int, what: str) -> None:
    """Raise GateError where less than half was compared: that nothing flipped then has no meaning.

    of: how many the smaller of the two files has. A table of an engine in service has few, and all of them count.
    """
    if 2 * count < of or not count:
        shared = f"only {count} of {of} {what}s" if count else f"no {what}"
        raise GateError(
            f"the alarm cannot compare: the two files have {shared} in common. Give files of the same model.", None
        )


def require_no_flip(flips: pl.DataFrame) -> None:
    """Raise GateError when a decision flips."""
    flipped = flips.filter(pl.col("change").is_in(_FLIPS))
    if flipped.height:
        names = listed(flipped["node"].to_list(), 8)
        count = f"{counted(flipped.height, 'decision')} {'flips' if flipped.height == 1 else 'flip'}"
        raise GateError(f"{count}: {names}. Make a new plan, or look at what changed.", flipped)


def require_headroom(diff: RangeDiff, least: float) -> None:
    """Raise GateError when a tensor has lost headroom, and has less than `least` times left below 65504."""
    lost = diff.losses(below=least)
    if lost.height:
        texts = [headroom_text(row) for row in lost.head(5).iter_rows(named=True)]
        raise GateError(
            f"{lost.height} tensors have lost headroom and have less than {least:g}x: {listed(texts, 5)}", lost
        )


def _headroom_lines(diff: RangeDiff, most: int = 5) -> list[str]:
    """The worst tensor of each module whose peak has at least doubled, the least headroom first."""
    lost = diff.losses().filter(pl.col("headroom_lost") >= 2).unique("module", keep="first", maintain_order=True)
    lines = [f"  {printable(headroom_text(row))}" for row in lost.head(most).iter_rows(named=True)]
    more = [f"  and {lost.height - most} more modules"] if lost.height > most else []
    return ["headroom lost:", *lines, *more] if lines else []


def _flip_lines(flips: pl.DataFrame, by: str, compared: int, most: int = 10) -> list[str]:
    flipped = flips.filter(pl.col("change").is_in(_FLIPS))
    if flipped.is_empty():
        return [f"no decision would flip ({by})" if compared else "nothing could be compared, so no flip can be seen"]
    lines = [f"{counted(flipped.height, 'decision')} would flip ({by}):"]
    lines += [f"  {_flip_line(row)}" for row in flipped.head(most).iter_rows(named=True)]
    return lines + ([f"  and {flipped.height - most} more"] if flipped.height > most else [])


def _flip_line(row: dict[str, object]) -> str:
    was, now = row["precision_old"] or "nothing", row["precision_new"] or "nothing"
    rule = f" ({row['rule_new']})" if row["rule_new"] else ""
    where = f" ({row['module']})" if row["module"] else ""
    return printable(f"{row['node']}{where}: {was} to {now}{rule}: {row['reason']}")
