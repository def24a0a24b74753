"""What one input of a program must be, and an error that says what came instead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from calibcast.calib.errors import BatchError
from calibcast.calib.graph import dtype_name

_FORMAT = ", or use .with_format('torch') of a datasets.Dataset"


@dataclass(frozen=True)
class Place:
    """Where an input came from, for messages: a batch of a dataloader, or (batch None) a call."""

    batch: int | None
    argument: str = ""

    def __str__(self) -> str:
        at = "the call" if self.batch is None else f"batch {self.batch}"
        return f"{at}, argument {self.argument}" if self.argument else at

    def of(self, argument: str) -> Place:
        return Place(self.batch, argument)

    @property
    def hint(self) -> str:
        """What to do about an input that has another structure."""
        if self.batch is None:
            return "Call it as the model is called."
        return "Give transform=, a function from your batch to the model's inputs."

    @property
    def here(self) -> str:
        """Where a value can be converted."""
        return "before the call" if self.batch is None else "in transform="

    def only(self, batches: str) -> str:
        """The text `batches`, which is about batches only; "" for a call."""
        return "" if self.batch is None else batches


@dataclass(frozen=True)
class Leaf:
    """One flat input of a program: a tensor with its sizes (int or sympy expression), or a constant.

    An integer that the export left open has no dtype and one size: itself.
    """

    name: str
    dtype: torch.dtype | None
    sizes: tuple[Any, ...]
    constant: Any = None

    def __str__(self) -> str:
        if self.dtype is None:
            return f"an int {self.sizes[0]}" if self.sizes else f"the constant {self.constant!r}"
        return f"{dtype_name(self.dtype)}[{', '.join(map(str, self.sizes))}]"


def check_leaf(leaf: Leaf, value: Any, at: Place) -> None:
    if leaf.dtype is None and leaf.sizes:
        if not isinstance(value, int):
            raise BatchError(f"{at}: expected {leaf}, got a {type(value).__name__}. {at.hint}")
        return
    if leaf.dtype is None:
        # A tensor compares element by element, so only a plain True means equal.
        if value is not leaf.constant and (value == leaf.constant) is not True:
            came = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
            raise BatchError(f"{at}: the program was exported with {leaf}, got {came}. Export it with that value.")
        return
    if not isinstance(value, torch.Tensor):
        how = f"Convert it {at.here}{from_numpy(value)}{at.only(_FORMAT)}"
        raise BatchError(f"{at}: expected a tensor {leaf}, got a {type(value).__name__}. {how}.")
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise BatchError(f"{at}: expected {leaf}, got a {kind} tensor. Make it dense {at.here}.")
    if value.dtype != leaf.dtype:
        came = f"{dtype_name(value.dtype)}{list(value.shape)}"
        raise BatchError(f"{at}: expected {leaf}, got {came}: another dtype. {_converted(leaf, value, at)}")
    if value.dim() != len(leaf.sizes):
        came = f"{dtype_name(value.dtype)}{list(value.shape)}"
        single = value.dim() == len(leaf.sizes) - 1
        hint = f" If the first dimension is missing, add it {at.here}: .unsqueeze(0)." if single else ""
        raise BatchError(f"{at}: expected {leaf}, got {came}: {value.dim()} dimensions, not {len(leaf.sizes)}.{hint}")


def from_numpy(value: Any) -> str:
    """How a value of numpy becomes a tensor, for the end of a sentence; "" for other values."""
    return " with torch.from_numpy" if type(value).__module__ == "numpy" else ""


def _converted(leaf: Leaf, value: Any, at: Place) -> str:
    """How to make a tensor of another type into what a leaf wants, also where it is an image with its channels last."""
    order = _channels_last(leaf, value)
    moved = "" if order is None or _fits(leaf, value.shape) else f".permute{order}"
    convert = f"{moved}.to(torch.{dtype_name(leaf.dtype)})" if leaf.dtype is not None else moved
    channels = " The channels come last, and the program wants them first." if moved else ""
    pixels = leaf.dtype is not None and leaf.dtype.is_floating_point and value.dtype == torch.uint8
    scale = ", and scale the pixels as in training" if pixels else ""
    return f"Convert {at.here}, for example {convert}{scale}.{channels}"


def _fits(leaf: Leaf, shape: Iterable[int]) -> bool:
    return all(not isinstance(size, int) or size == came for size, came in zip(leaf.sizes, shape, strict=True))


def _shape(leaf: Leaf, value: Any) -> tuple[int, ...]:
    """The sizes of an input of a batch, in the order of `leaf.sizes`."""
    if leaf.dtype is None:
        return (value,) if leaf.sizes else ()
    return tuple(value.shape)


def sizes_of_symbols(inputs: Iterable[tuple[Leaf, Any]]) -> dict[Any, int]:
    """The value of each symbolic size in this batch, read from the first dimension that is this symbol alone."""
    sizes: dict[Any, int] = {}
    for leaf, value in inputs:
        for expected, size in zip(leaf.sizes, _shape(leaf, value), strict=True):
            if not isinstance(expected, int) and expected.is_Symbol:
                sizes.setdefault(expected, size)
    return sizes


def check_sizes(
    leaf: Leaf, value: Any, sizes: dict[Any, int], bounds: dict[Any, tuple[int, int | None]], at: Place
) -> None:
    # An engine checks its inputs on every call, so the message is only built when an input is wrong: printing a tensor
    # copies it from the GPU, which can take longer than the network.
    for dimension, (expected, size) in enumerate(zip(leaf.sizes, _shape(leaf, value), strict=True)):
        if isinstance(expected, int):
            if size != expected:
                if (order := _channels_last(leaf, value)) is not None:
                    raise BatchError(
                        f"{at}: {_came(leaf, value, dimension)} is {size}, not {expected}. The channels come last, and "
                        f"the program wants them first: .permute{order} {at.here}."
                    )
                of_size = at.only("batches of that size (DataLoader(drop_last=True) for the last one)") or "that size"
                raise BatchError(
                    f"{at}: {_came(leaf, value, dimension)} is {size}, not {expected}. Export the program with that "
                    f"dimension dynamic (dynamic_shapes=), or give {of_size}."
                )
            continue
        wanted = sizes[expected] if expected in sizes else expected.subs(sizes)
        if isinstance(wanted, (int, sympy.Integer)) and int(wanted) != size:
            came = _came(leaf, value, dimension)
            raise BatchError(f"{at}: {came} is {size}, but {expected} is {int(wanted)}{at.only(' in this batch')}.")
        low, high = bounds.get(expected, (0, None))
        if size < low or (high is not None and size > high):
            most = "infinity" if high is None else high
            came = _came(leaf, value, dimension)
            raise BatchError(f"{at}: {came} is {size}, outside the exported range {low} to {most} of {expected}.")


def _channels_last(leaf: Leaf, value: Any) -> tuple[int, ...] | None:
    """How to permute an image whose channels come last, [batch, .., channels], where that makes its sizes fit."""
    if not isinstance(value, torch.Tensor) or value.dim() not in (3, 4, 5) or value.dim() != len(leaf.sizes):
        return None
    first = 0 if value.dim() == 3 else 1  # without a batch, as datasets of single images give them
    order = (*range(first), value.dim() - 1, *range(first, value.dim() - 1))
    moved = [value.shape[at] for at in order]
    few = isinstance(leaf.sizes[first], int) and leaf.sizes[first] in (1, 2, 3, 4)
    return order if few and _fits(leaf, moved) else None


def _came(leaf: Leaf, value: Any, dimension: int) -> str:
    if not isinstance(value, torch.Tensor):
        return f"expected {leaf}, got {value}: it"
    return f"expected {leaf}, got {dtype_name(value.dtype)}{list(value.shape)}: dimension {dimension}"
