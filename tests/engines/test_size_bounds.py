"""Sizes inside a program from those of its inputs, and an engine's profile held against them."""

import pytest
import sympy
import torch
from calibcast.calib import BuildError
from calibcast.calib.batches import signature_of
from calibcast.engines.tensorrt.builder.size_bounds import (
    bounds_of,
    check_profile_read_back,
    shape_bounds,
    sizes_in_graph,
    symbol_sizes,
)
from torch import nn
from torch.export import Dim
from torch.utils._sympy.functions import FloorDiv, Mod

s, t = sympy.Symbol("s0", integer=True, positive=True), sympy.Symbol("s1", integer=True, positive=True)


@pytest.mark.parametrize(
    ("size", "bounds"),
    [
        (3, (3, 3, 3)),
        (s, (4, 6, 9)),
        (2 * s + 1, (9, 13, 19)),
        (FloorDiv(s, 2), (2, 3, 4)),
        (Mod(s, 4), (0, 2, 3)),  # the ends alone say 0 to 1
        ((s - 6) ** 2, (0, 0, 9)),
        (s * t, (4, 12, 27)),
        (s + t, (5, 8, 12)),
    ],
)
def test_the_bounds_of_a_size_are_those_of_its_values(size, bounds):
    assert bounds_of(size, {"s0": (4, 6, 9), "s1": (1, 2, 3)}) == bounds


def test_bounds_by_intervals_are_never_too_narrow():
    least, usual, largest = bounds_of(s - FloorDiv(s, 2), {"s0": (1, 100, 10000)})
    assert least <= 1
    assert usual == 50
    assert largest >= 5000


def test_a_symbol_that_no_input_has_is_not_known():
    assert bounds_of(s + t, {"s0": (4, 6, 9)}) is None
    assert shape_bounds([3, 5], {}) == ((3, 5), (3, 5), (3, 5))


class Pair(nn.Module):
    def forward(self, x, y):
        return torch.cat([x, y]).sum(0)


def test_a_symbol_that_stands_alone_nowhere_is_solved_for():
    rows = Dim("rows", min=2, max=64)
    program = torch.export.export(Pair(), (torch.ones(6, 3), torch.ones(7, 3)), dynamic_shapes=({0: 2 * rows}, None))
    found = symbol_sizes(signature_of(program), [((8, 3), (12, 3), (20, 3)), ((7, 3), (7, 3), (7, 3))])
    assert list(found.values()) == [(4, 6, 10)]


def test_sizes_are_found_by_the_names_that_the_graph_has():
    """Of a size that the user calls `batch`, the graph says `s77`: engines were built for the whole of its range."""
    batch = Dim("batch", min=1, max=16)
    program = torch.export.export(Pair(), (torch.ones(6, 3), torch.ones(7, 3)), dynamic_shapes=({0: batch}, None))
    sizes = sizes_in_graph(program, [((2, 3), (5, 3), (7, 3)), ((7, 3), (7, 3), (7, 3))])
    value = next(node.meta["val"] for node in program.graph.nodes if node.name == "x")
    assert shape_bounds(value.shape, sizes) == ((2, 3), (5, 3), (7, 3))


def test_a_profile_that_was_not_asked_for_is_an_error():
    asked = {"x": ((4, 8), (7, 8), (7, 8)), "y": ((2,), (2,), (2,))}
    check_profile_read_back("engine", asked, {"x": asked["x"]})
    with pytest.raises(
        BuildError, match=r"engine: input x was built for \[1, 8\] to \[512, 8\] .*\[4, 8\] to \[7, 8\]"
    ):
        check_profile_read_back("engine", asked, {"x": ((1, 8), (9, 8), (512, 8))})
