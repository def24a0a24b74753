"""Weights in the rewritten program: stored low where only low nodes read them, shared with the caller otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibcast.passes import PrecisionPlan, classify, insert_casts
from torch import nn
from torch.export import ExportedProgram

from tests.unmeasured import calibrate

X = torch.linspace(-2, 2, 12).reshape(3, 4)
LOW, HIGH = torch.float16, torch.float32


class Weights(nn.Module):
    """Weights of all kinds; `function` is called with the module and the inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 4))
        self.register_buffer("hidden", torch.linspace(0.5, 1.5, 4), persistent=False)
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


@pytest.fixture
def mixed_of(
    export: Callable[..., ExportedProgram], plan_of: Callable[..., PrecisionPlan], run: Callable[..., list[Any]]
) -> Callable[..., tuple[ExportedProgram, ExportedProgram]]:
    """mixed_of(module or function, low): the program and its rewriting, having run both."""

    def mixed_of(model: Any, low: Any, *inputs: Any) -> tuple[ExportedProgram, ExportedProgram]:
        inputs = inputs or (X,)
        program = export(model if isinstance(model, nn.Module) else Weights(model), *inputs)
        mixed = insert_casts(program, plan_of(program, low))
        for mine, reference in zip(run(mixed, *inputs), run(program, *inputs), strict=True):
            torch.testing.assert_close(mine, reference, rtol=2e-2, atol=2e-2)
        return program, mixed

    return mixed_of


def casts(program: ExportedProgram) -> list[str]:
    return [n.name for n in program.graph.nodes if n.name.endswith(("_as_float16", "_as_float32"))]


def test_half_the_memory_and_no_cast_at_run_time(mixed_of: Any) -> None:
    """
    before: linear(x, weight, bias)
    after:  CAST x - linear(low, weight f16, bias f16): nothing but the input is cast
    """
    program, mixed = mixed_of(lambda m, x: m.first(x), {"linear"})
    before, after = (sum(p.state_dict[f"first.{k}"].nbytes for k in ("weight", "bias")) for p in (program, mixed))
    assert after * 2 == before
    assert casts(mixed) == ["inputs_0_as_float16", "linear_as_float32"]
    assert torch.equal(mixed.state_dict["first.weight"], program.state_dict["first.weight"].half())
    assert isinstance(mixed.state_dict["first.weight"], nn.Parameter)


def test_the_callers_weights_are_not_converted(mixed_of: Any) -> None:
    """Converted weights are copies; those that stay are the caller's own tensors."""
    program, mixed = mixed_of(lambda m, x: m.second(m.first(x)), {"linear"})
    assert program.state_dict["first.weight"].dtype == HIGH
    assert mixed.state_dict["first.weight"].dtype == LOW
    assert mixed.state_dict["second.weight"] is program.state_dict["second.weight"]


@pytest.mark.parametrize(
    ("function", "low"),
    [
        pytest.param(lambda m, x: m.first(x) * m.first.weight.sum(), {"linear"}, id="a high reader"),
        pytest.param(lambda m, x: (m.first(x), m.first.weight), {"linear"}, id="an output"),
        pytest.param(lambda m, x: m.first(x), set(), id="no low reader"),
    ],
)
def test_a_weight_that_others_read_stays(mixed_of: Any, function: Any, low: set[str]) -> None:
    """
    before: weight - linear, weight - another reader
    after:  weight stays fp32, and is cast for the low reader
    """
    program, mixed = mixed_of(function, low)
    assert mixed.state_dict["first.weight"] is program.state_dict["first.weight"]
    assert [name for name in casts(mixed) if "weight" in name] == (["p_first_weight_as_float16"] if low else [])


def test_a_regions_operand_stays(mixed_of: Any) -> None:
    """
    before: weight - linear, weight - [linear in autocast]
    after:  the region gets the fp32 that it was exported with
    """

    def forward(m: Weights, x: torch.Tensor) -> torch.Tensor:
        y = m.first(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = m.first(y)
        return z.float()

    program, mixed = mixed_of(forward, lambda i: True)
    assert mixed.state_dict["first.weight"] is program.state_dict["first.weight"]


def test_readers_through_a_view_count(mixed_of: Any) -> None:
    """
    before: weight - t - matmul
    after:  weight f16 - t(low) - matmul(low)
    """
    _, mixed = mixed_of(lambda m, x: x @ m.first.weight.t(), {"t", "matmul"})
    assert mixed.state_dict["first.weight"].dtype == LOW
    assert all("weight" not in name for name in casts(mixed))


class Tied(nn.Module):
    """An embedding table that is the weight of the head too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


def test_tied_weights_stay_tied(mixed_of: Any) -> None:
    """
    before: table - embedding - linear(tied to table)
    after:  one fp16 tensor for both names
    """
    _, mixed = mixed_of(Tied(), {"embedding", "linear"}, torch.arange(3))
    table, head = mixed.state_dict["table.weight"], mixed.state_dict["head.weight"]
    assert table.dtype == LOW
    assert table.data_ptr() == head.data_ptr()


@pytest.mark.parametrize("low", [{"embedding"}, {"linear"}])
def test_a_tie_to_something_high_stays_whole(mixed_of: Any, low: set[str]) -> None:
    """
    before: table - embedding(low) - linear(high, tied to table)
    after:  the table stays fp32 for both, as storing it twice would take more memory and not less
    """
    program, mixed = mixed_of(Tied(), low, torch.arange(3))
    for name in ("table.weight", "head.weight"):
        assert mixed.state_dict[name] is program.state_dict[name]


def test_a_value_beyond_the_low_type_is_not_stored(export: Any, plan_of: Any) -> None:
    """
    before: weight of 70000 - linear
    after:  weight f32 - CAST - linear(low): init_max governs it, and a stored inf would be for good
    """
    model = Weights(lambda m, x: m.first(x))
    model.first.weight.data[0, 0] = 70000.0
    program = export(model, X)
    mixed = insert_casts(program, plan_of(program, {"linear"}))
    assert mixed.state_dict["first.weight"] is program.state_dict["first.weight"]
    assert mixed.state_dict["first.bias"].dtype == LOW
    assert "p_first_weight_as_float16" in casts(mixed)
    brain = insert_casts(program, plan_of(program, {"linear"}, torch.bfloat16))
    assert brain.state_dict["first.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("value", [65504.0, -65519.0, float("inf")])
def test_what_is_held_is_stored(export: Any, plan_of: Any, value: float) -> None:
    """The largest finite half, what rounds to it, and an Inf of the user's own are stored."""
    model = Weights(lambda m, x: m.first(x))
    model.first.weight.data[0, 0] = value
    program = export(model, X)
    mixed = insert_casts(program, plan_of(program, {"linear"}))
    assert mixed.state_dict["first.weight"].dtype == LOW


def test_buffers_and_constants_are_stored_too(mixed_of: Any) -> None:
    """
    before: mul(x, buffer), mul(_, non-persistent buffer), add(_, constant)
    after:  all three in fp16
    """
    constant = torch.tensor([1.0, 2.0, 3.0, 4.0])
    _, mixed = mixed_of(lambda m, x: x * m.scale * m.hidden + constant, lambda i: True)
    assert mixed.state_dict["scale"].dtype == LOW
    assert {tensor.dtype for tensor in mixed.constants.values()} == {LOW}
    assert [name for name in casts(mixed) if "args" not in name and "inputs" not in name] == ["add_as_float32"]


@pytest.mark.parametrize("trained", [True, False])
def test_converted_weights_decompose_as_the_users_do(export: Any, plan_of: Any, trained: bool) -> None:
    """`embedding_bag` becomes another operator where its table needs no gradient, one that builders do not take."""
    bag = nn.EmbeddingBag(4, 8).requires_grad_(trained)
    program = export(bag, torch.tensor([[0, 1], [2, 3]]))
    mixed = insert_casts(program, plan_of(program, {"embedding_bag"}))
    assert mixed.state_dict["weight"].dtype == LOW
    assert mixed.state_dict["weight"].requires_grad == trained
    bags = [
        {str(node.target) for node in each.run_decompositions().graph.nodes if "embedding_bag" in str(node.target)}
        for each in (program, mixed)
    ]
    assert bags[0] == bags[1]


def test_integer_weights_stay(mixed_of: Any) -> None:
    """A batch norm that is low stores its statistics low, and its count of batches stays an integer."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    program, mixed = mixed_of(model, {"linear", "batch_norm"})
    assert mixed.state_dict["1.running_var"].dtype == LOW
    assert mixed.state_dict["1.num_batches_tracked"] is program.state_dict["1.num_batches_tracked"]


class Counting(nn.Module):
    """Adds up what it has seen, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x.sum(0))
        return x + self.total


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("low", [lambda i: True, lambda i: False])
def test_written_buffers_are_fp32_copies(export: Any, plan_of: Any, decomposed: bool, low: Any) -> None:
    """A buffer that calls write into keeps its type, and running the result leaves the caller's buffer alone."""
    program = export(Counting(), X)
    program = program.run_decompositions() if decomposed else program
    mixed = insert_casts(program, plan_of(program, low))
    module = mixed.module()
    first, second = module(X), module(X)
    torch.testing.assert_close(second - first, X.sum(0).expand(3, 4), rtol=1e-2, atol=1e-2)
    assert mixed.state_dict["total"].dtype == HIGH
    assert torch.equal(program.state_dict["total"], torch.zeros(4))


def test_written_buffers_of_one_storage_stay_one(export: Any, plan_of: Any) -> None:
    """Two names of one buffer are copied as one."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(4))
            self.register_buffer("same", self.total)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.add_(1.0)
            return x.tanh() + self.same

    program = export(Twice(), X)
    mixed = insert_casts(program, plan_of(program, {"tanh"}))
    assert mixed.state_dict["total"].data_ptr() == mixed.state_dict["same"].data_ptr()
    assert mixed.state_dict["total"].data_ptr() != program.state_dict["total"].data_ptr()


def test_lost_values_are_named_in_the_plan(export: Any) -> None:
    """What the low type makes inf or zero of a weight is a note in the plan, and none in bf16."""
    model = Weights(lambda m, x: m.first(x))
    model.first.weight.data[0, 0] = 1e-9
    model.first.bias.data[0] = 1e5
    program = export(model, X)
    ranges = calibrate(program, [X], progress=False)
    include = {"nodes_to_include": {"linear"}}
    assert classify(program, ranges, **include).notes == (
        "parameter p_first_weight has values down to 1e-09: zero in float16",
        "parameter p_first_bias has values up to 1e+05: inf in float16",
    )
    assert classify(program, ranges, torch.bfloat16, **include).notes == ()
