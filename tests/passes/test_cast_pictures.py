"""Cast insertion as pictures: a small graph before, the plan, and every node of the graph after."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibcast.calib import PlanError
from calibcast.passes import PrecisionPlan, insert_casts
from torch import nn
from torch.export import Dim, ExportedProgram

X = torch.linspace(-2, 2, 12).reshape(3, 4)


@pytest.fixture
def after(
    export: Callable[..., ExportedProgram],
    plan_of: Callable[..., PrecisionPlan],
    picture: Callable[..., list[str]],
    run: Callable[..., list[Any]],
) -> Callable[..., list[str]]:
    """after(function, low, *inputs): the picture of its program with just `low` low, having run it."""

    def after(
        model: Any, low: set[str], *inputs: Any, low_type: torch.dtype = torch.float16, **options: Any
    ) -> list[str]:
        inputs = inputs or (X,)
        program = export(model, *inputs)
        mixed = insert_casts(program, plan_of(program, low, low_type), **options)
        for mine, reference in zip(run(mixed, *inputs), run(program, *inputs), strict=True):
            torch.testing.assert_close(mine.float(), reference.float(), rtol=2e-2, atol=2e-2)
        return picture(mixed)

    return after


class TestSharing:
    def test_two_readers_share_a_cast(self, after: Callable[..., list[str]]) -> None:
        """
        before: x - tanh, x - sin
        after:  x - CAST - tanh, and - sin
        """
        assert after(lambda x: (x.tanh(), x.sin()), {"tanh", "sin"}) == [
            "args_0_as_float16: cast f16 <- args_0",
            "tanh: tanh f16",
            "sin: sin f16",
            "tanh_as_float32: cast f32 <- tanh",
            "sin_as_float32: cast f32 <- sin",
            "output: tanh_as_float32, sin_as_float32",
        ]

    def test_the_cast_up_is_shared_with_the_output(self, after: Callable[..., list[str]]) -> None:
        """
        before: tanh - sin, tanh - output
        after:  tanh(low) - CAST - sin, and - output
        """
        assert after(lambda x: (lambda y: (y, y.sin()))(x.tanh()), {"tanh"}) == [
            "args_0_as_float16: cast f16 <- args_0",
            "tanh: tanh f16",
            "tanh_as_float32: cast f32 <- tanh",
            "sin: sin f32",
            "output: tanh_as_float32, sin",
        ]

    def test_one_argument_used_twice(self, after: Callable[..., list[str]]) -> None:
        """
        before: x - mul(x, x)
        after:  x - CAST - mul(cast, cast)
        """
        assert after(lambda x: x * x, {"mul"}) == [
            "args_0_as_float16: cast f16 <- args_0",
            "mul: mul f16",
            "mul_as_float32: cast f32 <- mul",
            "output: mul_as_float32",
        ]

    def test_neighbours_of_one_type_need_no_cast(self, after: Callable[..., list[str]]) -> None:
        """
        before: tanh - sin - cos
        after:  CAST - tanh(low) - sin(low) - CAST - cos
        """
        assert after(lambda x: x.tanh().sin().cos(), {"tanh", "sin"}) == [
            "args_0_as_float16: cast f16 <- args_0",
            "tanh: tanh f16",
            "sin: sin f16",
            "sin_as_float32: cast f32 <- sin",
            "cos: cos f32",
            "output: cos",
        ]

    def test_a_high_node_among_low_ones(self, after: Callable[..., list[str]]) -> None:
        """
        before: tanh - sin - cos
        after:  tanh(low) - CAST f32 - sin - CAST f16 - cos(low)
        """
        assert after(lambda x: x.tanh().sin().cos(), {"tanh", "cos"}) == [
            "args_0_as_float16: cast f16 <- args_0",
            "tanh: tanh f16",
            "tanh_as_float32: cast f32 <- tanh",
            "sin: sin f32",
            "sin_as_float16: cast f16 <- sin",
            "cos: cos f16",
            "cos_as_float32: cast f32 <- cos",
            "output: cos_as_float32",
        ]

    def test_a_name_that_is_taken(self, after: Callable[..., list[str]]) -> None:
        """A cast finds a free name where the user's own graph has its name."""

        class Model(nn.Module):
            def forward(self, x: torch.Tensor, x_as_float16: torch.Tensor) -> torch.Tensor:
                return x.tanh() + x_as_float16

        lines = after(Model(), {"tanh"}, X, X + 1)
        assert lines[0] == "x_as_float16_: _to_copy f16"
        assert lines[1] == "tanh: tanh f16"

    def test_bf16(self, after: Callable[..., list[str]]) -> None:
        """
        before: x - tanh
        after:  x - CAST bf16 - tanh - CAST f32
        """
        assert after(lambda x: x.tanh(), {"tanh"}, low_type=torch.bfloat16) == [
            "args_0_as_bfloat16: cast bf16 <- args_0",
            "tanh: tanh bf16",
            "tanh_as_float32: cast f32 <- tanh",
            "output: tanh_as_float32",
        ]


class TestOutputs:
    def test_outputs_come_as_computed_when_asked(self, after: Callable[..., list[str]]) -> None:
        """
        before: x - tanh - output
        after:  x - CAST - tanh(low) - output: the input stays fp32, the output is fp16
        """
        assert after(lambda x: x.tanh(), {"tanh"}, keep_io_types=False) == [
            "args_0_as_float16: cast f16 <- args_0",
            "tanh: tanh f16",
            "output: tanh",
        ]

    def test_inputs_given_back_need_no_cast(self, after: Callable[..., list[str]]) -> None:
        """
        before: x - output, x - tanh - output
        after:  x - output, x - CAST - tanh - CAST - output
        """
        assert after(lambda x: (x, x.tanh()), {"tanh"})[-1] == "output: args_0, tanh_as_float32"

    def test_structure_and_constants_stay(self, export: Any, plan_of: Any) -> None:
        """A dict with None and a number comes back as it was."""
        program = export(lambda x: {"a": x.tanh(), "b": (None, 3)}, X)
        result = insert_casts(program, plan_of(program, {"tanh"})).module()(X)
        assert (result["b"], result["a"].dtype) == ((None, 3), torch.float32)

    def test_a_mutated_buffer_keeps_its_type_without_keep_io_types(self, export: Any, plan_of: Any, run: Any) -> None:
        """keep_io_types=False is about what the user gets, not about state that the next call reads."""

        class Running(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("mean", torch.zeros(4))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.mean = self.mean * 0.5 + x.mean(0)
                return x - self.mean

        program = export(Running(), X).run_decompositions()
        mixed = insert_casts(program, plan_of(program, lambda i: True), keep_io_types=False)
        output = next(iter(reversed(mixed.graph.nodes)))
        assert [n.meta["val"].dtype for n in output.args[0]] == [torch.float32, torch.float16]
        run(mixed, X)


class TestStatedTypes:
    def test_the_users_own_to_keeps_its_type(self, after: Callable[..., list[str]]) -> None:
        """
        before: tanh - to(float32) - sin
        after:  tanh(low) - to(float32) - sin: the conversion is the cast, and none stands beside it
        """
        lines = after(lambda x: x.tanh().to(torch.float32).sin(), {"tanh"})
        assert lines[1:] == ["tanh: tanh f16", "to: to f32", "sin: sin f32", "output: sin"]

    def test_its_readers_are_cast_as_planned(self, after: Callable[..., list[str]]) -> None:
        """
        before: to(float16) - to(float32) - tanh - output, all stated types kept
        after:  ... - tanh reads the fp16 that was widened: the pair loses nothing by its removal
        """
        lines = after(lambda x: x.half().float().tanh(), {"tanh"})
        assert [line for line in lines if "assert" not in line] == [
            "to: to f16",
            "to_1: to f32",
            "tanh: tanh f16",
            "tanh_as_float32: cast f32 <- tanh",
            "output: tanh_as_float32",
        ]

    def test_low_to_float32_to_low_is_removed(self, export: Any, plan_of: Any) -> None:
        """
        before: tanh - to(float32) - sin
        after:  tanh(low) - sin(low): sin reads tanh itself
        """
        program = export(lambda x: x.tanh().to(torch.float32).sin(), X)
        mixed = insert_casts(program, plan_of(program, {"tanh", "sin"}))
        by_name = {node.name: node for node in mixed.graph.nodes}
        assert by_name["sin"].args == (by_name["tanh"],)

    def test_a_pair_that_rounds_stays(self, export: Any, plan_of: Any) -> None:
        """
        before: x - to(float16) - to(float32) - sin
        after:  the same: fp32 -> fp16 -> fp32 is the user's own rounding
        """
        program = export(lambda x: x.half().float().sin() + x.tanh(), X)
        mixed = insert_casts(program, plan_of(program, {"tanh"}, torch.bfloat16))
        sin = next(node for node in mixed.graph.nodes if node.name == "sin")
        assert str(sin.args[0]) == "to_1"

    def test_a_pair_of_another_type_stays(self, after: Callable[..., list[str]]) -> None:
        """
        before: to(float16) - to(float32) - tanh
        after:  to(float16) - to(float32) - CAST bf16 - tanh: bf16 has not what fp16 had
        """
        lines = after(lambda x: x.half().float().tanh(), {"tanh"}, low_type=torch.bfloat16)
        assert "to_1_as_bfloat16: cast bf16 <- to_1" in lines

    def test_a_pair_that_moves_memory_stays(self, after: Callable[..., list[str]]) -> None:
        """
        before: tanh - half - t - to(float32, contiguous) - view
        after:  ... to(float32, contiguous) - CAST f16 - view(low): the strides of `t` cannot be viewed so
        """

        def forward(x: torch.Tensor) -> torch.Tensor:
            return x.tanh().half().t().to(torch.float32, memory_format=torch.contiguous_format).view(-1)

        lines = after(forward, {"tanh", "view"})
        assert lines[-4:] == [
            "to_1_as_float16: cast f16 <- to_1",
            "view: view f16",
            "view_as_float32: cast f32 <- view",
            "output: view_as_float32",
        ]

    def test_a_pair_across_devices_stays(self, export: Any, plan_of: Any) -> None:
        """
        before: half (cpu) - to(meta, float32) - sin
        after:  half (cpu) - to(meta, float32) - CAST f16 (meta) - sin(low): what it was widened from is elsewhere
        """
        program = export(lambda x: x.half().to("meta", torch.float32).sin(), X)
        mixed = insert_casts(program, plan_of(program, {"sin"}))
        sin = next(node for node in mixed.graph.nodes if node.name == "sin")
        assert sin.args[0].meta["val"].device.type == "meta"

    def test_float64_is_what_the_user_asked_for(self, after: Callable[..., list[str]]) -> None:
        """
        before: tanh - double - mul - float - sin
        after:  tanh(low) - double - mul - float - CAST - sin(low)
        """
        lines = after(lambda x: (x.tanh().double() * 3).float().sin(), {"tanh", "sin"})
        assert [line for line in lines if "assert" not in line] == [
            "args_0_as_float16: cast f16 <- args_0",
            "tanh: tanh f16",
            "to: to f64",
            "mul: mul f64",
            "to_1: to f32",
            "to_1_as_float16: cast f16 <- to_1",
            "sin: sin f16",
            "sin_as_float32: cast f32 <- sin",
            "output: sin_as_float32",
        ]

    def test_assertions_on_changed_types_are_dropped(self, export: Any, plan_of: Any) -> None:
        """
        before: tanh - _assert_tensor_metadata(float32), tanh - to(float64)
        after:  tanh(low) - to(float64); with tanh high the assertion stays
        """
        program = export(lambda x: x.tanh().double(), X)
        assert "_assert_tensor_metadata" in str(program.graph)
        assert "_assert_tensor_metadata" not in str(insert_casts(program, plan_of(program, {"tanh"})).graph)
        assert "_assert_tensor_metadata" in str(insert_casts(program, plan_of(program, set())).graph)

    def test_bits_are_those_of_the_exported_type(self, export: Any, plan_of: Any, run: Any) -> None:
        """
        before: mul - view(int32)
        after:  mul(low) - CAST f32 - view(int32): the bits of fp16 would be other numbers, and half as many
        """
        program = export(lambda x: (x * 2).view(torch.int32) >> 23, X)
        mixed = insert_casts(program, plan_of(program, {"mul"}))
        assert torch.equal(run(mixed, X)[0], run(program, X)[0])


class TestDtypeArguments:
    def test_a_dtype_argument_follows_the_plan(self, after: Callable[..., list[str]]) -> None:
        """
        before: softmax(x, dtype=float32)
        after:  CAST - softmax(dtype=float16) - CAST
        """
        assert after(lambda x: x.softmax(-1, dtype=torch.float32), {"softmax"})[1] == "softmax: softmax f16"

    def test_on_a_high_node_it_stays(self, after: Callable[..., list[str]]) -> None:
        """
        before: tanh - sum(dtype=float32)
        after:  tanh(low) - CAST f32 - sum(dtype=float32)
        """
        lines = after(lambda x: x.tanh().sum(0, dtype=torch.float32), {"tanh"})
        assert lines[2:] == ["tanh_as_float32: cast f32 <- tanh", "sum_1: sum f32", "output: sum_1"]

    @pytest.mark.parametrize(
        "factory",
        [
            lambda: torch.zeros(4),
            lambda: torch.ones(4, dtype=torch.float32),
            lambda: torch.full((4,), 0.5),
            lambda: torch.arange(4.0),
            lambda: torch.linspace(0, 1, 4),
            lambda: torch.eye(3, 4),
        ],
    )
    def test_a_factory_follows_its_plan(self, after: Callable[..., list[str]], factory: Callable[[], Any]) -> None:
        """
        before: factory - add
        after:  factory(dtype=float16) - add(low): no cast between them
        """
        name = after(lambda x: x + factory(), set())[0].split(":")[0]
        lines = after(lambda x: x + factory(), {name, "add"})
        assert [line.split()[-1] for line in lines] == ["f16", "args_0", "f16", "add", "add_as_float32"]

    def test_a_high_factory_stays(self, after: Callable[..., list[str]]) -> None:
        """
        before: zeros - add
        after:  zeros f32 - CAST - add(low)
        """
        lines = after(lambda x: x + torch.zeros(4), {"add"})
        assert {"zeros: zeros f32", "zeros_as_float16: cast f16 <- zeros"} <= set(lines)

    def test_what_is_like_a_tensor_follows_it(self, after: Callable[..., list[str]]) -> None:
        """
        before: tanh - zeros_like - add
        after:  tanh(low) - zeros_like(low) - add(low)
        """
        lines = after(lambda x: torch.zeros_like(x.tanh()) + 1, {"tanh", "zeros_like", "add"})
        assert lines[1:4] == ["tanh: tanh f16", "zeros_like: zeros_like f16", "add: add f16"]

    def test_integers_are_never_cast(self, after: Callable[..., list[str]]) -> None:
        """
        before: arange (int64) - mul(x, arange), ids - embedding
        after:  arange stays int64; only x is cast
        """
        lines = after(lambda x: x * torch.arange(4), {"mul"})
        assert lines[:3] == ["arange: arange int64", "args_0_as_float16: cast f16 <- args_0", "mul: mul f16"]

    def test_a_division_of_integers_gives_fp32(self, after: Callable[..., list[str]]) -> None:
        """
        before: div(int64, int64) - mul(x)
        after:  div f32 - CAST f16 - mul(low): division has no dtype to set, so its reader casts
        """
        lines = after(lambda x, i: x * (i / 2), {"div", "mul"}, X, torch.arange(4))
        assert {"div: div f32", "div_as_float16: cast f16 <- div", "mul: mul f16"} <= set(lines)


class TestMultipleOutputs:
    def test_split(self, after: Callable[..., list[str]]) -> None:
        """
        before: split - getitem, getitem_1 - tanh
        after:  CAST - split(low) - getitem - CAST f32 - output; getitem_1 - tanh(low)
        """

        def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            first, second = x.split(2, -1)
            return first, second.tanh()

        assert after(forward, {"split", "tanh"}) == [
            "args_0_as_float16: cast f16 <- args_0",
            "split: split f16 f16",
            "tanh: tanh f16",
            "getitem_as_float32: cast f32 <- getitem",
            "tanh_as_float32: cast f32 <- tanh",
            "output: getitem_as_float32, tanh_as_float32",
        ]

    def test_topk_gives_integers_too(self, after: Callable[..., list[str]]) -> None:
        """
        before: topk - values, indices
        after:  CAST - topk(low) - values - CAST f32, indices as they are
        """
        assert after(lambda x: tuple(x.topk(2)), {"topk"}) == [
            "args_0_as_float16: cast f16 <- args_0",
            "topk: topk f16 int64",
            "getitem_as_float32: cast f32 <- getitem",
            "output: getitem_as_float32, getitem_1",
        ]

    def test_cat_casts_each_of_a_list(self, after: Callable[..., list[str]]) -> None:
        """
        before: cat([tanh, x])
        after:  tanh(low), x - CAST f16 - cat(low)
        """
        lines = after(lambda x: torch.cat([x.tanh(), x]), {"cat"})
        assert lines == [
            "tanh: tanh f32",
            "tanh_as_float16: cast f16 <- tanh",
            "args_0_as_float16: cast f16 <- args_0",
            "cat: cat f16",
            "cat_as_float32: cast f32 <- cat",
            "output: cat_as_float32",
        ]

    def test_lstm(self, export: Any, plan_of: Any, run: Any) -> None:
        """
        before: lstm(x, [h, c], [weights ...]) - three outputs
        after:  everything in the lists low, every output cast up
        """
        torch.manual_seed(0)
        program = export(nn.LSTM(4, 6, batch_first=True), X[None])
        mixed = insert_casts(program, plan_of(program, lambda i: True))
        lstm = next(node for node in mixed.graph.nodes if node.name == "lstm")
        assert {v.dtype for v in lstm.meta["val"]} == {torch.float16}
        assert {n.meta["val"].dtype for n in [lstm.args[0], *lstm.args[1], *lstm.args[2]]} == {torch.float16}
        assert {t.dtype for t in mixed.state_dict.values()} == {torch.float16}
        for mine, reference in zip(run(mixed, X[None]), run(program, X[None]), strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-2, atol=1e-2)


class TestRegions:
    def test_operands_of_a_region_have_their_exported_types(self, after: Callable[..., list[str]]) -> None:
        """
        before: tanh - [matmul in autocast bf16] - float - sin
        after:  tanh(low) - CAST f32 - [matmul] - float - CAST f16 - sin(low)
        """

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = x.tanh()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = y @ y.t()
            return z.float().sin()

        lines = after(forward, {"tanh", "sin"})
        assert [line for line in lines if "assert" not in line] == [
            "args_0_as_float16: cast f16 <- args_0",
            "tanh: tanh f16",
            "tanh_as_float32: cast f32 <- tanh",
            "matmul: wrap_with_autocast bf16",
            "to: to f32",
            "to_as_float16: cast f16 <- to",
            "sin: sin f16",
            "sin_as_float32: cast f32 <- sin",
            "output: sin_as_float32",
        ]

    def test_a_no_grad_region_is_entered(self, export: Any, plan_of: Any, picture: Any, run: Any) -> None:
        """
        before: [linear - relu in no_grad] - tanh
        after:  linear(low) - relu(low) - CAST - tanh, without a region
        """

        class Frozen(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                with torch.no_grad():
                    y = self.linear(x).relu()
                return y.tanh()

        torch.manual_seed(0)
        program = export(Frozen(), X)
        plan = plan_of(program, {"submod_1.linear", "submod_1.relu"})
        assert [d.node for d in plan.decisions] == ["submod_1.linear", "submod_1.relu", "tanh"]
        mixed = insert_casts(program, plan)
        assert picture(mixed) == [
            "x_as_float16: cast f16 <- x",
            "submod_1__linear: linear f16",
            "submod_1__relu: relu f16",
            "submod_1__relu_as_float32: cast f32 <- submod_1__relu",
            "tanh: tanh f32",
            "output: tanh",
        ]
        torch.testing.assert_close(run(mixed, X)[0], run(program, X)[0], rtol=1e-2, atol=1e-2)

    def test_without_low_nodes_a_no_grad_region_stays(self, export: Any, plan_of: Any) -> None:
        """An all-high plan leaves the graph as it was, its regions too."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                y = x.tanh()
            return y.sin()

        program = export(forward, X)
        assert "wrap_with_set_grad_enabled" in str(program.graph)
        assert str(insert_casts(program, plan_of(program, set())).graph) == str(program.graph)

    def test_an_autocast_region_inside_no_grad_saves(self, export: Any, case_of: Any, plan_of: Any, laws: Any) -> None:
        """
        before: [tanh - [linear in autocast] in no_grad]
        after:  tanh(low) - CAST - [linear]; its child has a name that torch.export.save finds
        """

        class Nested(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                with torch.no_grad():
                    y = x.tanh()
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        z = self.linear(y)
                    return z.float() + y

        program = export(Nested(), X)
        plan = plan_of(program, {"submod_1.tanh"})
        inside = next(d for d in plan.decisions if d.node == "submod_1.submod_1.linear")
        assert inside.rule == "autocast_region"
        for law in laws:
            law(case_of(program, plan, (X,)))


class TestNames:
    def test_a_placeholder_called_input_keeps_its_name(self, export: Any, plan_of: Any) -> None:
        """fx would rename `input` to `input_1`, and the signature would name nothing."""

        class Model(nn.Module):
            def forward(self, input: torch.Tensor, range: torch.Tensor) -> torch.Tensor:
                return input.tanh() + range

        program = export(Model(), X, X + 1)
        mixed = insert_casts(program, plan_of(program, {"tanh"}))
        assert [n.name for n in mixed.graph.nodes if n.op == "placeholder"] == ["input", "range"]
        assert mixed.graph_signature.user_inputs == ("input", "range")
        assert mixed.module()(X, X).shape == X.shape

    def test_places_are_kept(self, export: Any, plan_of: Any) -> None:
        """Nodes keep the module and the line that they come from, and a cast has those of what it casts."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.act = nn.Tanh()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.act(x)

        program = export(Model(), X)
        mixed = insert_casts(program, plan_of(program, {"tanh"}))
        metas = {n.name: n.meta for n in mixed.graph.nodes}
        assert [path for path, _ in metas["tanh"]["nn_module_stack"].values()][-1] == "act"
        assert metas["tanh_as_float32"]["nn_module_stack"] == metas["tanh"]["nn_module_stack"]

    def test_dynamic_sizes_stay_symbols(self, export: Any, plan_of: Any) -> None:
        """The batch stays dynamic through casts, and no guard is added."""
        program = export(lambda x: x.tanh().reshape(-1) * 2, X, dynamic_shapes=(({0: Dim("n", min=2, max=9)},),))
        mixed = insert_casts(program, plan_of(program, {"tanh", "reshape"}))
        assert mixed.range_constraints == program.range_constraints
        for size in (2, 7):
            assert mixed.module()(X[:1].expand(size, 4).clone()).shape == (size * 4,)


def test_an_operator_that_refuses_stays_as_exported(
    export: Any, plan_of: Any, picture: Any, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """
    before: tanh - strict (a custom op for fp32 only) - sin
    after:  tanh(low) - CAST f32 - strict - CAST f16 - sin(low), and a warning that names the node
    """
    program = export(lambda x: torch.ops.picture_tests.strict(x.tanh()).sin(), X)
    with caplog.at_level(logging.WARNING, logger="calibcast"):
        mixed = insert_casts(program, plan_of(program, {"tanh", "strict", "sin"}))
    assert "node strict" in caplog.text
    assert "cannot run in torch.float16 and stays in its exported type" in caplog.text
    computed = [line for line in picture(mixed) if "cast" not in line]
    assert computed == [
        "tanh: tanh f16",
        "strict: picture_tests.strict.default f32",
        "sin: sin f16",
        "output: sin_as_float32",
    ]
    torch.testing.assert_close(run(mixed, X)[0], run(program, X)[0], rtol=1e-2, atol=1e-2)


def test_weights_of_an_operator_that_refuses_are_not_rounded(export: Any, plan_of: Any, run: Any) -> None:
    """What only the refusing node reads stays in fp32, to the bit, and no cast is left that nobody reads."""
    weight = torch.nn.Parameter(torch.tensor([0.1, 0.2, 0.3, 1e-9]))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.picture_tests.strict(self.weight) * 1 + x.tanh()

    program = export(Model(), X)
    mixed = insert_casts(program, plan_of(program, {"tanh", "strict"}))
    assert torch.equal(mixed.state_dict["weight"], weight)
    assert all(node.users for node in mixed.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("low_type", [torch.float16, torch.bfloat16])
def test_kernels_that_take_no_symbolic_sizes_are_low_all_the_same(
    export: Any, plan_of: Any, low_type: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """`baddbmm` in fp16 and `lstm` in bf16 refuse symbolic sizes on fake tensors: their types come from real ones."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = torch.nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.lstm(x)[0]
            return torch.baddbmm(y.mean(2, keepdim=True).mT, y, y.mT, beta=0.5, alpha=0.1)

    sizes = ({0: Dim("batch", min=2, max=9)},)
    program = export(Model(), torch.randn(3, 5, 4), dynamic_shapes=sizes)
    mixed = insert_casts(program, plan_of(program, {"lstm", "baddbmm"}, low_type))
    values = {node.name: node.meta["val"] for node in mixed.graph.nodes if node.name in {"lstm", "baddbmm"}}
    assert [value.dtype for value in [*values["lstm"], values["baddbmm"]]] == [low_type] * 4
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@torch.library.custom_op("picture_tests::strict", mutates_args=())
def strict(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@strict.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32:
        raise RuntimeError("strict takes float32 only")
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("function", "node"),
    [
        (lambda x: x.masked_fill(x > 0, -1e9).softmax(-1), "masked_fill"),
        (lambda x: x.clamp(min=-1e6) + 1, "clamp"),
        (lambda x: torch.full_like(x, 1e5).sigmoid() + x, "full_like"),
        (lambda x: (x + 1).masked_fill_(x > 0, -1e9).softmax(-1), "masked_fill_"),
    ],
)
def test_a_number_that_the_kernel_refuses_in_half_keeps_its_node_as_exported(
    export: Any, plan_of: Any, run: Any, function: Any, node: str
) -> None:
    """Fake tensors take masked_fill(-1e9) in fp16; the real kernel says that it cannot be converted."""
    program = export(function, X)
    plan = plan_of(program, lambda _: True)
    assert node in plan.low_precision_nodes
    mixed = insert_casts(program, plan)
    types = {n.name: n.meta["val"].dtype for n in mixed.graph.nodes if n.op == "call_function"}
    assert types[node] == torch.float32
    torch.testing.assert_close(run(mixed, X)[0], run(program, X)[0], rtol=2e-2, atol=2e-2)
    assert insert_casts(program, plan_of(program, lambda _: True, torch.bfloat16)) is not None


@pytest.mark.parametrize("low_type", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_recurrent_layers_with_a_dynamic_batch_are_low(
    export: Any, plan_of: Any, run: Any, cell: type[nn.Module], low_type: torch.dtype
) -> None:
    """Found by fuzzing: in bf16 the LSTM's derivation failed on the symbolic size, and it stayed in fp32."""
    program = export(cell(4, 6, batch_first=True), torch.randn(2, 3, 4), dynamic_shapes=({0: Dim("n", max=9)},))
    mixed = insert_casts(program, plan_of(program, lambda _: True, low_type))
    (made,) = [n for n in mixed.graph.nodes if n.name in {"lstm", "gru"}]
    assert {value.dtype for value in made.meta["val"]} == {low_type}
    run(mixed, torch.randn(2, 3, 4))


def test_programs_without_metadata_are_refused(export: Any, plan_of: Any) -> None:
    """Types are derived from fake tensors: without them there is nothing to derive from."""
    program = export(lambda x: x.tanh(), X)
    plan = plan_of(program, {"tanh"})
    bare = dataclasses.replace(plan, digests=None)
    object.__setattr__(bare, "check", lambda _: None)
    for node in program.graph.nodes:
        node.meta.pop("val", None)
    with pytest.raises(PlanError, match=r"carry no fake tensors; export it with torch\.export\.export"):
        insert_casts(program, bare)
