"""Range tables: merging, and belonging to a program."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib import MismatchError, RangeTable, calibrate
from calibcast.calib.input_sizes import MAX_SIZES, count_size, merge_sizes
from calibcast.calib.kernel import HostKernel
from calibcast.calib.range_schema import MAX_HASHES
from calibcast.calib.statistic_names import COUNTS, HIDDEN_MERGES, NEUTRAL, VALUE_MERGES, VALUES
from calibcast.calib.statistics import Statistics
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from torch import nn
from torch.export import Dim, ExportedProgram

SUMS = ["mean", "rms"]
ORDERED = ["absmax_batch", "nonfinite_batch"]  # batch numbers follow the order of the tables


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """A logarithm that some data make NaN, a norm of wide range, and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("scale", torch.full((3,), 50.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x).relu() * self.scale + 400
        return torch.cat([y, (x + 3).log()], -1)


def exported(bias: float = 0.0) -> ExportedProgram:
    torch.manual_seed(0)
    model = Model().eval()
    with torch.no_grad():
        model.linear.bias[0] += bias
    return torch.export.export(model, (noise(2, 4),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return exported()


# Seven batches of four sizes; the third gives NaN in the logarithm, the fifth is faint, the sixth is large.
BATCHES = [noise(2 + seed % 4, 4, seed=seed) * scale for seed, scale in enumerate([1, 0.5, 6, 0.1, 1e-30, 2, 1])]


def measured(program: ExportedProgram, batches: Sequence[Any], **options: Any) -> RangeTable:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NaN is meant
        return calibrate(program, batches, progress=False, **options)


@pytest.fixture(scope="module")
def whole(program: ExportedProgram) -> RangeTable:
    return measured(program, BATCHES)


@pytest.fixture(scope="module")
def shards(program: ExportedProgram) -> list[RangeTable]:
    return [measured(program, [batch]) for batch in BATCHES]


def assert_same_ranges(found: RangeTable, expected: RangeTable, ordered: bool = True) -> None:
    """All columns are equal but for sums, which agree to 1e-12; batch numbers only where the order is the same."""
    left_out = SUMS if ordered else SUMS + ORDERED
    assert_frame_equal(found.frame.drop(left_out), expected.frame.drop(left_out), check_exact=True)
    assert_frame_equal(found.frame.select(SUMS), expected.frame.select(SUMS), rel_tol=1e-12, abs_tol=0)


@pytest.mark.parametrize("cuts", [(3,), (1, 2), (1, 4, 6), (1, 2, 3, 4, 5, 6)], ids=str)
def test_shards_merge_to_the_whole(cuts: tuple[int, ...], program: ExportedProgram, whole: RangeTable) -> None:
    """However the data are cut, the merged table is that of one run over all of them, batch numbers included."""
    edges = [0, *cuts, len(BATCHES)]
    tables = [measured(program, BATCHES[start:end]) for start, end in itertools.pairwise(edges)]
    merged = RangeTable.merge(tables)
    assert_same_ranges(merged, whole)
    assert merged.calibration == whole.calibration
    assert str(merged) == str(whole)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(order=st.permutations(range(len(BATCHES))))
def test_merging_does_not_depend_on_the_order(order: list[int]) -> None:
    """Counts, extremes and histograms of tables merged in any order are equal, sums to 1e-12."""
    shards = shards_once()
    merged = RangeTable.merge([shards[i] for i in order])
    assert_same_ranges(merged, RangeTable.merge(shards), ordered=False)
    assert merged.calibration.input_sizes == RangeTable.merge(shards).calibration.input_sizes


_SHARDS: list[RangeTable] = []


def shards_once() -> list[RangeTable]:
    """The shards, for tests that hypothesis calls many times."""
    if not _SHARDS:
        program = exported()
        _SHARDS.extend(measured(program, [batch]) for batch in BATCHES)
    return _SHARDS


def test_merging_in_groups_is_merging_at_once(shards: list[RangeTable], whole: RangeTable) -> None:
    """Merging is associative: ranks first, then days, or all together."""
    left = RangeTable.merge([RangeTable.merge(shards[:3]), RangeTable.merge(shards[3:])])
    right = RangeTable.merge([shards[0], RangeTable.merge([shards[1], RangeTable.merge(shards[2:])])])
    assert_same_ranges(left, whole)
    assert_same_ranges(right, whole)


def test_weights_count_once(shards: list[RangeTable]) -> None:
    """Rows of parameters and buffers are those of one table, however many are merged."""
    kinds = ["parameter", "buffer"]
    merged = RangeTable.merge(shards).frame.filter(pl.col("kind").is_in(kinds))
    assert_frame_equal(merged, shards[0].frame.filter(pl.col("kind").is_in(kinds)), rel_tol=1e-15)
    assert merged["batches"].to_list() == [1] * len(merged)


def test_merging_leaves_its_tables_alone(shards: list[RangeTable]) -> None:
    """The merged tables are afterwards what they were, and one table merges to itself."""
    before = [shard.frame.clone() for shard in shards]
    RangeTable.merge(shards)
    for shard, frame in zip(shards, before, strict=True):
        assert shard.frame.equals(frame)
    assert RangeTable.merge(shards[:1]) is shards[0]


def test_offset_data_keep_their_variance_through_merging(program: ExportedProgram) -> None:
    """Tables of data near 400 still give the variance to 1% after they were merged one by one."""
    batches = [400.05 + 0.05 * torch.rand(16, 4, generator=torch.Generator().manual_seed(s)) for s in range(20)]
    merged = RangeTable.merge([measured(program, [batch]) for batch in batches])
    x = merged.frame.row(by_predicate=pl.col("node") == "x", named=True)
    exact = float(torch.cat(batches).double().var(correction=0))
    assert x["rms"] ** 2 - x["mean"] ** 2 == pytest.approx(exact, rel=0.01)


def test_batch_numbers_are_counted_on(program: ExportedProgram) -> None:
    """Indices of later tables follow those of earlier ones, skipped batches counted in."""
    first = measured(program, [BATCHES[2], BATCHES[1]], on_nonfinite="skip")
    second = measured(program, [BATCHES[3], BATCHES[2], BATCHES[0]], on_nonfinite="skip")
    merged = RangeTable.merge([first, second])
    x = merged.frame.row(by_predicate=pl.col("node") == "x", named=True)
    assert merged.calibration.skipped == (0, 3)
    assert merged.calibration.batches == 3
    assert x["absmax_batch"] == 4


def test_first_bad_batch_is_the_earliest(program: ExportedProgram) -> None:
    """Of two tables with NaN, the index of the earlier is kept."""
    table = RangeTable.merge([measured(program, [BATCHES[0]]), measured(program, [BATCHES[1], BATCHES[2], BATCHES[2]])])
    log = table.frame.row(by_predicate=pl.col("node") == "log", named=True)
    single = measured(program, [BATCHES[2]]).frame.row(by_predicate=pl.col("node") == "log", named=True)
    assert log["nonfinite_batch"] == 2
    assert log["nan"] == 2 * single["nan"] > 0


def test_table_without_histograms_takes_them_from_the_merged(
    program: ExportedProgram, shards: list[RangeTable]
) -> None:
    """One table without histograms leaves the merged one without, and a warning says so; all else is exact."""
    lean = measured(program, [BATCHES[1]], histogram=False)
    for tables in ([shards[0], lean], [lean, shards[0]]):
        with pytest.warns(UserWarning, match="no histograms"):
            merged = RangeTable.merge(tables)
        assert merged.frame["histogram"].null_count() == len(merged)
    full = RangeTable.merge([shards[1], shards[0]])
    assert_frame_equal(merged.frame.drop("histogram"), full.frame.drop("histogram"), rel_tol=1e-12)


class Other(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 3


def test_merging_tables_of_other_programs_is_refused(shards: list[RangeTable]) -> None:
    """Another graph is named with the table and the node; other weights are refused too; nothing is an error."""
    other = measured(torch.export.export(Other(), (noise(2, 4),)), [noise(2, 4)])
    with pytest.raises(MismatchError, match=r"table 2 is of another program than table 0: node \w+ is only in"):
        RangeTable.merge([shards[0], shards[1], other])
    with pytest.raises(MismatchError, match="table 1 was measured with other weights than table 0"):
        RangeTable.merge([shards[0], measured(exported(bias=1.0), [BATCHES[0]])])
    with pytest.raises(MismatchError, match="nothing to merge"):
        RangeTable.merge([])


def test_table_belongs_to_its_program(program: ExportedProgram, whole: RangeTable) -> None:
    """The program itself, and the same export again, pass without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole.check(program)
        whole.check(exported(), weights="refuse")
    assert whole.fingerprint == whole.calibration.fingerprint


def test_another_program_is_refused_by_its_first_node(whole: RangeTable) -> None:
    """The error names the first node that differs, and what to do."""
    other = torch.export.export(Other(), (noise(2, 4),))
    with pytest.raises(MismatchError, match=r"another program: node x has another .* Calibrate this program"):
        whole.check(other)


def test_other_weights_warn_or_are_refused(whole: RangeTable) -> None:
    """One changed bias warns, is refused when asked, or ignored when asked."""
    other = exported(bias=0.25)
    with pytest.warns(UserWarning, match="other weights"):
        whole.check(other)
    with pytest.raises(MismatchError, match="other weights"):
        whole.check(other, weights="refuse")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole.check(other, weights="ignore")
    with pytest.raises(MismatchError, match="weights='strict': known are 'warn', 'refuse' and 'ignore'"):
        whole.check(other, weights="strict")


def test_summary_counts_what_is_at_risk(whole: RangeTable) -> None:
    """The text of a table says how many tensors, batches, large ones and NaN there are."""
    bad = whole.frame.filter(pl.col("nan") > 0).height
    assert str(whole) == f"RangeTable: {len(whole)} tensors over 7 batches, 0 above 65504, {bad} with NaN or Inf"
    assert bad == 2


def statistics_of(tensors: Sequence[torch.Tensor]) -> Statistics:
    """One row per tensor, straight from the kernel."""
    kernel = HostKernel(histogram=True)
    tallies = [kernel.measure(tensor) for tensor in tensors]
    rows = Statistics.empty(len(tensors), histogram=True)
    for i, tally in enumerate(tallies):
        rows.values[i] = torch.tensor(tally.values, dtype=torch.float64)
        rows.counts[i] = torch.tensor(tally.counts)
        assert rows.histograms is not None
        assert tally.histogram is not None
        rows.histograms[i] = tally.histogram
        rows.batches[i] = 1
    return rows


floats = st.lists(st.floats(width=32, min_value=-(2.0**40), max_value=2.0**40), max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(parts=st.lists(floats, min_size=1, max_size=6), seed=st.randoms(use_true_random=False))
def test_statistics_of_parts_merge_to_those_of_the_whole(parts: list[list[float]], seed: Any) -> None:
    """The statistics of a cut-up tensor, merged in any order, are those of the tensor."""
    expected = statistics_of([torch.tensor(list(itertools.chain(*parts)), dtype=torch.float32)])
    seed.shuffle(parts)
    total = Statistics.empty(1, histogram=True)
    for part in parts:
        total.merge(statistics_of([torch.tensor(part, dtype=torch.float32)]))
    assert torch.equal(total.counts, expected.counts)
    assert torch.equal(total.values[:, :3], expected.values[:, :3])
    assert total.histograms is not None
    assert expected.histograms is not None
    assert torch.equal(total.histograms, expected.histograms)
    added = sum(abs(value) for part in parts for value in part)
    assert float(total.values[0, 3]) == pytest.approx(float(expected.values[0, 3]), abs=1e-6 * added)
    assert float(total.values[0, 4]) == pytest.approx(float(expected.values[0, 4]), rel=1e-5)


def test_statistics_of_nothing_are_neutral() -> None:
    """Merging with the empty statistics, on either side, changes nothing; clearing goes back to them."""
    some = statistics_of([noise(5), torch.tensor([float("nan"), 0.0])])
    empty = Statistics.empty(2, histogram=True)
    left = Statistics.empty(2, histogram=True)
    left.merge(some)
    right = statistics_of([noise(5), torch.tensor([float("nan"), 0.0])])
    right.merge(empty)
    for name, expected in vars(some).items():
        assert torch.equal(vars(left)[name], expected), name
        assert torch.equal(vars(right)[name], expected), name
    left.clear()
    for name, expected in vars(empty).items():
        assert torch.equal(vars(left)[name], expected), name


def test_table_gives_back_the_statistics_it_was_made_of(program: ExportedProgram) -> None:
    """Rows to statistics: counts, extremes and histograms exactly, sums from mean and rms to 1e-12."""
    x = noise(5, 4)
    table = measured(program, [x])
    row = table.frame["node"].to_list().index("x")
    statistics, expected = table.statistics(), statistics_of([x])
    assert statistics.counts[row].tolist() == expected.counts[0].tolist()
    assert len(statistics.counts[row]) == len(COUNTS)
    assert statistics.values[row, :3].tolist() == expected.values[0, :3].tolist()
    assert len(VALUES) == 5
    exact = x.double()
    sums = [float(exact.sum()), float(exact.square().sum())]
    assert statistics.values[row, 3:].tolist() == pytest.approx(sums, rel=1e-12)
    assert statistics.histograms is not None
    assert expected.histograms is not None
    assert torch.equal(statistics.histograms[row], expected.histograms[0])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 200), max_size=300))
def test_sizes_are_counted_up_to_a_limit(sizes: list[int]) -> None:
    """At most 64 sizes are kept, the smallest and the largest always; below that every count is exact."""
    counts: dict[str, int] = {}
    for size in sizes:
        count_size(counts, str(size))
    assert len(counts) <= MAX_SIZES
    if sizes:
        assert {str(min(sizes)), str(max(sizes))} <= set(counts)
    if len(set(sizes)) <= MAX_SIZES:
        assert counts == {str(size): sizes.count(size) for size in sizes}


def test_sizes_of_other_inputs_are_added() -> None:
    """Counts add up per input and dimension, and the merged dicts are new."""
    first = {"x": [{"2": 1, "4": 1}, {"8": 2}]}
    merged = merge_sizes(first, {"x": [{"2": 2}, {"8": 2}], "y": [{"1": 2}]})
    assert merged == {"x": [{"2": 3, "4": 1}, {"8": 4}], "y": [{"1": 2}]}
    assert first == {"x": [{"2": 1, "4": 1}, {"8": 2}]}


def test_hashes_are_kept_up_to_a_limit(whole: RangeTable) -> None:
    """Merging keeps each hash once, and no more than the limit."""
    many = tuple(map(str, range(MAX_HASHES)))
    crowded = replace(whole, calibration=replace(whole.calibration, input_hashes=many))
    merged = RangeTable.merge([whole, crowded])
    assert len(merged.calibration.input_hashes) == MAX_HASHES
    assert merged.calibration.input_hashes[: len(BATCHES)] == whole.calibration.input_hashes
    assert RangeTable.merge([whole, whole]).calibration.input_hashes == whole.calibration.input_hashes


def test_equal_tables_are_equal(program: ExportedProgram, tmp_path: Path) -> None:
    """Row by row, NaN and missing values too; of other data, or no table at all, they are not."""
    first, other = (calibrate(program, data, progress=False) for data in (BATCHES[:2], BATCHES[1:2]))
    first.save(tmp_path / "r.parquet")
    assert RangeTable.load(tmp_path / "r.parquet") == first
    assert first != other
    assert first != "r.parquet"


@pytest.mark.parametrize("name", [*VALUE_MERGES, *HIDDEN_MERGES, *COUNTS])
def test_each_statistic_merges_as_its_name_says(name: str) -> None:
    """2 and 3 become what the declared merge makes of them, and nothing seen changes no number."""
    merge = {**VALUE_MERGES, **HIDDEN_MERGES}.get(name, "sum")
    assert merge in NEUTRAL
    one, other = Statistics.empty(1, False), Statistics.empty(1, False)
    one.column(name).fill_(2)
    other.column(name).fill_(3)
    one.merge(other)
    one.merge(Statistics.empty(1, False))
    assert one.column(name).item() == {"sum": 5, "least": 2, "largest": 3}[merge]
