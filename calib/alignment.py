"""Match the rows of two tables: by name when the graph is the same, else by module path and structure."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher

import polars as pl

_GROUP = ("kind", "module", "op", "output")
_LIKENESS = (("shape", "before", "after"), ("shape", "after"), ("shape", "before"), ("shape",))
# Above this many rows of one operator in one module, groups of different size are paired in order from their start.
_MOST_ALIKE = 1500


def aligned(old: pl.DataFrame, new: pl.DataFrame, same_graph: bool) -> pl.DataFrame:
    """Pairs of row numbers, `old_row` and `new_row`, null where the other side has none; in the order of `new`.

    Both frames have `node`, `output`, `op`, `module`, `kind` and `shape`, in graph order. If the graph is
    the same, rows match by name. If the model was exported again, or changed, the numbers in names shift. Then weights
    and inputs match by name, and computed tensors by their module, their operator, and their position within these.
    Where a module has more or fewer of an operator than before, the longest runs with equal shapes and neighbours are
    matched first.
    """
    left, right = _numbered(old, "old_row"), _numbered(new, "new_row")
    if same_graph:
        pairs = left.join(right, on=["node", "output"], how="inner").select("old_row", "new_row")
        return _completed(pairs, left, right)
    by_name = left.filter(pl.col("kind") != "activation").join(
        right.filter(pl.col("kind") != "activation"), on=["kind", "node", "output"], how="inner"
    )
    computed = pl.col("kind") == "activation"
    place = pl.int_range(pl.len()).over(_GROUP).alias("place")
    count = pl.len().over(_GROUP).alias("count")
    mine, theirs = (side.filter(computed).with_columns(place, count) for side in (left, right))
    keys = [*_GROUP, "count", "place"]
    pairs = pl.concat(
        [
            by_name.select("old_row", "new_row"),
            mine.join(theirs, on=keys, how="inner").select("old_row", "new_row"),
            _uneven(mine, theirs),
        ]
    )
    return _completed(pairs, left, right)


def _numbered(frame: pl.DataFrame, name: str) -> pl.DataFrame:
    neighbours = [pl.col("op").shift(1).alias("before"), pl.col("op").shift(-1).alias("after")]
    columns = frame.select("node", *_GROUP, pl.col("shape").list.join("x"))
    return columns.with_columns(*neighbours).with_row_index(name).with_columns(pl.col(name).cast(pl.Int64))


def _uneven(mine: pl.DataFrame, theirs: pl.DataFrame) -> pl.DataFrame:
    """Pairs from the groups that have more or fewer members than before."""
    groups = mine.group_by(_GROUP).len("old").join(theirs.group_by(_GROUP).len("new"), on=_GROUP, how="inner")
    uneven = groups.filter(pl.col("old") != pl.col("new")).select(_GROUP)
    found: list[tuple[int, int]] = []
    if uneven.height:
        parts = (side.join(uneven, on=_GROUP, how="semi") for side in (mine, theirs))
        before, after = (part.partition_by(_GROUP, as_dict=True) for part in parts)
        for key, rows in before.items():
            found.extend(_longest_runs(rows, after[key]))
    return pl.DataFrame(found, schema={"old_row": pl.Int64, "new_row": pl.Int64}, orient="row")


def _longest_runs(old: pl.DataFrame, new: pl.DataFrame) -> Iterator[tuple[int, int]]:
    """Pair the longest runs of similar rows; then pair the rows left over by less strict criteria (`_LIKENESS`)."""
    if old.height + new.height > _MOST_ALIKE:
        yield from zip(old["old_row"], new["new_row"], strict=False)
        return
    for columns in _LIKENESS:
        mine, theirs = old.select(columns).rows(), new.select(columns).rows()
        found: list[tuple[int, int]] = []
        for run in SequenceMatcher(None, mine, theirs, autojunk=False).get_matching_blocks():
            pairs = zip(old["old_row"][run.a : run.a + run.size], new["new_row"][run.b : run.b + run.size], strict=True)
            found.extend(pairs)
        yield from found
        old = old.filter(~pl.col("old_row").is_in([pair[0] for pair in found]))
        new = new.filter(~pl.col("new_row").is_in([pair[1] for pair in found]))


def _completed(pairs: pl.DataFrame, left: pl.DataFrame, right: pl.DataFrame) -> pl.DataFrame:
    """The pairs, and the rows that have no partner: new rows in their place, removed rows at the end."""
    every = right.select("new_row").join(pairs, on="new_row", how="left", maintain_order="left")
    gone = left.select("old_row").join(pairs, on="old_row", how="anti", maintain_order="left")
    return pl.concat(
        [every.select("old_row", "new_row"), gone.select("old_row", pl.lit(None, pl.Int64).alias("new_row"))]
    )
