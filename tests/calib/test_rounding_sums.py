"""Rounding evidence as sums over batches: they merge in any order, and come back from the frame that they make."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import polars as pl
import pytest
import torch
from calibcast.calib.errors import ArtifactError, MismatchError
from calibcast.calib.rounding_edges import Edge
from calibcast.calib.rounding_statistics import NOT_REACHED, RoundingRecord, RoundingStatistics, record_of
from calibcast.calib.rounding_table import ROUNDING_SCHEMA, rounding_metadata, rounding_of

EDGES = (Edge("sin", "x", 0), Edge("mul", "sin", 1))
ROWS = 2 * len(EDGES)


def batch(number: int, columns: int = 2) -> RoundingStatistics:
    """What one batch gives: other numbers for each row."""
    made = RoundingStatistics.empty(len(EDGES), columns)
    rows = torch.arange(1.0, ROWS + 1, dtype=torch.float64)
    made.noise += (rows[:, None] + number) * 1e-3
    made.worst += made.noise.sum(1)
    made.worst_batch.fill_(number)
    made.local += 1e-2 / (number + 1)
    made.nonfinite += number
    made.steps += 2 * number
    made.batches += 1
    made.ran += number == 1
    return made


def total(*numbers: int) -> RoundingStatistics:
    made = RoundingStatistics.empty(len(EDGES), 2)
    for number in numbers:
        made.merge(batch(number))
    return made


@pytest.mark.parametrize("order", list(permutations((0, 1, 2))))
def test_batches_merge_in_any_order(order: tuple[int, ...]) -> None:
    found = total(*order)
    assert found.noise[0].tolist() == pytest.approx([(1 + 2 + 3) * 1e-3] * 2)
    assert found.worst[0] == pytest.approx(2 * 3e-3)
    assert (found.worst_batch.tolist(), found.batches.tolist()) == ([2] * ROWS, [3] * ROWS)
    assert (found.nonfinite[0], found.steps[0], found.ran[0]) == (3, 6, 1)
    assert found.local[0] == pytest.approx(1e-2 * (1 + 1 / 2 + 1 / 3))


def test_of_two_equal_batches_the_earlier_is_the_worst() -> None:
    for order in ((4, 9), (9, 4)):
        found = RoundingStatistics.empty(len(EDGES), 1)
        for number in order:
            made = batch(0, 1)
            made.worst_batch.fill_(number)
            found.merge(made)
        assert found.worst_batch.tolist() == [4] * ROWS


def test_reasons_of_the_first_are_kept() -> None:
    one, other = total(0), total(1)
    one.missing, other.missing = {0: "mine"}, {0: "theirs", 1: "theirs"}
    one.merge(other)
    assert one.missing == {0: "mine", 1: "theirs"}


def test_numbers_move_but_not_where_no_batch_was_seen() -> None:
    moved = total(2).numbered_from(10)
    assert moved.worst_batch.tolist() == [12] * ROWS
    empty = RoundingStatistics.empty(1, 1)
    assert torch.equal(empty.numbered_from(10).worst_batch, empty.worst_batch)


def test_copies_and_comparisons() -> None:
    one = total(0, 1)
    copy = one.copy()
    assert copy == one
    copy.merge(batch(2))
    assert copy != one
    assert one == total(0, 1)
    other = one.copy()
    other.missing[0] = "why"
    assert other != one
    assert one != "statistics"
    assert one.widened(4).noise.shape == (ROWS, 4)
    assert torch.equal(one.widened(4).noise[:, :2], one.noise)
    assert one.widened(4).noise[:, 2:].sum() == 0


def record(*numbers: int, apart: bool = True) -> RoundingRecord:
    return RoundingRecord(EDGES, apart, total(*numbers), len(numbers))


def test_the_frame_has_means_and_gives_the_sums_back() -> None:
    made = record(0, 1, 2)
    frame = made.frame()
    row = frame.row(0, named=True)
    assert row["noise_by_output"] == pytest.approx([2e-3, 2e-3])
    assert (row["noise"], row["noise_worst"]) == (pytest.approx(4e-3), pytest.approx(6e-3))
    assert (row["worst_batch"], row["batches"], row["nonfinite"], row["steps"]) == (2, 3, 3, 6)
    assert row["local_sqnr_db"] == pytest.approx(-10 * math.log10(1e-2 * (1 + 1 / 2 + 1 / 3) / 3))
    assert (row["method"], row["why_missing"]) == ("run", None)
    assert frame["low_precision_type"].to_list() == ["float16", "bfloat16"] * 2
    assert frame.select("node", "input", "output").row(2) == ("mul", "sin", 1)
    back = record_of(frame)
    assert (back.edges, back.apart, back.seen) == (EDGES, True, 0)
    for name, array in made.statistics.arrays().items():
        expected = array.double() if name != "ran" else (array > 0).double()
        torch.testing.assert_close(back.statistics.arrays()[name].double(), expected)


def test_what_was_not_measured_says_why() -> None:
    made = record()
    made.statistics.missing[1] = "no kernel"
    frame = made.frame()
    assert frame["why_missing"].to_list() == [NOT_REACHED, "no kernel", NOT_REACHED, NOT_REACHED]
    assert frame["noise"].null_count() == frame["method"].null_count() == ROWS
    assert frame["batches"].to_list() == [0] * ROWS
    assert record_of(frame).statistics.missing == dict(enumerate(frame["why_missing"]))
    assert record_of(frame).apart


def test_outputs_that_are_not_told_apart() -> None:
    frame = record(0, 1, apart=False).frame()
    assert frame["noise_by_output"].null_count() == ROWS
    back = record_of(frame)
    assert not back.apart
    assert back.statistics.noise[:, 0].tolist() == pytest.approx(total(0, 1).noise.sum(1).tolist())


def test_methods_and_silence() -> None:
    quiet = total(0)
    quiet.local.zero_()
    frame = RoundingRecord(EDGES, True, quiet, 1).frame()
    assert set(frame["method"]) == {"gradient"}
    assert frame["local_sqnr_db"].to_list() == [math.inf] * ROWS


def test_records_merge_where_their_edges_are_the_same() -> None:
    both = record(0).merged(record(1).numbered_from(0))
    assert both.statistics == total(0, 1)
    assert both.seen == 2
    assert not record(0, apart=False).merged(record(1)).apart
    assert not record(0).merged(record(1, apart=False)).apart
    assert record(0).merged(RoundingRecord()) == record(0) == RoundingRecord().merged(record(0))
    with pytest.raises(MismatchError, match="other edges of rounding"):
        record(0).merged(RoundingRecord(EDGES[:1], True, RoundingStatistics.empty(1, 2), 1))
    narrow = RoundingRecord(EDGES, True, RoundingStatistics.empty(len(EDGES), 1), 1)
    assert record(0).merged(narrow).statistics.noise.shape == (ROWS, 2)
    assert record(0) != record(1)
    assert record(0) != RoundingRecord(EDGES, True, total(0), 2)
    assert record(0) != RoundingRecord(EDGES, False, total(0), 1)
    assert record(0) != "record"
    assert RoundingRecord().frame().height == 0
    assert record_of(RoundingRecord().frame()) == RoundingRecord()
    assert record(3).numbered_from(4).statistics.worst_batch.tolist() == [7] * ROWS
    copy = record(0).copy()
    copy.statistics.merge(batch(1))
    assert copy != record(0)


def metadata(frame: pl.DataFrame) -> dict[str, str]:
    stream = io.BytesIO()
    frame.write_parquet(stream)
    (name,) = rounding_metadata(record(0).frame())
    return {name: base64.b64encode(stream.getvalue()).decode()}


def test_evidence_comes_back_from_a_file() -> None:
    frame = record(0, 1).frame()
    assert rounding_of(rounding_metadata(frame), Path("r")).equals(frame)
    assert rounding_metadata(frame.clear()) == {}
    assert rounding_of({}, Path("r")).schema == ROUNDING_SCHEMA


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.drop("steps"), "column steps of its evidence of rounding is missing, expected Int64"),
        (lambda f: f.with_columns(pl.col("noise").cast(pl.Float32)), "column noise .* is Float32, expected Float64"),
        (lambda f: pl.concat([f, f[:1]]), "two rows of rounding for one edge"),
    ],
)
def test_evidence_that_was_changed_is_refused(change: Callable[[pl.DataFrame], pl.DataFrame], said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        rounding_of(metadata(change(record(0).frame())), Path("ranges.parquet"))


@pytest.mark.parametrize("text", ["no base64!", "bm8gcGFycXVldA=="])
def test_evidence_that_is_damaged_is_refused(text: str) -> None:
    (name,) = rounding_metadata(record(0).frame())
    with pytest.raises(ArtifactError, match=r"ranges\.parquet: its evidence of rounding is not readable"):
        rounding_of({name: text}, Path("ranges.parquet"))
