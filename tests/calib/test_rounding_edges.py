"""The edges of a program: who made a tensor, who reads it, and what only moves it in between."""

from __future__ import annotations

import pytest
import torch
from calibcast.calib.rounding_edges import Edge, rounding_edges
from calibcast.calib.rounding_table import ROUNDING_SCHEMA, empty_rounding, rounding_gaps
from torch import nn


class Net(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


def edges_of(function: object, *inputs: torch.Tensor) -> set[Edge]:
    return set(rounding_edges(torch.export.export(Net(function), inputs)))


def test_movers_are_transparent_and_named() -> None:
    """An edge leads from the product to the sine, and names the view and the slice between."""
    found = edges_of(lambda x: (x * x).view(6)[:4].sin(), torch.rand(2, 3))
    assert found == {
        Edge("mul", "inputs_0", 0),
        Edge("sin", "mul", 0, ("view", "slice_1")),
        Edge("output", "sin", 0),
    }


def test_a_fill_or_a_bound_by_a_number_that_is_held_is_transparent() -> None:
    """What a fill passes on is rounded once: an edge leads through it, as through a clamp, a padding and a ReLU."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad((x * x).masked_fill(x > 0, -torch.inf).clamp(0, 6).relu(), (1, 1), value=-1.0).sin()

    movers = {"masked_fill", "clamp", "relu", "pad"}
    [edge] = [e for e in edges_of(function, torch.rand(2, 3)) if e.node == "sin"]
    assert (edge.input, set(edge.movers)) == ("mul", movers)


def test_a_mask_value_that_is_rounded_is_an_edge_of_its_own() -> None:
    """bfloat16 rounds -1e4: the fill is transparent all the same, as any number as low stands for the same."""
    found = edges_of(lambda x: (x * x).masked_fill(x > 0, -1e4).softmax(-1), torch.rand(2, 3))
    assert Edge("softmax", "mul", 0, ("masked_fill",)) in found
    assert Edge("masked_fill", "literal:value", 0) in found


@pytest.mark.parametrize("number", [0.1, -1e9, 1e5], ids=["not exact", "beyond fp16", "no mask"])
def test_a_number_that_rounding_changes_makes_a_tensor_of_its_own(number: float) -> None:
    found = edges_of(lambda x: (x * x).masked_fill(x > 0, number).sin(), torch.rand(2, 3))
    assert {(e.node, e.input) for e in found if e.node in {"masked_fill", "sin"}} == {
        ("masked_fill", "mul"),
        ("masked_fill", "literal:value"),
        ("sin", "masked_fill"),
    }


def test_a_choice_between_two_tensors_is_no_mover() -> None:
    """Each may be rounded apart from what was chosen of it."""
    found = edges_of(lambda x: torch.where(x > 0, x.sin(), x.cos()).exp(), torch.rand(2, 3))
    assert Edge("exp", "where", 0) in found


def test_the_magnitude_of_complex_numbers_is_made_anew() -> None:
    """`abs` only negates real numbers; of complex ones it makes others, which are rounded."""
    found = edges_of(lambda x: torch.view_as_complex(x).abs().sin(), torch.rand(3, 2))
    assert Edge("sin", "abs_1", 0) in found


def test_literals_are_edges_and_attributes_are_not() -> None:
    """A number that is added is an edge; the eps of a norm is not."""
    found = edges_of(lambda x: nn.functional.layer_norm(x + 1e-6, (3,)), torch.rand(2, 3))
    assert Edge("add", "literal:other", 0) in found
    assert not [edge for edge in found if edge.node == "layer_norm" and edge.is_literal]


def test_a_join_has_an_edge_from_each_maker() -> None:
    """What reads a concatenation reads each of its parts; integers have no edges."""
    found = edges_of(lambda x, i: torch.cat([x.sin(), x.cos()])[i].exp(), torch.rand(4), torch.tensor([1, 2]))
    assert {e.input for e in found if e.node == "exp"} == {"sin", "cos"}
    assert not [e for e in found if e.input == "inputs_1"]


def test_a_write_is_read_by_every_alias() -> None:
    """After `y.add_`, who reads the storage through another view reads what was added."""

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        y[0].add_(x[1])
        return y.sin()

    found = edges_of(function, torch.rand(2, 3))
    assert {e.input for e in found if e.node == "sin"} == {"exp", "add_"}


def test_outputs_of_several_are_told_apart() -> None:
    """The third part of a split is no maker of its own; a value of topk is output 0."""
    found = edges_of(lambda x: x.topk(2)[0].sin(), torch.rand(4))
    assert Edge("sin", "topk", 0) in {Edge(e.node, e.input, e.output) for e in found}


def test_the_empty_frame_has_the_schema() -> None:
    """No evidence is a frame without rows, and without gaps."""
    frame = empty_rounding()
    assert dict(frame.schema) == ROUNDING_SCHEMA
    assert rounding_gaps(frame).height == 0
