"""Two calibrations of one model: aligned by name, or by module path and structure, and compared."""

import polars as pl
import pytest
import torch
from calibcast.calib import MismatchError, calibrate
from calibcast.calib.alignment import aligned
from calibcast.calib.range_diff import headroom_text, range_diff
from torch import nn


class Block(nn.Module):
    def __init__(self, extra=False):
        super().__init__()
        self.linear, self.extra = nn.Linear(8, 8), extra

    def forward(self, x):
        hidden = torch.relu(self.linear(x))
        return x + (torch.tanh(hidden) + hidden if self.extra else hidden)


class Net(nn.Module):
    """Blocks in a row; `extra` names those that compute one thing more, `gain` multiplies the input of one."""

    def __init__(self, extra=(), gain=1.0, blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(i in extra) for i in range(blocks))
        self.head, self.gain = nn.Linear(8, 2), gain

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def measured(net=None, scale=1.0, spoil=None, batches=2, rows=4):
    g = torch.Generator().manual_seed(1)
    data = [torch.randn(rows, 8, generator=g) * scale for _ in range(batches)]
    if spoil is not None:
        data[0][0, 0] = spoil
    return calibrate(torch.export.export((net or Net()).eval(), (data[0],)), data, progress=False)


def changes(diff):
    return dict(diff.frame.select("node", "change").iter_rows())


def test_a_table_equals_itself():
    table = measured()
    diff = range_diff(table, table)
    assert diff.same_graph
    assert diff.counts == {"new": 0, "gone": 0, "grew": 0, "shrank": 0, "same": len(table)}
    assert diff.losses().is_empty()
    assert diff.frame["node"].to_list() == table.frame["node"].to_list()


def test_data_ten_times_larger_costs_ten_times_the_headroom():
    diff = range_diff(measured(), measured(scale=10.0))
    row = diff.frame.row(by_predicate=pl.col("node") == "x", named=True)
    assert row["change"] == "grew"
    assert row["growth"] == pytest.approx(10)
    assert row["headroom_old"] == pytest.approx(65504 / row["absmax_old"])
    assert row["headroom_lost"] == pytest.approx(10)
    assert changes(diff)["p_head_weight"] == "same"
    assert set(range_diff(measured(scale=10.0), measured()).frame["change"]) == {"shrank", "same"}


def test_losses_come_with_the_least_headroom_first_and_only_where_it_shrank():
    diff = range_diff(measured(), measured(scale=25000.0))
    losses = diff.losses(below=2)
    assert losses["headroom_new"].is_sorted()
    assert (losses["headroom_new"] < 2).all()
    assert 0 < losses.height < diff.losses().height
    assert range_diff(measured(scale=25000.0), measured(scale=25000.0)).losses(below=2).is_empty()


def test_what_turned_nan_has_no_headroom_left():
    with pytest.warns(UserWarning, match="NaN or Inf"):
        spoilt = measured(spoil=float("nan"))
    diff = range_diff(measured(), spoilt)
    row = diff.frame.row(by_predicate=pl.col("node") == "x", named=True)
    assert (row["change"], row["headroom_new"], row["nonfinite_new"]) == ("grew", 0.0, 1)
    assert "x" in diff.losses(below=2)["node"]


def test_a_layer_in_the_middle_shifts_numbers_and_nothing_else():
    """With one more `add` in block 1, `add_1` and later are other nodes than before, of the same modules."""
    old, new = measured(), measured(Net(extra={1}))
    diff = range_diff(old, new)
    assert not diff.same_graph
    modules = {table: dict(table_.frame.select("node", "module").iter_rows()) for table, table_ in
               (("old", old), ("new", new))}  # fmt: skip
    for node, was in diff.frame.drop_nulls(["node_old", "absmax_new"]).select("node", "node_old").iter_rows():
        assert modules["new"][node] == modules["old"][was]
    pairs = dict(diff.frame.select("node_old", "node").iter_rows())
    assert (pairs["linear_2"], pairs["add_2"]) == ("linear_2", "add_3")
    assert set(diff.frame.filter(pl.col("change") == "new")["op"]) == {"aten.tanh.default", "aten.add.Tensor"}
    assert diff.counts["gone"] == 0


def test_a_module_that_went_is_gone_by_name():
    diff = range_diff(measured(Net(blocks=3)), measured(Net(blocks=2)))
    gone = diff.frame.filter(pl.col("change") == "gone")
    assert set(gone["module"]) == {"blocks.2", "blocks.2.linear"}
    assert gone["absmax_new"].null_count() == gone.height
    assert diff.counts["new"] == 0


def test_another_batch_size_is_the_same_model():
    diff = range_diff(measured(rows=4), measured(rows=6))
    assert not diff.same_graph
    assert diff.counts["new"] == diff.counts["gone"] == 0


def test_old_statistics_stand_under_the_new_names():
    new = measured(Net(extra={0}))
    carried = range_diff(measured(scale=3.0), new).old_as_new
    assert carried.calibration.digests == new.calibration.digests
    frame = carried.frame.join(new.frame, on=["node", "output"], suffix="_new")
    assert frame.height == carried.frame.height
    assert frame["module"].to_list() == frame["module_new"].to_list()
    last = frame.row(by_predicate=pl.col("node") == "x", named=True)
    assert last["absmax"] == pytest.approx(3 * last["absmax_new"])


def test_tables_of_two_models_are_refused():
    other = calibrate(torch.export.export(nn.Conv1d(2, 2, 1), (torch.randn(1, 2, 4),)), [torch.randn(1, 2, 4)])
    with pytest.raises(MismatchError, match="no tensor in common"):
        range_diff(measured(), other)


def test_alike_operators_of_one_module_match_in_long_runs():
    def frame(shapes):
        rows = [(f"add_{i}", 0, "add", "", "activation", [s]) for i, s in enumerate(shapes)]
        return pl.DataFrame(rows, schema=["node", "output", "op", "module", "kind", "shape"], orient="row")

    pairs = aligned(frame("abcdef"), frame("abXcdef"), same_graph=False)
    assert pairs.rows() == [(0, 0), (1, 1), (None, 2), (2, 3), (3, 4), (4, 5), (5, 6)]


@pytest.mark.parametrize(
    ("was", "now", "text"),
    [
        (12.0, 1.3, "block.7: 12x to 1.3x below 65504"),
        (12.0, 0.5, "block.7: 12x below to 2x above 65504"),
        (0.5, 0.1, "block.7: 2x to 10x above 65504"),
        (12.0, 0.0, "block.7: 12x below 65504 to NaN or Inf"),
    ],
)
def test_headroom_is_told_in_words(was, now, text):
    assert headroom_text({"module": "block.7", "node": "n", "headroom_old": was, "headroom_new": now}) == text
