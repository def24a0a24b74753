"""What one input must be: each complaint, and the inputs on both sides of it."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from calibcast.calib.errors import BatchError
from calibcast.calib.input_checks import Leaf, Place, check_leaf, check_sizes, sizes_of_symbols

BATCH, CALL = Place(3).of("x"), Place(None).of("x")
N, M = sympy.Symbol("n"), sympy.Symbol("m")
IMAGE = Leaf("x", torch.float32, (N, 3, 32, 48))


def complaint(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except BatchError as error:
        return str(error)
    return ""


def test_places_say_where_and_what_to_do() -> None:
    assert [str(p) for p in (Place(3), BATCH, Place(None), CALL)] == [
        "batch 3", "batch 3, argument x", "the call", "the call, argument x",
    ]  # fmt: skip
    assert (BATCH.here, CALL.here) == ("in transform=", "before the call")
    assert "transform=" in BATCH.hint
    assert CALL.hint == "Call it as the model is called."
    assert (BATCH.only("text"), CALL.only("text")) == ("text", "")


def test_leaves_are_shown_as_what_they_are() -> None:
    assert str(IMAGE) == "float32[n, 3, 32, 48]"
    assert str(Leaf("k", None, (N,))) == "an int n"
    assert str(Leaf("mode", None, (), "fast")) == "the constant 'fast'"


@pytest.mark.parametrize(
    ("leaf", "value", "said"),
    [
        (Leaf("k", None, (N,)), 5, ""),
        (Leaf("k", None, (N,)), 5.0, "expected an int n, got a float"),
        (Leaf("mode", None, (), "fast"), "fast", ""),
        (Leaf("mode", None, (), "fast"), "slow", "exported with the constant 'fast', got 'slow'"),
        (Leaf("mode", None, (), None), None, ""),
        (Leaf("mode", None, (), None), torch.ones(1), "got a tensor"),
        (Leaf("mode", None, (), 1.0), 1, ""),
        (Leaf("mode", None, (), 1), torch.ones(1), "got a tensor"),
        (Leaf("x", torch.float32, (2,)), torch.ones(2), ""),
        (Leaf("x", torch.float32, (2,)), [1.0, 2.0], "expected a tensor float32[2], got a list"),
        (Leaf("x", torch.float32, (2,)), torch.ones(2).to_sparse(), "got a sparse_coo tensor. Make it dense"),
        (Leaf("x", torch.float32, (2,)), torch.ones(2).half(), "got float16[2]: another dtype. Convert in transform="),
        (Leaf("x", torch.float32, (2,)), torch.ones(2, 1), "got float32[2, 1]: 2 dimensions, not 1"),
        (Leaf("x", torch.float32, ()), torch.tensor(1.0), ""),
    ],
)  # fmt: skip
def test_an_input_has_its_kind_type_and_dimensions(leaf: Leaf, value: Any, said: str) -> None:
    found = complaint(check_leaf, leaf, value, BATCH)
    assert (said in found) if said else not found


def test_only_batches_are_told_of_datasets() -> None:
    leaf = Leaf("x", torch.float32, (2,))
    assert "with_format('torch')" in complaint(check_leaf, leaf, [1.0], BATCH)
    assert "with_format" not in complaint(check_leaf, leaf, [1.0], CALL)


def test_a_nested_tensor_is_no_dense_one() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert "got a nested tensor" in complaint(check_leaf, Leaf("x", torch.float32, (2, 3)), nested, BATCH)


def test_symbols_take_the_first_size_that_is_theirs_alone() -> None:
    leaves = [Leaf("k", None, (M,)), Leaf("x", torch.float32, (2 * N, 3)), Leaf("y", torch.float32, (N, 4, N))]
    values = [7, torch.ones(8, 3), torch.ones(4, 4, 5)]
    assert sizes_of_symbols(zip(leaves, values, strict=True)) == {M: 7, N: 4}


def sized(value: Any, leaf: Leaf = IMAGE, sizes: dict[Any, int] | None = None, at: Place = BATCH, **bounds: Any) -> str:
    return complaint(check_sizes, leaf, value, sizes or {}, {N: bounds.get("n", (0, None))}, at)


def test_sizes_are_those_of_the_export() -> None:
    assert sized(torch.ones(5, 3, 32, 48), sizes={N: 5}) == ""
    said = sized(torch.ones(5, 3, 32, 40), sizes={N: 5})
    assert (
        "got float32[5, 3, 32, 40]: dimension 3 is 40, not 48. Export the program with that dimension dynamic" in said
    )
    assert "DataLoader(drop_last=True)" in said
    assert "or give that size." in sized(torch.ones(5, 3, 32, 40), sizes={N: 5}, at=CALL)
    assert "dimension 0 is 5, but n is 4 in this batch." in sized(torch.ones(5, 3, 32, 48), sizes={N: 4})
    assert "dimension 0 is 5, but n is 4." in sized(torch.ones(5, 3, 32, 48), sizes={N: 4}, at=CALL)
    double = Leaf("x", torch.float32, (2 * N,))
    assert sized(torch.ones(8), double, {N: 4}) == ""
    assert "dimension 0 is 9, but 2*n is 8 in this batch" in sized(torch.ones(9), double, {N: 4})
    assert sized(torch.ones(9), double) == ""  # nothing says what n is


@pytest.mark.parametrize(
    ("size", "bounds", "fine"), [(2, (2, 8), 1), (1, (2, 8), 0), (8, (2, 8), 1), (9, (2, 8), 0), (99, (2, None), 1)]
)
def test_sizes_are_in_the_exported_range(size: int, bounds: tuple[int, int | None], fine: int) -> None:
    leaf = Leaf("x", torch.float32, (N,))
    said = sized(torch.ones(size), leaf, {N: size}, n=bounds)
    assert (said == "") is bool(fine)
    if not fine:
        assert f"outside the exported range 2 to {bounds[1]} of n" in said
    assert "2 to infinity" in sized(torch.ones(1), leaf, {N: 1}, n=(2, None))


def test_an_integer_has_a_range_too() -> None:
    leaf = Leaf("k", None, (N,))
    assert sized(5, leaf, {N: 5}, n=(0, 9)) == ""
    assert "expected an int n, got 10: it is 10, outside the exported range 0 to 9" in sized(
        10, leaf, {N: 10}, n=(0, 9)
    )


@pytest.mark.parametrize(
    ("sizes", "shape", "order"),
    [
        ((N, 3, 32, 48), (5, 32, 48, 3), "(0, 3, 1, 2)"),
        ((N, 4, 32, 48), (5, 32, 48, 4), "(0, 3, 1, 2)"),
        ((N, 5, 32, 48), (5, 32, 48, 5), None),  # too many to be colours
        ((3, 32, 48), (32, 48, 3), "(2, 0, 1)"),
        ((N, 1, 8, 32, 48), (5, 8, 32, 48, 1), "(0, 4, 1, 2, 3)"),
        ((N, 3, 32, 48), (5, 32, 40, 3), None),  # does not fit then, either
        ((N, 3), (3, 5), None),
    ],
)
def test_channels_that_come_last_get_the_permutation(
    sizes: tuple[Any, ...], shape: tuple[int, ...], order: str | None
) -> None:
    said = sized(torch.ones(shape), Leaf("x", torch.float32, sizes))
    assert (f".permute{order} in transform=" in said) if order else ("permute" not in said)
