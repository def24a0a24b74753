"""The equations between the exponents of small programs, whole: what is equal, what is a sum, what is held and why."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from calibcast.passes.rescaling.equations import Term, parsed
from calibcast.passes.rescaling.system import Number, System, Tensor, system_of
from torch import nn

Graph = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]
INF, NAN = float("inf"), float("nan")
ENTERS, LEAVES = "it comes into the program", "it leaves the program"


class Net(nn.Module):
    def __init__(self, function: Graph) -> None:
        super().__init__()
        self.function = function
        self.w, self.b = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, self.w, self.b)


def read(model: nn.Module, breaks: dict[str, frozenset[str]] | None = None) -> tuple[System, list[str]]:
    """The system, and the name of each variable: `add`, `split[1]`, `mul.other=3`, or j0 for an unknown."""
    system = system_of(torch.export.export(model, (torch.ones(2, 4),)), breaks)
    unknown, names = count(), []
    for kind in system.kinds:
        if isinstance(kind, Tensor):
            names.append(kind.node + (f"[{kind.output}]" if kind.output else ""))
        else:
            number = isinstance(kind, Number)
            names.append(f"{kind.node}.{kind.argument}={kind.value:g}" if number else f"j{next(unknown)}")  # type: ignore[union-attr]
    return system, names


def written(
    model: nn.Module, breaks: dict[str, frozenset[str]] | None = None
) -> tuple[set[str], set[str], dict[str, str]]:
    """Pairs that are equal; sums that are 0, without regard to their sign; reasons to be 0."""
    system, names = read(model, breaks)
    rows = set()
    for row in system.rows:
        by_name = sorted((names[v], c) for v, c in row.items())
        sign = 1 if by_name[0][1] > 0 else -1
        rows.add(" ".join(f"{sign * c:+d} {name}" for name, c in by_name))
    equal = {" = ".join(sorted(names[v] for v in pair)) for pair in system.equal}
    return equal, rows, {names[v]: system.why_zero[v] for v in system.zero}


def test_a_network_with_a_norm() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(F.linear(x.relu(), w, b) * 3.0 + 0.25, (4,)).exp()

    equal, rows, held = written(Net(function))
    assert equal == {"relu = x", "add = mul", "add.other=0.25 = mul"}
    assert rows == {
        "+1 linear -1 p_w -1 relu", "+1 p_b -1 p_w -1 relu", "+1 linear -1 mul +1 mul.other=3",
        "+2 add -1 layer_norm.eps=1e-05",
    }  # fmt: skip
    assert held == {"x": ENTERS, "layer_norm": "layer_norm takes it as it is", "exp": "exp has no equation"}


def test_a_norm_has_the_eps_that_it_implies() -> None:
    equal, rows, held = written(Net(lambda x, w, b: F.rms_norm(x.half().float() * b, (4,))))
    assert (equal, rows) == (set(), {"+1 mul -1 p_b -1 to_1", "+2 mul -1 rms_norm.eps=1.19209e-07"})
    assert held == {"x": ENTERS, "to_1": "to has no equation", "rms_norm": "rms_norm takes it as it is"}


def test_attention_has_the_scale_that_it_implies() -> None:
    """Queries and keys share what the scale makes up for; values give the scale of the result."""

    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x[None], x[None] * 2, x[None].split(2, 1)[0].repeat(1, 2, 1))

    equal, rows, _ = written(Net(function))
    assert equal >= {"repeat = scaled_dot_product_attention", "repeat = split", "split = unsqueeze_2"}
    assert rows == {
        "+1 mul -1 mul.other=2 -1 unsqueeze_1", "+2 j0 -1 mul -1 unsqueeze",
        "+2 j0 +1 scaled_dot_product_attention.scale=0.5",
    }  # fmt: skip


def test_zeros_and_infinities_keep_their_value_at_any_scale_and_other_numbers_do_not() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = torch.where(x > 0, (x * 2.0).masked_fill(x > 1, -INF), 0.0).clamp(-1.0, INF)
        return y.masked_fill(x > 2, NAN)

    equal, rows, held = written(Net(function))
    assert rows == {"+1 mul -1 mul.other=2 -1 x"}
    assert equal == {
        "j0 = x", "gt_1.other=1 = x", "gt_2.other=2 = x", "j1 = mul", "masked_fill = mul", "j2 = masked_fill",
        "masked_fill = where", "clamp = where", "clamp.min=-1 = where", "clamp.min=-1 = j3", "clamp = masked_fill_1",
    }  # fmt: skip
    assert held == {"x": ENTERS, "clamp": "masked_fill takes it as it is", "masked_fill_1": LEAVES}  # NaN stays


def test_each_result_of_a_split_has_the_exponent_of_the_whole() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
        one, other = (x * b).split(2, -1)
        return one.relu(), torch.cat([other, other.neg()])

    equal, _, held = written(Net(function))
    assert equal == {
        "mul = split[1]", "split = split[1]", "relu = split", "neg = split[1]", "cat = split[1]",
    }  # fmt: skip
    assert held == {"x": ENTERS, "relu": LEAVES, "cat": LEAVES}


def test_readers_of_a_break_read_the_product() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
        y = x.relu()
        return y * 2.0, y.neg(), y.abs()

    breaks = {"relu": frozenset({"mul", "abs_1"})}
    equal, rows, held = written(Net(function), breaks)
    assert equal == {"relu = x", "neg = relu", "abs_1 = relu_rescaled"}
    assert rows == {"+1 relu -1 relu_rescaled +1 relu_rescaled.other=1", "+1 mul -1 mul.other=2 -1 relu_rescaled"}
    assert held == {"x": ENTERS, "mul": LEAVES, "neg": LEAVES, "abs_1": LEAVES}
    system, _ = read(Net(function), breaks)
    assert (system.breaks, system.readers) == ({"relu_rescaled": "relu"}, breaks)


def test_weights_that_share_memory_have_one_exponent() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
            self.register_buffer("count", torch.arange(4))
            self.register_buffer("view", self.w.detach().view(16)[:4])
            self.register_buffer("other", torch.ones(4))

        def forward(self, x: torch.Tensor) -> Any:
            return x @ self.w + self.b, self.count * 2, self.view + self.other

    equal, _, _ = written(Tied())
    assert "b_view = p_w" in equal
    assert not {pair for pair in equal if pair in {"p_b = p_w", "b_other = p_w", "b_other = p_b"}}


def test_buffers_that_are_written_into_keep_their_value() -> None:
    class Counting(Net):
        def forward(self, x: torch.Tensor) -> Any:
            self.state.add_(x[0])
            return x * self.b

    _, _, held = written(Counting(lambda x, w, b: x))
    assert held["b_state"] == "the program writes into it"
    assert held["x"] == ENTERS
    assert "p_b" not in held


def test_storage_that_is_written_into_has_one_exponent() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = x * b
        y.view(-1).mul_(2.0)
        return y.relu() * b

    equal, rows, _ = written(Net(function))
    assert equal == {"mul = view", "mul_ = view", "mul = relu"}
    assert rows == {"+1 mul -1 p_b -1 x", "+1 mul_ -1 mul_.other=2 -1 view", "+1 mul_1 -1 p_b -1 relu"}


@pytest.mark.parametrize(
    ("text", "chains"),
    [
        ("", ()),
        ("out = self", (((Term("out"),), (Term("self"),)),)),
        ("out = 0", (((Term("out"),), ()),)),
        ("out = self + 2 other - j", (((Term("out"),), (Term("self"), Term("other", 2), Term("j", -1))),)),
        (
            "out = sum tensors; 2 a = b ;",
            (((Term("out"),), (Term("tensors", 1, True),)), ((Term("a", 2),), (Term("b"),))),
        ),
        ("out0 = out1 = x", (((Term("out0"),), (Term("out1"),), (Term("x"),)),)),
    ],
)
def test_a_line_of_the_table_is_read_as_chains(text: str, chains: Any) -> None:
    assert parsed(text) == chains
