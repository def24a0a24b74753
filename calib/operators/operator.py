"""One entry of the table: the facts about an ATen operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What an operator forms inside, which no tensor shows.
SUM, SQUARES, EXPONENTIALS, LOGITS = "sum", "sum of squares", "sum of exponentials", "attention logits"
# The dimensions of its input along which it forms that: those of its argument `dim` (all, without one); the last ones,
# as many as `normalized_shape` has; the groups of its channels; all after the channels; a window that moves.
DIM, LAST, GROUPS, SPATIAL, WINDOW = "dim", "last", "groups", "spatial", "window"
# The kind of product that it sums.
CONVOLUTION, TRANSPOSED, MATRIX, CONTRACTION, RECURRENT, ATTENTION = (
    "convolution",
    "transposed convolution",
    "matrix product",
    "contraction",
    "recurrent",
    "attention",
)
# What an error of an argument becomes in the result. SHARE: a relative error stays relative (products, powers). SAME:
# an absolute error stays as large, or gets smaller (a slope of at most about 1). EXPONENT: an absolute error becomes a
# relative one (exponentials). LOGARITHM: a relative error becomes an absolute one (logarithms). STEP: it moves elements
# to another step. ORDER: it changes the order of elements.
SHARE, SAME, EXPONENT, LOGARITHM, STEP, ORDER = "share", "same", "exponent", "logarithm", "step", "order"
# What it does to a mask: it chooses between the mask and other values, or computes with it.
CHOOSES, COMPUTES = "chooses", "computes"


@dataclass(frozen=True, slots=True)
class Pole:
    """A value of one argument near which the result, or its slope, grows without bound.

    argument: its position. at: the value. exponent: position of a number that must be negative for a pole, as in `pow`.
    """

    argument: int = 0
    at: float = 0.0
    exponent: int | None = None


@dataclass(frozen=True, slots=True)
class Training:
    """The arguments that make an operator behave as in training.

    flag: the argument that says so. share: the argument that says how much is dropped; 0 drops nothing. statistics: the
    argument with running statistics; without them, a norm uses the batch's own statistics in evaluation, too.
    """

    flag: int
    share: int | None = None
    statistics: int | None = None


@dataclass(frozen=True, slots=True)
class Operator:
    """What one ATen operator does. Arguments are given by their position in its schema, counted from 0.

    An operator is named without overload and in-place mark: `add` stands for `aten.add.Tensor` and `aten.add_.Scalar`.

    name: as torch calls it. aliases: other names under which torch exports the same operator (`divide` of `div`).

    Movement:
        moves: its results are elements of its arguments. In evaluation, this is true for `dropout`.
        shares: the argument that it may return, or return a view of, although its schema does not say so.
        fresh_of_several: if it gets several tensors, `shares` does not apply, and its result is new.
        writes_nothing: its in-place form only drops gradient history, although its schema says that it writes.

    Sums:
        hides, along: what it forms inside, and along which dimensions.
        groups_at: the argument with the number of groups of channels.
        window: the number of dimensions of its window.
        adaptive: its argument is the size of its result, not that of its window.
        centred: it subtracts the mean before it squares.
        product: the kind of product that it sums, if any.
        left: the position of the left operand of the product.
        transposed_at: the argument that makes it a transposed convolution.

    Masks, which are numbers at or below -1e4 that stand for "not this one":
        mask_at: the argument in which it reads a mask.
        masks: what else it does to a mask.
        selects: it gives elements chosen by their order. compares: it compares elements by their order.
        equates: it asks whether elements are equal.

    Types:
        converts: it converts its input to a type that it states.
        asserts: it only checks a type.
        bitcasts: overloads that read the bits of their input as another type.

    Numbers:
        literals: arguments that become values of a tensor.
        epsilon: the argument that it adds to a variance. variance_at: the argument that is this variance, where it is
            given; the argument before it is the mean.
        fills: every element of its result is such a literal.
        checks_numbers: its half-precision kernels raise if a literal is too large; other operators turn it into inf.

    Sensitivity:
        keeps_rounded: if its input is rounded, its result needs no rounding: it has elements of its input, negated or
            set to zero; or replaced by numbers in its call (`literals`), where these are rounded, too.
        steps: its floating-point results change in steps, which its gradient does not show.
        bias_along: the dimension of its result along which its bias is added, counted from the end.
        error: what an error of its first argument becomes. Products, sums and norms have their own fields instead.
        slopes: although it steps, between the steps an error stays as large: it removes whole periods.
        angle: it gives the angle of a vector, whose coordinates are its second and its first argument.
        multiplies: it multiplies the elements along a dimension, so that their relative errors add up.
        places: the argument with coordinates, from -1 to 1, at which it reads elements of its first argument.
        poles: where a small change of an argument makes a large change of its result.
        keeps_poles: its result is small where its input is, so a pole of its reader is also a pole of its input.
        hands_on: a small input gives a small result, and a relative error of the input a similar one of the result.
        adds: it gives the sum or the difference of its first two arguments. subtracts: the difference.
        powers: its first argument to the power of its second. power: to this fixed power.
        averages: it divides its sum by the number of terms.
        takes_offset: it may remove an offset that all elements share, and leave only their differences.

    wrong_on_host: its half-precision kernels for CPUs exist, but are wrong.
    never_low: no target runs it in half precision.

    Memory and state:
        empties: it makes an uninitialised tensor.
        overwrites: it writes all of its first argument, and reads none of it.
        training: how it is told to behave as in training.
    """

    name: str
    aliases: tuple[str, ...] = ()
    moves: bool = False
    shares: int | None = None
    fresh_of_several: bool = False
    writes_nothing: bool = False
    hides: str = ""
    along: str = DIM
    groups_at: int | None = None
    window: int = 0
    adaptive: bool = False
    centred: bool = False
    product: str = ""
    left: int = 0
    transposed_at: int | None = None
    mask_at: int | None = None
    masks: str = ""
    selects: bool = False
    compares: bool = False
    equates: bool = False
    converts: bool = False
    asserts: bool = False
    bitcasts: tuple[str, ...] = ()
    literals: tuple[str, ...] = ()
    epsilon: str = ""
    variance_at: int | None = None
    fills: bool = False
    checks_numbers: bool = False
    keeps_rounded: bool = False
    steps: bool = False
    bias_along: int | None = None
    error: str = ""
    slopes: bool = False
    angle: bool = False
    multiplies: bool = False
    places: int | None = None
    poles: tuple[Pole, ...] = ()
    keeps_poles: bool = False
    hands_on: bool = False
    adds: bool = False
    subtracts: bool = False
    powers: bool = False
    power: float = 1.0
    averages: bool = False
    takes_offset: bool = False
    wrong_on_host: bool = False
    never_low: bool = False
    empties: bool = False
    overwrites: bool = False
    training: Training | None = None

    def says(self, field: str) -> bool:
        """Whether a field of the entry is set; position 0 counts as set."""
        value = getattr(self, field)
        return value is not None and value is not False and value not in ("", ())


def operator(names: str, **does: Any) -> Operator:
    """One operator. names: its own, then its aliases."""
    name, *aliases = names.split()
    return Operator(name, tuple(aliases), **does)


def alike(names: str, **does: Any) -> tuple[Operator, ...]:
    """Several operators whose entries differ only in the name."""
    return tuple(Operator(name, **does) for name in names.split())
