"""`compare`: both graphs in lockstep, every tensor, the culprit told from its victims, in bounded memory."""

import gc
import io
import math
import weakref

import polars as pl
import pytest
import torch
from calibcast.calib.errors import BatchError, MismatchError
from calibcast.calib.graph import tensor_specs
from calibcast.engines.demo import load_digits, pixels_of, train
from calibcast.passes import classify, compare, insert_casts
from torch import fx, nn
from torch.export import Dim

from tests.unmeasured import calibrate


def batches(count=3, size=4, width=8):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(size, width, generator=g) for _ in range(count)]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def compared(export, plan_of):
    """compared(model, data, low, low_type): the comparison of its program, under a plan that makes `low` low."""

    def compared(model, data, low=lambda _: True, low_type=torch.float16, dynamic_shapes=None):
        first = data[0] if isinstance(data[0], tuple) else (data[0],)
        program = export(model, *first, dynamic_shapes=dynamic_shapes)
        return compare(program, insert_casts(program, plan_of(program, low, low_type)), data, progress=False)

    return compared


def row(comparison, node, output=0):
    return comparison.frame.row(by_predicate=(pl.col("node") == node) & (pl.col("output") == output), named=True)


class Offset(nn.Module):
    """Adds a large number and takes it away again: the signal that is left is what rounding left."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.linear(x) + 1000.0 - 1000.0)


def test_the_numbers_are_those_of_the_two_tensors_over_all_batches(export, plan_of):
    program = export(lambda x: torch.tanh(x) * 3, batches()[0])
    data = batches()
    comparison = compare(program, insert_casts(program, plan_of(program, ["mul"])), data, progress=False)
    exact = torch.cat([torch.tanh(x) * 3 for x in data]).double()
    rounded = torch.cat([(torch.tanh(x).half() * 3) for x in data]).double()
    found = row(comparison, "mul")
    ratio = float((rounded - exact).norm() / exact.norm())
    assert found["rel_l2"] == pytest.approx(ratio, rel=1e-12)
    assert found["sqnr_db"] == pytest.approx(-20 * math.log10(ratio), rel=1e-12)
    assert found["max_abs"] == float((rounded - exact).abs().max())
    assert found["absmax"] == float(rounded.abs().max())
    assert found["absmax_reference"] == float(exact.abs().max())
    assert (found["dtype"], found["dtype_reference"]) == ("float16", "float32")
    assert (found["elements"], comparison.batches) == (96, 3)
    assert row(comparison, "tanh")["sqnr_db"] == math.inf


def test_every_tensor_has_a_row_with_the_names_that_calibration_gives(export, plan_of):
    program = export(Offset(), batches()[0])
    comparison = compare(program, insert_casts(program, plan_of(program, ["linear"])), batches(), progress=False)
    names = ("node", "output", "op", "module", "source", "kind")
    rows = {tuple(getattr(spec, name) for name in names) for spec in tensor_specs(program, lambda _: True)}
    assert set(comparison.frame.select(names).rows()) == rows
    weight = row(comparison, "p_linear_weight")
    assert (weight["dtype"], weight["dtype_reference"]) == ("float16", "float32")
    assert weight["elements"] == 64  # once, not once a batch
    assert row(comparison, "linear")["module"] == "linear"


class Sorted(nn.Module):
    """Keys 0.01 apart on an offset of 3000, where fp16 is 2 apart: nearly every index of the sort is another one."""

    def forward(self, keys, values, rows):
        order = torch.argsort(keys + 3000.0, stable=True)
        early = keys > 0.5
        return values[order] * 2, order, early, torch.where(early, 1, 0).sum(), rows + 1


def sorted_inputs():
    g = torch.Generator().manual_seed(0)
    return torch.randperm(100, generator=g) * 0.01, torch.randn(100, generator=g), torch.arange(4)


def test_integers_and_booleans_have_rows_with_the_share_that_differs(compared):
    x = sorted_inputs()
    comparison = compared(Sorted(), [x, x])
    theirs = torch.argsort(x[0] + 3000.0, stable=True)
    mine = torch.argsort((x[0].half() + 3000.0), stable=True)
    found = row(comparison, "argsort")
    assert found["changed"] == float((mine != theirs).double().mean()) > 0.9
    assert found["max_abs"] == float((mine - theirs).abs().max())
    assert (found["dtype"], found["dtype_reference"], found["elements"]) == ("int64", "int64", 200)
    assert (found["sqnr_db"], found["rel_l2"], found["nonfinite"]) == (None, None, 0)
    early = row(comparison, "gt")
    assert (early["dtype"], early["changed"]) == ("bool", float(((x[0].half() > 0.5) != (x[0] > 0.5)).double().mean()))
    assert (row(comparison, "rows")["changed"], row(comparison, "add_1")["changed"]) == (0.0, 0.0)
    assert row(comparison, "index")["changed"] is None
    assert comparison.frame.filter(pl.col("changed").is_null() == pl.col("sqnr_db").is_null()).height == 0


def test_wrong_indices_are_told_and_what_they_pick_is_their_victim(compared):
    """The sort is where error enters, or the sum that it reads: not the gather, all of whose numbers are exact."""
    x = sorted_inputs()
    comparison = compared(Sorted(), [x])
    assert row(comparison, "index")["sqnr_db"] < 10
    assert "index" not in comparison.culprits["node"].to_list()
    assert "argsort" in comparison.frame["node"].to_list()[:4]  # among the worst, where its share puts it
    line = next(line for line in str(comparison).splitlines() if "argsort" in line)
    assert f"{row(comparison, 'argsort')['changed']:.2%} !=" in line
    # With an exact sum nothing but the comparison of keys with 0.5 has lost anything.
    exact = compared(Sorted(), [x], low=lambda name: name == "mul")
    assert row(exact, "argsort")["changed"] == 0.0
    assert "argsort" not in exact.culprits["node"].to_list()


def test_a_node_that_turns_rounding_into_other_integers_is_a_culprit(compared):
    """Whole numbers and a half: what fp16 makes of 2.5 and 3000.5 is another integer."""
    comparison = compared(lambda x: (x * 3.0).round().to(torch.int64), [torch.arange(64.0) * 50 + 0.1667])
    (culprit,) = comparison.culprits["node"].to_list()
    assert culprit in {"round_1", "to"}
    found = row(comparison, "to")
    assert found["changed"] > 0.5
    assert found["input_sqnr_db"] > 50


def test_complex_tensors_have_rows_like_others(compared):
    comparison = compared(lambda x: torch.fft.rfft(x * 1.5).abs(), [torch.randn(4, 16)])
    found = row(comparison, "fft_rfft")
    assert found["dtype"] == "complex64"
    assert 50 < found["sqnr_db"] < 90


def test_the_worst_tensor_comes_first(compared):
    comparison = compared(Offset(), batches())
    finite = comparison.frame["sqnr_db"].to_list()
    assert finite == sorted(finite)
    assert comparison.frame["node"][0] in {"sub", "tanh"}


def test_the_culprit_is_told_from_its_victims(compared):
    """`sub` takes the offset away, and what is left is noise; `tanh` merely shows it."""
    comparison = compared(Offset(), batches())
    assert comparison.culprits["node"].to_list() == ["sub"]
    assert row(comparison, "sub")["input_sqnr_db"] > 60
    assert row(comparison, "sub")["loss_db"] > 40
    assert row(comparison, "tanh")["sqnr_db"] < 30
    assert row(comparison, "tanh")["loss_db"] < 10


def test_rounding_alone_is_no_loss(compared):
    for low_type, least in ((torch.float16, 65), (torch.bfloat16, 45)):
        comparison = compared(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), batches(), low_type=low_type)
        assert not comparison.culprits.height
        assert comparison.frame["sqnr_db"].min() > least


def test_the_first_nonfinite_node_is_named_with_module_line_and_batch(compared):
    class Energy(nn.Module):
        def forward(self, x):
            return (x * x).sqrt().add(1.0).log()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = Energy()

        def forward(self, x):
            return self.energy(x * 2)

    small, large = torch.ones(2, 3), torch.tensor([[200.0, 1, 1], [1, 1, 1]])
    comparison = compared(Net(), [small, large, large])
    first = comparison.first_nonfinite
    assert (first.node, first.output, first.module, first.dtype) == ("mul_1", 0, "energy", "float16")
    assert (first.batch, first.elements, first.absmax_reference) == (1, 2, 160000.0)
    assert first.source.split(":")[0].endswith("test_compare.py")
    assert comparison.culprits["node"].to_list() == ["mul_1"]
    assert comparison.culprits["loss_db"].to_list() == [math.inf]
    found = row(comparison, "mul_1")
    assert (found["nonfinite"], found["nonfinite_reference"], found["first_nonfinite_batch"]) == (2, 0, 1)
    assert "mul_1 (aten.mul.Tensor, energy, " in str(comparison)


def test_what_is_nonfinite_in_the_program_too_is_not_held_against_the_cast_graph(compared):
    comparison = compared(lambda x: torch.log(torch.relu(x)).exp() + 1, batches())
    assert comparison.first_nonfinite is None
    found = row(comparison, "log")
    assert found["nonfinite"] == found["nonfinite_reference"] > 0
    assert (found["nonfinite_alone"], found["first_nonfinite_batch"]) == (0, None)
    assert found["sqnr_db"] > 50


def test_an_equal_program_differs_nowhere(export):
    program = export(Offset(), batches()[0])
    comparison = compare(program, program, batches(), progress=False)
    assert set(comparison.frame["sqnr_db"]) == {math.inf}
    assert set(comparison.frame["loss_db"]) == {0.0}
    assert "0 differ" in str(comparison)


def test_tensors_written_in_place_are_compared_before_the_next_write(compared):
    def function(x):
        y = x * 3
        y[:, 0].mul_(1e5)  # beyond fp16
        return y.clamp_(-1, 1)

    comparison = compared(function, batches())
    assert row(comparison, "mul")["absmax_reference"] < 20
    assert row(comparison, "mul_")["absmax_reference"] > 1e5
    assert comparison.first_nonfinite.node == "mul_"


def test_a_reader_of_written_storage_is_no_culprit(compared):
    """`add` reads `mul`, into which a view has written inf since."""

    def function(x):
        y = x * 3
        y[:, 0].mul_(1e5)
        return y + 1

    comparison = compared(function, batches())
    assert row(comparison, "add")["input_sqnr_db"] == -math.inf
    assert comparison.culprits["node"].to_list() == ["mul_"]


def test_the_program_and_its_buffers_stay_as_they_were(export, plan_of):
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(8))

        def forward(self, x):
            self.seen.add_(x.sum(0))
            return x + self.seen

    program = export(Counter(), batches()[0])
    mixed = insert_casts(program, plan_of(program, lambda _: True))
    before = [{k: v.clone() for k, v in p.state_dict.items()} for p in (program, mixed)]
    first = compare(program, mixed, batches(), progress=False)
    assert first.frame.equals(compare(program, mixed, batches(), progress=False).frame)
    for p, state in zip((program, mixed), before, strict=True):
        assert all(torch.equal(p.state_dict[k], v) for k, v in state.items())


class Regions(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            y = torch.relu(x) * 2
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = self.linear(y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.linear(z.float())
            with torch.autocast("cpu", enabled=False):
                z = z.float() + y
        return z * 0.5


@pytest.mark.parametrize("all_low", [True, False])
def test_nodes_of_regions_are_compared_under_their_qualified_names(export, plan_of, all_low):
    program = export(Regions(), batches()[0])
    plan = plan_of(program, lambda _: all_low)
    mixed = insert_casts(program, plan)
    comparison = compare(program, mixed, batches(), progress=False)
    assert {"submod_3.relu", "submod_3.submod_1.linear", "submod_1.linear_1", "submod_1.submod_1.add", "mul_1"} <= set(
        comparison.frame["node"]
    )
    assert comparison.frame["dtype"].null_count() == 0
    assert row(comparison, "submod_3.relu")["dtype"] == ("float16" if all_low else "float32")
    assert row(comparison, "submod_1.linear_1")["dtype"] == row(comparison, "submod_1.linear_1")["dtype_reference"]
    # What a node reads is found through region operands and results.
    inside = row(comparison, "submod_1.submod_1.add")
    assert row(comparison, "mul_1")["input_sqnr_db"] == inside["sqnr_db"]
    assert inside["input_sqnr_db"] <= row(comparison, "submod_3.mul")["sqnr_db"]
    assert (inside["input_sqnr_db"] == math.inf) is not all_low


def test_what_a_region_sets_does_not_leak_into_the_other_graph(export, plan_of):
    """Both graphs enter their autocast regions in turns; outside of them nothing is cast."""
    program = export(Regions(), batches()[0])
    comparison = compare(program, insert_casts(program, plan_of(program, ())), batches(), progress=False)
    assert set(comparison.frame["sqnr_db"]) == {math.inf}
    assert not torch.is_autocast_enabled("cpu")


def test_a_saved_and_loaded_cast_graph_is_compared_as_well(export, plan_of):
    program = export(Regions(), batches()[0])
    mixed = insert_casts(program, plan_of(program, lambda _: True))
    stream = io.BytesIO()
    torch.export.save(mixed, stream)
    stream.seek(0)
    loaded = torch.export.load(stream)
    first, second = (compare(program, m, batches(), progress=False) for m in (mixed, loaded))
    assert first.frame.equals(second.frame)


def test_each_output_of_a_node_has_its_row(compared):
    def function(x):
        first, second = x.split(4, -1)
        values, places = (first + second).topk(2, -1)
        return values * 2, places

    comparison = compared(function, batches())
    assert row(comparison, "split", 1)["sqnr_db"] > 60
    assert sorted(comparison.frame.filter(pl.col("node") == "topk")["output"].to_list()) == [0, 1]
    assert (row(comparison, "topk", 0)["changed"], row(comparison, "topk", 1)["sqnr_db"]) == (None, None)
    assert row(comparison, "mul")["input_sqnr_db"] == row(comparison, "topk")["sqnr_db"]
    assert row(comparison, "add")["input_sqnr_db"] == min(row(comparison, "split", i)["sqnr_db"] for i in range(2))


def test_batch_sizes_and_lengths_may_vary(compared):
    data = [torch.randn(size, length, generator=torch.manual_seed(size)) for size, length in ((4, 6), (2, 9), (7, 3))]
    shapes = (({0: Dim("batch", max=64), 1: Dim("length", max=64)},),)
    comparison = compared(lambda x: torch.softmax(x, -1) * x.shape[1], data, dynamic_shapes=shapes)
    assert row(comparison, "softmax")["elements"] == sum(x.numel() for x in data)
    assert set(comparison.frame["unlike"]) == {0}


def test_assertions_that_insertion_dropped_are_no_difference(compared, export):
    def function(x):
        return (x * 2).to(torch.float32) + 1

    program = export(function, batches()[0])
    assert any("_assert_tensor_metadata" in str(n.target) for n in program.graph.nodes)
    assert row(compared(function, batches()), "mul")["dtype"] == "float16"


def test_sizes_that_depend_on_data_and_differ_are_counted_and_not_compared(compared):
    """1.0001 is 1 in fp16, and so are no longer greater than 1."""
    comparison = compared(lambda x: x[x * 1.0 > 1.0] * 2, [torch.tensor([1.0001, 3.0]), torch.tensor([0.5, 3.0])])
    assert row(comparison, "index")["unlike"] == 1
    assert row(comparison, "index")["elements"] == 1
    assert comparison.frame["unlike"][0] == 1


def test_a_weight_that_vanishes_is_where_error_enters(compared):
    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.full((8,), 1e-8))

        def forward(self, x):
            return x * self.gain * 1e8

    comparison = compared(Faint(), batches())
    assert comparison.culprits["node"][0] == "p_gain"
    assert row(comparison, "p_gain")["sqnr_db"] == 0.0


def test_large_tensors_are_compared_in_pieces_and_whatever_their_strides(compared):
    x = torch.randn(3, 1400, 700, generator=torch.manual_seed(0))
    comparison = compared(lambda x: (x.transpose(1, 2) * 1.1).permute(2, 0, 1).expand(1400, 3, 700), [x])
    mine, exact = (x.half() * 1.1).double(), (x * 1.1).double()
    for node in ("mul", "permute", "expand"):
        assert row(comparison, node)["rel_l2"] == pytest.approx(float((mine - exact).norm() / exact.norm()), rel=1e-9)
        assert row(comparison, node)["elements"] == x.numel()


@pytest.mark.parametrize("depth", [4, 40])
def test_no_more_tensors_live_at_once_in_a_deep_network_than_in_a_shallow_one(compared, monkeypatch, depth):
    """The two graphs hold what their next nodes read, and the comparison one piece: not the activations of a batch."""
    size, most, live = 300_000, 0, weakref.WeakSet()

    def run_node(self, node, original=fx.Interpreter.run_node):
        nonlocal most
        result = original(self, node)
        if isinstance(result, torch.Tensor) and result.numel() == size and node.op == "call_function":
            live.add(result)
        most = max(most, len(live))
        return result

    monkeypatch.setattr(fx.Interpreter, "run_node", run_node)
    gc.disable()  # by reference counts alone
    try:
        compared(nn.Sequential(*[nn.ReLU() for _ in range(depth)]), [torch.randn(3, size // 3) for _ in range(3)])
    finally:
        gc.enable()
    assert 3 <= most <= 6


def test_another_program_is_refused_with_what_differs(export, plan_of):
    program = export(Offset(), batches()[0])
    other = export(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), batches()[0])
    with pytest.raises(MismatchError, match="not made from this program: it lacks node p_linear_weight"):
        compare(program, other, batches())
    longer = export(lambda x: torch.relu(x) + 1, batches()[0])
    shorter = export(lambda x: torch.relu(x), batches()[0])
    with pytest.raises(MismatchError, match="the program lacks its node add"):
        compare(shorter, longer, batches())
    with pytest.raises(MismatchError, match=r"node mul .* is aten.mul.Tensor in the program"):
        compare(export(lambda x: x * x, batches()[0]), _renamed(export(lambda x: x + x, batches()[0])), batches())
    half = export(lambda x: torch.relu(x), batches()[0].half())
    with pytest.raises(MismatchError, match=r"input .* is float32.* in the program and float16"):
        compare(shorter, half, batches())


def _renamed(program):
    for node in program.graph.nodes:
        if node.name == "add":
            node.name = "mul"
    return program


def test_a_batch_that_does_not_fit_is_named(export, plan_of):
    program = export(Offset(), batches()[0])
    mixed = insert_casts(program, plan_of(program, ["linear"]))
    with pytest.raises(BatchError, match=r"batch 1, argument x: .*dimension 1 is 5, not 8"):
        compare(program, mixed, [torch.randn(4, 8), torch.randn(4, 5)])
    with pytest.raises(BatchError, match="gave no batch"):
        compare(program, mixed, [])
    assert compare(program, mixed, [(x, "label") for x in batches()], lambda b: b[0], max_batches=2).batches == 2


def test_a_node_that_fails_is_named_with_its_batch(export, plan_of):
    program = export(lambda x, i: (x * 2)[i], torch.randn(4), torch.tensor([0, 1]))
    mixed = insert_casts(program, plan_of(program, ["mul"]))
    with pytest.raises(BatchError, match=r"batch 1 .*node index .* raised IndexError"):
        compare(program, mixed, [(torch.randn(4), torch.tensor(i)) for i in ([0, 1], [0, 9])])


def test_a_trained_network_that_fp16_breaks(export):
    """Digits classified with squares of raw pixels: everything in fp16 overflows in one sum; the plan does not."""
    training, calibration, held = load_digits()
    data = [pixels_of(batch) for batch in held]
    program = torch.export.export(
        train(training, epochs=3), (data[0],), dynamic_shapes={"pixels": {0: Dim("batch", max=1024)}}
    )
    whole = insert_casts(program, classify(program, None, nodes_to_include=[".*"]))
    comparison = compare(program, whole, data, progress=False)
    assert comparison.first_nonfinite.node == "sum_1"
    assert "sum_1" in comparison.culprits["node"].to_list()
    assert "linear" not in comparison.culprits["node"].to_list()
    ranges = calibrate(program, calibration, transform=pixels_of, progress=False)
    mended = compare(program, insert_casts(program, classify(program, ranges)), data, progress=False)
    assert mended.first_nonfinite is None
    assert mended.frame.filter(pl.col("kind") == "activation")["sqnr_db"].min() > 40


def test_the_report_fits_a_terminal(compared):
    text = str(compared(Offset(), batches()))
    assert text.startswith("Comparison: 3 batches, ")
    assert "where error enters" in text
    assert max(map(len, text.splitlines()[1:])) <= 100
    assert len(text.splitlines()) < 35


def test_mask_values_mean_the_same_however_low_they_are(export, plan_of):
    """A sentinel of -3.4e38 is saturated in fp16: neither is it an error, nor does it drown the scores beside it."""

    def function(x):
        seen = torch.ones(8, 8).tril() > 0
        additive = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        return torch.softmax((x * 1.5) + additive, -1)

    program = export(function, torch.randn(8, 8))
    mixed = insert_casts(program, plan_of(program, ["mul", "add", "softmax"]))
    comparison = compare(program, mixed, [torch.randn(8, 8)], progress=False)
    assert row(comparison, "add")["dtype"] == "float16"
    assert row(comparison, "add")["sqnr_db"] > 60
    assert row(comparison, "add")["absmax_reference"] < 100
    assert comparison.first_nonfinite is None
    assert not comparison.culprits.height


def test_tensors_without_elements_do_not_differ() -> None:
    class Empty(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x * 2, x.long()[:0], (x * 2)[:0]

    program = torch.export.export(Empty(), (torch.randn(4),))
    found = compare(program, program, [torch.randn(4)], progress=False)
    assert ", 0 differ from the program" in str(found)
