"""Writes in place: which nodes they tie, which versions of a tensor a cast is of, and that the numbers are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibcast.passes import PrecisionPlan, insert_casts
from calibcast.passes.ties import ties_of
from torch import nn
from torch.export import ExportedProgram

X = torch.linspace(-2, 2, 12).reshape(3, 4)


@pytest.fixture
def after(
    export: Callable[..., ExportedProgram],
    plan_of: Callable[..., PrecisionPlan],
    picture: Callable[..., list[str]],
    run: Callable[..., list[Any]],
) -> Callable[..., list[str]]:
    """after(function, low): the picture of its program with just `low` low, whose numbers are the program's."""

    def after(model: Any, low: Any, *inputs: Any) -> list[str]:
        inputs = inputs or (X,)
        program = export(model, *inputs)
        mixed = insert_casts(program, plan_of(program, low))
        for mine, reference in zip(run(mixed, *inputs), run(program, *inputs), strict=True):
            torch.testing.assert_close(mine.float(), reference.float(), rtol=1e-2, atol=1e-2)
        return picture(mixed)

    return after


class TestPrivateWrites:
    def test_a_write_that_nobody_else_sees_may_be_cast(self, after: Callable[..., list[str]]) -> None:
        """
        before: tanh - relu_ - output
        after:  tanh - CAST f16 - relu_(low) - CAST f32: tanh is not read again
        """
        assert after(lambda x: x.tanh().relu_(), {"relu_"}) == [
            "tanh: tanh f32",
            "tanh_as_float16: cast f16 <- tanh",
            "relu_: relu f16",
            "relu__as_float32: cast f32 <- relu_",
            "output: relu__as_float32",
        ]

    def test_and_may_stay_high(self, after: Callable[..., list[str]]) -> None:
        """
        before: tanh - relu_
        after:  tanh(low) - CAST f32 - relu_
        """
        assert after(lambda x: x.tanh().relu_(), {"tanh"})[1:] == [
            "tanh: tanh f16",
            "tanh_as_float32: cast f32 <- tanh",
            "relu_: relu f32",
            "output: relu_",
        ]

    def test_a_chain_of_private_writes(self, after: Callable[..., list[str]]) -> None:
        """
        before: tanh - mul_ - add_ - sin
        after:  tanh - CAST f16 - mul_(low) - CAST f32 - add_ - sin
        """
        lines = after(lambda x: x.tanh().mul_(2).add_(1).sin(), {"mul_"})
        assert lines == [
            "tanh: tanh f32",
            "tanh_as_float16: cast f16 <- tanh",
            "mul_: mul f16",
            "mul__as_float32: cast f32 <- mul_",
            "add_: add f32",
            "sin: sin f32",
            "output: sin",
        ]


class TestVisibleWrites:
    def test_a_cast_is_of_one_version(self, after: Callable[..., list[str]]) -> None:
        """
        before: matmul - mul (a), add_ into matmul, matmul - mul_1 (b)
        after:  matmul - CAST - mul(low), add_, matmul - CAST again - mul_1(low): b sees what was added
        """

        def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = x @ x.t()
            view = y.view(-1)
            a = view * 2
            y.add_(1.0)
            return a, view * 3

        assert after(forward, {"mul", "mul_1"}) == [
            "t: t f32",
            "matmul: matmul f32",
            "view: view f32",
            "view_as_float16: cast f16 <- view",
            "mul: mul f16",
            "add_: add f32",
            "view_as_float16_: _to_copy f16",
            "mul_1: mul f16",
            "mul_as_float32: cast f32 <- mul",
            "mul_1_as_float32: cast f32 <- mul_1",
            "output: mul_as_float32, mul_1_as_float32",
        ]

    @pytest.mark.parametrize("coins", range(16))
    def test_numbers_are_right_under_every_plan(self, after: Callable[..., list[str]], coins: int) -> None:
        """y = linear(x); a = 2 y; y += 1; b = 3 y: whatever is low, a is of the old y and b of the new one."""
        torch.manual_seed(0)
        linear = nn.Linear(4, 4)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = linear

            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
                y = self.linear(x)
                a = y * 2
                y.add_(1.0)
                b = y * 3
                return a, b, y

        lines = after(Model(), lambda i: bool(coins >> i & 1))
        assert lines[-1].startswith("output: mul")

    def test_a_view_read_later_ties_the_class(self, after: Callable[..., list[str]]) -> None:
        """
        before: tanh - slice - add_ (into tanh), tanh - sin
        after:  all of the class in one type, and no cast between the slice and the write through it
        """

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = x.tanh()
            y[:, :2].add_(1.0)
            return y.sin()

        assert after(forward, {"tanh", "slice_1", "add_"}) == [
            "args_0_as_float16: cast f16 <- args_0",
            "tanh: tanh f16",
            "slice_1: slice f16",
            "add_: add f16",
            "tanh_as_float32: cast f32 <- tanh",
            "sin: sin f32",
            "output: sin",
        ]
        assert after(forward, {"tanh", "sin"}) == [
            "tanh: tanh f32",
            "slice_1: slice f32",
            "add_: add f32",
            "tanh_as_float16: cast f16 <- tanh",
            "sin: sin f16",
            "sin_as_float32: cast f32 <- sin",
            "output: sin_as_float32",
        ]

    def test_a_write_into_an_input_keeps_its_type(self, after: Callable[..., list[str]]) -> None:
        """
        before: add_ into the user's own tensor - tanh
        after:  add_ stays fp32 as the caller's tensor is, tanh(low) reads a cast of it
        """
        assert after(lambda x: x.add_(1.0).tanh(), lambda i: True) == [
            "add_: add f32",
            "add__as_float16: cast f16 <- add_",
            "tanh: tanh f16",
            "tanh_as_float32: cast f32 <- tanh",
            "output: tanh_as_float32",
        ]

    def test_a_write_into_a_buffer_keeps_its_class(self, after: Callable[..., list[str]]) -> None:
        """
        before: buffer - slice - copy_(tanh), buffer - matmul
        after:  the class of the buffer stays fp32, its reader casts
        """

        class Cache(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("cache", torch.zeros(6, 4))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.cache[1:4].copy_(x.tanh())
                return x @ self.cache.t()

        lines = after(Cache(), lambda i: True)
        types = {line.split(":")[0]: line.split()[-1] for line in lines}
        assert (types["tanh"], types["matmul"], types["copy_"]) == ("f16", "f16", "f32")
        assert "tanh_as_float32: cast f32 <- tanh" in lines

    @pytest.mark.parametrize("low", [{"add"}, {"add", "mul"}])
    def test_a_writer_that_gives_nothing_back_ties_too(self, after: Callable[..., list[str]], low: set[str]) -> None:
        """
        before: add - increment (a custom op that writes and returns nothing), add - mul
        after:  add stays fp32 with the writer, and mul sees what was written
        """

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            torch.ops.inplace_tests.increment(y)
            return y * 2

        lines = after(forward, low)
        assert lines[0] == "add: add f32"
        assert not any(line.startswith("add_as_float32") for line in lines)

    @pytest.mark.parametrize(
        "share",
        [
            lambda y, x: y.type_as(x),
            lambda y, x: torch.broadcast_tensors(y, x)[0],
            lambda y, x: torch.atleast_2d(y),
            lambda y, x: torch.einsum("ij->ji", y),
            lambda y, x: torch.nn.functional.dropout(y, 0.5, training=False),
            lambda y, x: y.contiguous(),
            lambda y, x: y.reshape(-1),
            lambda y, x: y.expand(3, 4),
            lambda y, x: y.chunk(2, -1)[1],
        ],
        ids=["type_as", "broadcast", "atleast", "einsum", "dropout", "contiguous", "reshape", "expand", "chunk"],
    )
    @pytest.mark.parametrize("coins", [0b01, 0b10, 0b101, -1])
    def test_whatever_gives_its_argument_back(self, after: Callable[..., list[str]], share: Any, coins: int) -> None:
        """Operators that may give their argument itself, or a view that no schema tells of, show a later write."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = x.tanh()
            other = share(y, x)
            y.add_(5.0)
            return other * 2

        assert after(forward, lambda i: bool(coins >> i & 1))

    def test_a_region_that_writes_ties_its_operand(self, after: Callable[..., list[str]]) -> None:
        """
        before: tanh - [add_ in autocast] , a view of tanh - mul
        after:  tanh stays fp32, as the region writes into fp32
        """

        def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = x.tanh()
            view = y.view(-1)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y.add_(1.0)
                z = y @ y.t()
            return view * 2, z.float()

        lines = after(forward, {"tanh", "view", "mul"})
        assert "tanh: tanh f32" in lines


@torch.library.custom_op("inplace_tests::increment", mutates_args=("x",))
def increment(x: torch.Tensor) -> None:
    x.add_(1)


@increment.register_fake
def _(x: torch.Tensor) -> None:
    return None


class TestTies:
    def test_a_private_write_ties_nothing(self, export: Callable[..., ExportedProgram]) -> None:
        """relu_ of a value that is not read again makes storage of its own."""
        assert ties_of(export(lambda x: x.tanh().relu_().sin(), X).graph_module) == []

    def test_a_visible_write_ties_storage_and_writer(self, export: Callable[..., ExportedProgram]) -> None:
        """The class has the base, the view, and the write; a mere reader is not in it."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = x.tanh()
            view = y.view(-1)
            y.mul_(2)
            return view.sin()

        (tie,) = ties_of(export(forward, X).graph_module)
        assert {node.name for node in tie.nodes} == {"tanh", "view", "mul_"}
        assert tie.pinned is None

    def test_a_write_into_an_input_is_pinned(self, export: Callable[..., ExportedProgram]) -> None:
        """The user sees the write in the tensor that was given, whose type is the user's."""
        (tie,) = ties_of(export(lambda x: x.view(-1).mul_(2), X).graph_module)
        assert "args_0" in {node.name for node in tie.nodes}
        assert tie.pinned == "an in-place op writes into args_0, which keeps its type"

    def test_classes_that_meet_are_one(self, export: Callable[..., ExportedProgram]) -> None:
        """Two written tensors that a node may share storage with, either of them, are one class."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            a, b = x.tanh(), x.sin()
            both = torch.broadcast_tensors(a, b)
            a.add_(1)
            b.add_(1)
            return both[0] * both[1]

        ties = ties_of(export(forward, X).graph_module)
        names = [{node.name for node in tie.nodes} for tie in ties]
        assert any({"tanh", "sin", "add_", "add__1"} <= group for group in names)

    def test_outputs_made_anew_do_not_share_storage_with_each_other(self, export: Any, after: Any) -> None:
        """Values of `topk` are written; its indices, integers that no plan types, do not hold them in fp32.

        before: topk - div_ (in place on the values) - mul
        after:  topk(low) - div_(low) - mul(low)
        """

        def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            values, indices = x.topk(2, -1)
            first = values[:, 0]
            values /= values.sum(-1, keepdim=True) + 3
            return values * first[:, None], indices.reshape(-1) + 1

        (tie,) = ties_of(export(forward, X).graph_module)
        assert {node.name for node in tie.nodes} == {"topk", "getitem", "select", "div_", "unsqueeze"}
        lines = after(forward, {"topk", "select", "sum_1", "add", "div_", "unsqueeze", "mul"})
        assert "div_: div f16" in lines
        assert sum("cast" in line for line in lines) == 2  # the input, and the output

    def test_outputs_that_are_views_do(self, export: Any) -> None:
        def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = x * 1
            one, other = y.chunk(2, -1)
            one.add_(1)
            return other * 2, y

        (tie,) = ties_of(export(forward, X).graph_module)
        assert {node.name for node in tie.nodes} == {"mul", "chunk", "getitem", "getitem_1", "add_"}
