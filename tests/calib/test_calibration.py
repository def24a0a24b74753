"""`calibrate`: which tensors have a row, what the rows say, and what stays as it was."""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from operator import getitem
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib import BatchError, CalibcastError, RangeTable, calibrate
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils.data import DataLoader, TensorDataset

REGIONS = {"wrap_with_autocast", "wrap_with_set_grad_enabled"}
# fmt: off
COLUMNS = [
    "node", "output", "op", "module", "source", "kind", "dtype", "shape", "batches", "elements", "min", "max",
    "absmax", "smallest", "mean", "rms", "nan", "posinf", "neginf", "zeros", "masked", "absmax_batch",
    "nonfinite_batch", "histogram",
]
# fmt: on


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def measured(program: ExportedProgram, batches: Any, **options: Any) -> RangeTable:
    return calibrate(program, batches, progress=False, **options)


def row(table: RangeTable, node: str, output: int = 0) -> dict[str, Any]:
    return table.frame.row(by_predicate=(pl.col("node") == node) & (pl.col("output") == output), named=True)


def rows_of(program: ExportedProgram) -> list[tuple[str, int]]:
    """Every floating tensor that nodes of the program and of its regions make, found without calib."""
    found = []
    for path, graph_module in program.graph_module.named_modules():
        assert isinstance(graph_module, fx.GraphModule)
        for node in graph_module.graph.nodes:
            makes = node.op == "call_function" and node.target is not getitem
            if (node.op == "placeholder" and not path) or (makes and node.target.__name__ not in REGIONS):
                value = node.meta.get("val")
                items = value if isinstance(value, (tuple, list)) else [value]
                found += [
                    (f"{path}.{node.name}".lstrip("."), output)
                    for output, item in enumerate(items)
                    if isinstance(item, torch.Tensor) and item.dtype.is_floating_point
                ]
    return found


class Everything(nn.Module):
    """Inputs, parameters, buffers, constants, several outputs, nested autocast and no_grad regions, integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("scale", torch.full((8,), 3.0))
        self.register_buffer("offset", torch.full((8,), 0.5), persistent=False)
        self.constant = torch.full((8,), -7.0)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, (hidden, cell) = self.rnn(self.embedding(ids) * mask)
        x = self.norm(x[:, 0] * self.scale + self.offset) + self.constant
        with torch.autocast("cpu", torch.bfloat16):
            y = self.linear(x) + torch.tensor([1.5])
            with torch.autocast("cpu", enabled=False):
                y = self.linear(y.float())
                y, _ = y.topk(4)
        with torch.no_grad():
            y = y.relu()
            best, where = y.max(-1)
        left, middle, right = x.split([2, 2, 4], -1)
        return y, best, where, left + middle, right, hidden[-1] + cell[-1]


@pytest.fixture(scope="module")
def everything() -> ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Everything().eval(), everything_batch(0))


def everything_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 10, (2, 5), generator=generator), torch.rand(2, 5, 1, generator=generator)


@pytest.fixture(scope="module")
def everything_table(everything: ExportedProgram) -> RangeTable:
    return measured(everything, [everything_batch(seed) for seed in range(3)])


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


@pytest.fixture(scope="module")
def mlp() -> ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Mlp(), (noise(2, 4),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))


def test_every_floating_tensor_has_one_row(everything: ExportedProgram, everything_table: RangeTable) -> None:
    """Inputs, weights, buffers, constants and all outputs of all nodes, inside regions too, each exactly once."""
    rows = everything_table.frame.select("node", "output").rows()
    assert len(rows) == len(set(rows))
    assert sorted(rows) == sorted(rows_of(everything))
    assert everything_table.frame["batches"].min() == 1


def test_rows_have_the_columns_of_the_contract(everything_table: RangeTable) -> None:
    """The frame has exactly the documented columns, in their order."""
    assert everything_table.frame.columns == COLUMNS
    assert all(len(histogram) == 256 for histogram in everything_table.frame["histogram"])


def test_no_row_for_what_only_passes_on(everything_table: RangeTable) -> None:
    """`getitem` and regions have no row, integer tensors neither."""
    assert not everything_table.frame["op"].str.contains("getitem|wrap_with").any()
    assert not everything_table.frame["node"].is_in(["ids"]).any()
    assert set(everything_table.frame["dtype"]) == {"float32", "bfloat16"}


def test_kinds_tell_where_a_tensor_comes_from(everything_table: RangeTable) -> None:
    """Inputs, parameters, buffers (persistent or not) and constants (attributes or literals) are told apart."""
    kinds = dict(everything_table.frame.select("node", "kind").rows())
    assert kinds["mask"] == "input"
    assert kinds["p_linear_weight"] == "parameter"
    assert kinds["b_scale"] == kinds["b_offset"] == kinds["b_norm_running_var"] == "buffer"
    assert kinds["c_constant"] == kinds["c_lifted_tensor_0"] == "constant"
    assert kinds["lstm"] == "activation"


def test_rows_name_module_and_source(everything_table: RangeTable) -> None:
    """A row says in which module and on which line of the user's code its node was written."""
    add = row(everything_table, "add_1")
    assert row(everything_table, "batch_norm")["module"] == "norm"
    assert add["module"] == ""
    assert add["source"].rpartition(":")[0] == __file__
    assert row(everything_table, "p_rnn_weight_ih_l0")["module"] == "rnn"


def outputs(table: RangeTable, op: str) -> list[int]:
    return table.frame.filter(pl.col("op") == op)["output"].to_list()


def test_multi_output_nodes_have_a_row_per_floating_output(everything_table: RangeTable) -> None:
    """split and lstm have three rows; topk and max.dim one, as their indices are integers."""
    assert outputs(everything_table, "aten.split_with_sizes.default") == [0, 1, 2]
    assert outputs(everything_table, "aten.lstm.input") == [0, 1, 2]
    assert outputs(everything_table, "aten.topk.default") == [0]
    assert outputs(everything_table, "aten.max.dim") == [0]


def test_nested_regions_are_measured_in_their_own_types(everything_table: RangeTable) -> None:
    """In autocast a linear gives bfloat16; in the region inside that switches it off, float32."""
    linears = everything_table.frame.filter(pl.col("op") == "aten.linear.default")
    assert dict(linears.select("node", "dtype").rows()) == {
        "submod_1.linear": "bfloat16",
        "submod_1.submod_1.linear_1": "float32",
    }


class Halfway(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return self.linear(x).float() + 1


def test_values_inside_a_region_are_those_of_eager() -> None:
    """A node in an autocast region inside a no_grad region has the range that the eager model gives there."""
    torch.manual_seed(0)
    model = Halfway().eval()
    table = measured(torch.export.export(model, (noise(3, 4),)), [noise(3, 4, seed=1)])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model.linear(noise(3, 4, seed=1))
    found = table.frame.filter(pl.col("op") == "aten.linear.default").row(0, named=True)
    assert expected.dtype == torch.bfloat16
    assert (found["min"], found["max"]) == (float(expected.min()), float(expected.max()))


def test_ranges_over_batches_are_those_of_all_data(mlp: ExportedProgram) -> None:
    """Statistics of several batches are those of their concatenation; a weight counts once."""
    batches = [noise(size, 4, seed=size) * size for size in (2, 5, 3)]
    table = measured(mlp, batches)
    x = torch.cat(batches).double()
    found, weight = row(table, "x"), row(table, "p_first_weight")
    assert (found["batches"], found["elements"]) == (3, x.numel())
    assert (found["min"], found["max"], found["absmax"]) == (float(x.min()), float(x.max()), float(x.abs().max()))
    assert found["smallest"] == float(x.abs().min())
    assert found["mean"] == pytest.approx(float(x.mean()), rel=1e-5)
    assert found["rms"] == pytest.approx(float(x.square().mean().sqrt()), rel=1e-6)
    assert (weight["batches"], weight["elements"]) == (1, 32)


def test_absmax_batch_is_the_first_with_the_peak(mlp: ExportedProgram) -> None:
    """The batch that made the peak is named by its index, the earlier of two equal ones."""
    small, large = noise(2, 4), noise(2, 4) * 100
    table = measured(mlp, [small, large, small, large])
    assert row(table, "x")["absmax_batch"] == 1
    assert row(table, "linear")["absmax_batch"] == 1
    assert row(measured(mlp, [large, small]), "x")["absmax_batch"] == 0


def test_offset_data_keep_their_variance_in_the_table(mlp: ExportedProgram) -> None:
    """Over many batches near 400, rms squared less mean squared is the variance to 1%."""
    batches = [400.05 + 0.05 * torch.rand(64, 4, generator=torch.Generator().manual_seed(s)) for s in range(8)]
    found = row(measured(mlp, batches), "x")
    exact = float(torch.cat(batches).double().var(correction=0))
    assert found["rms"] ** 2 - found["mean"] ** 2 == pytest.approx(exact, rel=0.01)


class Attending(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ x.transpose(1, 2), -1) @ x


def test_batch_and_length_may_vary() -> None:
    """With dynamic dimensions batches of any size merge, and the sizes seen are counted per dimension."""
    shapes = ({0: Dim("batch", min=1, max=16), 1: Dim("length", min=2, max=32)},)
    program = torch.export.export(Attending(), (noise(2, 6, 4),), dynamic_shapes=shapes)
    sizes = [(2, 6), (3, 6), (2, 9), (2, 9)]
    table = measured(program, [noise(*size, 4, seed=i) for i, size in enumerate(sizes)])
    assert table.calibration.input_sizes == {"x": [{"2": 3, "3": 1}, {"6": 2, "9": 2}, {"4": 4}]}
    assert row(table, "softmax")["elements"] == sum(b * n * n for b, n in sizes)
    assert row(table, "matmul_1")["elements"] == sum(b * n * 4 for b, n in sizes)
    assert row(table, "x")["shape"][2] == "4"
    assert len(set(row(table, "softmax")["shape"])) == 2


class Counting(nn.Module):
    """Changes a buffer, its input, and a buffer through a view of it, each time that it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("memory", torch.zeros(2, 4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        self.memory[0].copy_(x[0])
        return self.linear(x.mul_(2)) + self.calls + self.memory


def test_program_and_inputs_are_left_bit_identical() -> None:
    """Mutated buffers, weights, the state dict and the user's input tensors are afterwards what they were."""
    torch.manual_seed(0)
    program = torch.export.export(Counting().eval(), (noise(2, 4),))
    state = {**program.state_dict, **program.constants}
    before = {name: (tensor, tensor.detach().clone(), tensor.requires_grad) for name, tensor in state.items()}
    batches = [noise(2, 4, seed=seed) for seed in range(3)]
    table = measured(program, batches)
    after = {**program.state_dict, **program.constants}
    assert list(after) == list(before)
    for name, (tensor, copy, requires_grad) in before.items():
        assert after[name] is tensor
        assert torch.equal(tensor, copy)
        assert (tensor.requires_grad, tensor.grad) == (requires_grad, None)
    for seed, batch in enumerate(batches):
        assert torch.equal(batch, noise(2, 4, seed=seed))
    assert row(table, "b_calls")["max"] == 0


def test_every_batch_starts_from_the_saved_state() -> None:
    """What one batch wrote into a buffer is not there for the next: its row says 1 however many batches ran."""
    program = torch.export.export(Counting().eval(), (noise(2, 4),))
    table = measured(program, [noise(2, 4)] * 5)
    assert (row(table, "add_")["min"], row(table, "add_")["max"], row(table, "add_")["batches"]) == (1.0, 1.0, 5)


def test_program_computes_the_same_afterwards(everything: ExportedProgram) -> None:
    """Calibration between two calls of a program does not change their results."""
    module, batch = everything.module(), everything_batch(7)
    before = module(*batch)
    measured(everything, [everything_batch(8)])
    for first, second in zip(before, everything.module()(*batch), strict=True):
        assert torch.equal(first, second)


def test_weights_and_inputs_that_require_grad_get_none(mlp: ExportedProgram) -> None:
    """No gradient is recorded or left behind, also when the input is a leaf that wants one."""
    x = noise(2, 4).requires_grad_()
    with torch.enable_grad():
        table = measured(mlp, [x])
        assert torch.is_grad_enabled()
    assert x.grad is None
    assert row(table, "x")["elements"] == 8
    assert all(parameter.grad is None for parameter in mlp.state_dict.values())


def test_without_histogram_other_columns_are_the_same(mlp: ExportedProgram) -> None:
    """`histogram=False` leaves that column null and changes no other."""
    batches = [noise(2, 4), noise(3, 4)]
    full, lean = measured(mlp, batches).frame, measured(mlp, batches, histogram=False).frame
    assert lean["histogram"].null_count() == len(lean)
    assert lean.drop("histogram").equals(full.drop("histogram"))


def test_histograms_add_up_to_the_elements(everything_table: RangeTable) -> None:
    """In every row the bins sum to the number of elements."""
    sums = everything_table.frame["histogram"].list.sum()
    assert (sums == everything_table.frame["elements"]).all()


def test_max_batches_stops_early(mlp: ExportedProgram) -> None:
    """After `max_batches` the dataloader is not asked for more."""
    asked = []

    def endless() -> Iterator[torch.Tensor]:
        for seed in itertools.count():
            asked.append(seed)
            yield noise(2, 4, seed=seed)

    table = measured(mlp, endless(), max_batches=3)
    assert table.calibration.batches == 3
    assert asked == [0, 1, 2]


def test_real_dataloader_is_calibrated(mlp: ExportedProgram) -> None:
    """A DataLoader gives lists; a smaller last batch is fine where the dimension is dynamic."""
    data = noise(10, 4)
    table = measured(mlp, DataLoader(TensorDataset(data), batch_size=4))
    assert table.calibration.batches == 3
    assert row(table, "x")["max"] == float(data.max())


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_silent_without_a_terminal(
    progress: bool, mlp: ExportedProgram, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where standard error is no terminal, no bar is drawn."""
    calibrate(mlp, [noise(2, 4)], progress=progress)
    assert capfd.readouterr() == ("", "")


def test_explicit_device_is_the_programs_own(mlp: ExportedProgram) -> None:
    """`device="cpu"` of a program on the CPU changes nothing."""
    assert measured(mlp, [noise(2, 4)], device="cpu").frame.equals(measured(mlp, [noise(2, 4)]).frame)


class Logarithm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2).log() + 1


@pytest.fixture(scope="module")
def logarithm() -> ExportedProgram:
    return torch.export.export(Logarithm(), (torch.ones(4),))


GOOD, BAD = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, -2.0, 0.0, 4.0])


def test_nonfinite_values_are_recorded_and_told(logarithm: ExportedProgram) -> None:
    """By default NaN and Inf are counted beside the finite range, and a warning names first node and batch."""
    with pytest.warns(UserWarning, match=r"batch 2 at node log \(.*test_calibration.py:\d+\): 2 nan, 2 neginf"):
        table = measured(logarithm, [GOOD, GOOD, BAD, BAD])
    found = row(table, "log")
    assert (found["nan"], found["neginf"], found["posinf"], found["nonfinite_batch"]) == (2, 2, 0, 2)
    assert (found["min"], found["max"]) == (pytest.approx(math.log(2)), pytest.approx(math.log(8)))
    finite = [math.log(2 * x) for x in [1, 2, 3, 4] * 2 + [1, 4] * 2]
    assert found["mean"] == pytest.approx(math.fsum(finite) / len(finite), rel=1e-6)
    assert found["elements"] == 16
    assert row(table, "mul")["nonfinite_batch"] is None
    assert table.calibration.skipped == ()


def test_row_where_nothing_was_finite_has_no_range(logarithm: ExportedProgram) -> None:
    """A tensor that was NaN throughout has counts and null for every number over finite values."""
    with pytest.warns(UserWarning, match="batch 0 at node log"):
        table = measured(logarithm, [-GOOD])
    found = row(table, "log")
    assert (found["nan"], found["elements"], found["nonfinite_batch"]) == (4, 4, 0)
    for name in ("min", "max", "absmax", "smallest", "mean", "rms", "absmax_batch"):
        assert found[name] is None, name


def test_finite_data_warn_of_nothing(logarithm: ExportedProgram) -> None:
    """No warning comes where nothing was NaN or Inf."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = measured(logarithm, [GOOD])
    assert row(table, "log")["nonfinite_batch"] is None


def test_skip_leaves_bad_batches_out_whole(logarithm: ExportedProgram, caplog: pytest.LogCaptureFixture) -> None:
    """A skipped batch leaves no trace in any row, is listed by its index, and later batches keep their numbers."""
    with caplog.at_level(logging.WARNING, logger="calibcast"):
        table = measured(logarithm, [BAD, GOOD, BAD * 100, GOOD * 3], on_nonfinite="skip")
    good = measured(logarithm, [GOOD, GOOD * 3])
    assert table.calibration.skipped == (0, 2)
    assert table.calibration.batches == 2
    assert table.calibration.input_sizes == good.calibration.input_sizes
    assert table.frame.drop("absmax_batch").equals(good.frame.drop("absmax_batch"))
    assert row(table, "x")["absmax_batch"] == 3
    assert [record.message.split(" (")[0] for record in caplog.records if record.levelno == logging.WARNING] == [
        "batch 0: NaN or Inf first at node log",
        "batch 2: NaN or Inf first at node log",
    ]


def test_skipping_everything_is_an_error(logarithm: ExportedProgram) -> None:
    """When every batch was skipped, nothing was measured, and that is said."""
    with pytest.raises(BatchError, match="all 2 batches had NaN or Inf"):
        measured(logarithm, [BAD, BAD], on_nonfinite="skip")


def test_stop_raises_at_the_first_bad_batch(logarithm: ExportedProgram) -> None:
    """`stop` names batch, node and place, and hands over the table of the batches before."""
    with pytest.raises(BatchError, match=r"batch 1: NaN or Inf first at node log .*test_calibration.py") as caught:
        measured(logarithm, [GOOD, BAD, GOOD], on_nonfinite="stop")
    assert caught.value.ranges is not None
    assert caught.value.ranges.frame.equals(measured(logarithm, [GOOD]).frame)


def test_unknown_on_nonfinite_lists_the_known(logarithm: ExportedProgram) -> None:
    """A misspelt choice is refused before anything runs."""
    with pytest.raises(CalibcastError, match="on_nonfinite='ignore': known are 'warn', 'skip', 'stop'"):
        measured(logarithm, [GOOD], on_nonfinite="ignore")


def test_weights_with_nan_are_found() -> None:
    """NaN in a weight is a finding of its own row."""
    model = Mlp()
    with torch.no_grad():
        model.first.bias[3] = math.nan
    with pytest.warns(UserWarning, match="node p_first_bias"):
        table = measured(torch.export.export(model, (noise(2, 4),)), [noise(2, 4)])
    assert row(table, "p_first_bias")["nan"] == 1
    assert row(table, "linear")["nan"] == 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


def test_tied_weights_and_integer_inputs() -> None:
    """Each name of a shared weight has the same row; an integer input has none, but its sizes are kept."""
    torch.manual_seed(0)
    table = measured(torch.export.export(Tied(), (torch.tensor([1, 2]),)), [torch.tensor([3, 4])])
    weights = table.frame.filter(pl.col("kind") == "parameter").select("min", "max", "rms").rows()
    assert set(weights) == {weights[0]}
    assert "ids" not in table.frame["node"].to_list()
    assert table.calibration.input_sizes == {"ids": [{"2": 1}]}


def test_hashes_of_inputs_tell_batches_apart(mlp: ExportedProgram) -> None:
    """Equal batches have one hash, others another."""
    table = measured(mlp, [noise(2, 4), noise(2, 4, seed=1), noise(2, 4)])
    again = measured(mlp, [noise(2, 4, seed=1)])
    assert len(table.calibration.input_hashes) == 2
    assert set(again.calibration.input_hashes) < set(table.calibration.input_hashes)


def test_complex_inputs_are_allowed() -> None:
    """A complex input, conjugated or not, has no row of its own; what is made of it has."""
    program = torch.export.export(Magnitude(), (torch.zeros(3, dtype=torch.complex64),))
    x = torch.complex(noise(3), noise(3, seed=1))
    table = measured(program, [x, x.conj()])
    assert Counter(table.frame["kind"]) == {"activation": len(table)}
    assert row(table, "abs_1")["max"] == float(x.abs().max())


class Magnitude(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs() * 2


def test_program_loaded_from_a_file_gives_the_same_table(
    everything: ExportedProgram, everything_table: RangeTable, tmp_path: Any
) -> None:
    """Saved and loaded, a program calibrates to the same numbers under the same names."""
    torch.export.save(everything, tmp_path / "everything.pt2")
    loaded = torch.export.load(tmp_path / "everything.pt2")
    table = measured(loaded, [everything_batch(seed) for seed in range(3)])
    assert table.frame.drop("source").equals(everything_table.frame.drop("source"))
