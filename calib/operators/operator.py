"""What can be said of an ATen operator: one entry of the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What an operator forms inside that no tensor shows.
SUM, SQUARES, EXPONENTIALS, LOGITS = "sum", "sum of squares", "sum of exponentials", "attention logits"
# Along which dimensions of its input: those of its argument `dim` (all, without one); the last ones, as many as
# `normalized_shape` has; the groups of its channels; all after the channels; a window that moves.
DIM, LAST, GROUPS, SPATIAL, WINDOW = "dim", "last", "groups", "spatial", "window"
# How it forms sums of products.
CONVOLUTION, TRANSPOSED, MATRIX, CONTRACTION, RECURRENT, ATTENTION = (
    "convolution",
    "transposed convolution",
    "matrix product",
    "contraction",
    "recurrent",
    "attention",
)
# What an error of an argument becomes. A share of the value stays a share (products, powers); it stays as large as it
# was, or gets smaller (a slope of at most about 1); as it is, it becomes a share of the result (exponentials); a share
# becomes an error as it is (logarithms); it tips elements over to the next step; it changes an order.
SHARE, SAME, EXPONENT, LOGARITHM, STEP, ORDER = "share", "same", "exponent", "logarithm", "step", "order"
# What it does to a mask: picks it or something else, or computes with it.
CHOOSES, COMPUTES = "chooses", "computes"


@dataclass(frozen=True, slots=True)
class Pole:
    """Where a result grows without bound, or with unbounded slope, as one argument comes near to a value.

    argument: its position. at: the value. exponent: position of a number that has to be negative for it, as of `pow`.
    """

    argument: int = 0
    at: float = 0.0
    exponent: int | None = None


@dataclass(frozen=True, slots=True)
class Training:
    """Where an operator is told to behave as in training.

    flag: the argument that says so. share: the one that says how much is dropped; of 0 nothing is. statistics: the one
    for running statistics, without which a norm has its batch's own in evaluation, too.
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
        moves: its results are elements of its arguments. In evaluation, `dropout` does that.
        shares: the argument that it may give back itself, or a view of, though its schema says nothing.
        fresh_of_several: but not where it is given several tensors.
        writes_nothing: in place it only drops gradient history, whatever its schema says.

    Sums:
        hides, along: what it forms inside, and along which dimensions.
        groups_at: the argument that says how many groups of channels.
        window: over how many dimensions its window goes.
        adaptive: it is told the size of its result, not that of its window.
        centred: it takes the mean away before it squares.
        product: how it sums products, if it does.
        left: where the left operand of the product is.
        transposed_at: the argument that makes a transposed convolution of it.

    Masks, which are numbers at or below -1e4 that stand for "not this one":
        mask_at: the argument where it reads one.
        masks: what else it does to one.
        selects: it gives elements chosen by their order. compares: it asks for that order.

    Types:
        converts: it gives its input in a type that it states.
        asserts: it only checks a type.
        bitcasts: overloads that read the bits of their input as another type.

    Numbers:
        literals: arguments that become values of a tensor.
        epsilon: the argument that it adds to a variance. variance_at: the argument that is this variance, where it is
            given; the mean stands before it.
        fills: its result is such a number, everywhere.
        checks_numbers: its half-precision kernels raise where such a number is too large; others make inf of it.

    Sensitivity:
        keeps_rounded: it adds no rounding to what is rounded already: its results are elements of its input, negated or
            set to zero.
        steps: its floating-point results change in steps, which its gradient does not show.
        bias_along: the dimension of its result along which its bias lies, which is added to it; counted from the end.
        error: what an error of its first argument becomes; of products, sums and norms, what they are says it.
        places: the argument with coordinates, from -1 to 1, by which it looks elements of the first up.
        poles: where a small difference of an argument makes a large one of its result.
        keeps_poles: it is small where its input is, so a pole of its reader is one of its input.
        hands_on: of a small input it makes a small result, and of one that is off by a share one off by such a share.
        adds: it gives the sum or the difference of its first two arguments. subtracts: the difference.
        powers: its first argument to the power of its second. power: to a power of its own.
        averages: it divides its sum by the number of terms.
        takes_offset: it may take away what all elements have in common, and leave what tells them apart.

    wrong_on_host: its half-precision kernels for CPUs are there, and wrong.
    never_low: no target runs it in half precision.

    Memory and state:
        empties: it makes a tensor without values.
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
        """Whether the entry says something in a field; position 0 is something."""
        value = getattr(self, field)
        return value is not None and value is not False and value not in ("", ())


def operator(names: str, **does: Any) -> Operator:
    """One operator. names: its own, then its aliases."""
    name, *aliases = names.split()
    return Operator(name, tuple(aliases), **does)


def alike(names: str, **does: Any) -> tuple[Operator, ...]:
    """Operators of which the same is said."""
    return tuple(Operator(name, **does) for name in names.split())
