"""What each kind of operator asks of its arguments, against numbers worked out by hand.

The tensors have measured magnitudes that are powers of two, so the answers are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from calibcast.passes import TensorFacts
from calibcast.passes.transmission import Need, Seen, asked_of_arguments
from torch import fx, nn

SHARE = 2.0**-20
UP = Need("reader", noise=2.0**-10, most=64.0)  # what a reader needs of a result: an error for all elements
RELATIVE = Need("reader", share=2.0**-12)  # or one for each
INF = math.inf


def tensor(low: float, high: float, rms: float = 1.0, **known: Any) -> TensorFacts:
    return TensorFacts("t", min=low, max=high, absmax=max(abs(low), abs(high)), rms=rms, **known)


PLUS, MINUS, BOTH = tensor(0.5, 4.0, 2.0), tensor(-8.0, -0.5, 4.0), tensor(-4.0, 8.0, 2.0)
# Of the result: rms 4, and nothing nonzero below 1/8.
RESULT = TensorFacts("result", rms=4.0, absmax=16.0, smallest=0.125)


@dataclass
class Asked:
    """An operator on tensors whose facts are given. None in `facts`: nothing is known of that argument."""

    function: Callable[..., Any]
    facts: tuple[TensorFacts | None, ...]
    shapes: tuple[tuple[int, ...], ...] = ((2, 8), (2, 8))
    result: TensorFacts | None = RESULT
    least: float | None = None
    channels: float | None = None

    @cached_property
    def graph(self) -> fx.Graph:
        class Net(nn.Module):
            def forward(net, *args: torch.Tensor) -> Any:  # noqa: N805
                return self.function(*args)

        args = tuple(torch.ones(shape) for shape in self.shapes[: len(self.facts)])
        return torch.export.export(Net(), args).graph

    def by(self, need: Need | None = None, own: Need | None = None, share: float = SHARE) -> list[tuple[int, Need]]:
        """(position of the argument, what is asked of it)."""
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        node = [n for n in self.graph.nodes if n.op == "call_function"][-1]
        known = dict(zip(placeholders, self.facts, strict=True)) | {node: self.result}
        seen = Seen(known.get, lambda n: self.least, lambda n: self.channels)
        return [(placeholders.index(x), found) for x, found in asked_of_arguments(node, need, own, seen, share)]


def through(asked: Asked, need: Need) -> list[tuple[int, Need]]:
    """What the need of the result becomes; what the operator needs by itself is left out."""
    own = asked.by()
    return [
        one for one in asked.by(need) if one not in own and not (one[1].firm and one[1].noise == INF > one[1].share)
    ]


ADD = {
    # (function, facts, need) -> the share or the noise that both get, and `most` of each
    "alike": (torch.add, (PLUS, PLUS), RELATIVE, {"share": 2.0**-12, "floor": 0.125}, (INF, INF)),
    "both below 0": (torch.add, (MINUS, MINUS), RELATIVE, {"share": 2.0**-12, "floor": 0.125}, (INF, INF)),
    "of unlike signs": (torch.add, (PLUS, MINUS), RELATIVE, {"noise": 2.0**-12 / 64}, (INF, INF)),
    "of two signs": (torch.add, (PLUS, BOTH), RELATIVE, {"noise": 2.0**-12 / 64}, (INF, INF)),
    "of both two signs": (torch.add, (BOTH, BOTH), RELATIVE, {"noise": 2.0**-12 / 64}, (INF, INF)),
    "difference of alike": (torch.sub, (PLUS, PLUS), RELATIVE, {"noise": 2.0**-12 / 64}, (INF, INF)),
    "difference of unlike": (torch.sub, (PLUS, MINUS), RELATIVE, {"share": 2.0**-12, "floor": 0.125}, (INF, INF)),
    "difference of two signs": (torch.sub, (BOTH, MINUS), RELATIVE, {"noise": 2.0**-12 / 64}, (INF, INF)),
    "an error for all": (torch.add, (PLUS, MINUS), UP, {"noise": 2.0**-10, "floor": 0.125}, (64.0 + 8.0, 64.0 + 4.0)),
    "beside what is unknown": (torch.add, (PLUS, None), UP, {"noise": 2.0**-10, "floor": 0.125}, (INF, 64.0 + 4.0)),
    "unknown signs may cancel": (torch.add, (PLUS, None), RELATIVE, {"noise": 2.0**-12 / 64}, (INF, INF)),
}


@pytest.mark.parametrize("name", ADD)
def test_sums_hand_on_what_does_not_cancel(name: str) -> None:
    function, facts, need, changes, most = ADD[name]
    wanted = {"noise": INF, "share": INF, "floor": 0.0, **changes}
    expected = [(place, Need("reader", most=most[place], **wanted)) for place in (0, 1)]
    assert through(Asked(function, facts), need) == expected


@pytest.mark.parametrize(
    ("function", "cancels", "most"),
    [
        (lambda x: x + 2.0, False, 66.0),
        (lambda x: x + 0.0, False, 64.0),
        (lambda x: x - 2.0, True, 66.0),
        (lambda x: x + -3.0, True, 67.0),
        (lambda x: x - -3.0, False, 67.0),
        (lambda x: 5.0 - x, True, 69.0),
        (lambda x: -5.0 - x, False, 69.0),
    ],
)
def test_a_number_is_a_term_with_a_sign_and_a_size(function: Any, cancels: bool, most: float) -> None:
    asked = Asked(function, (PLUS,))
    ((_, found),) = through(asked, RELATIVE)
    assert (found.share == INF) is cancels
    ((_, found),) = through(asked, UP)
    assert (found.noise, found.most) == (2.0**-10, most)


W = tensor(-4.0, 4.0, 0.5)
PRODUCTS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], int]] = {
    "matmul": (torch.matmul, ((2, 16), (16, 4)), 16),
    "linear": (F.linear, ((2, 16), (4, 16)), 16),
    "bmm": (torch.bmm, ((3, 2, 16), (3, 16, 4)), 16),
    "mv": (torch.mv, ((2, 16), (16,)), 16),
    "conv1d": (F.conv1d, ((1, 4, 9), (2, 4, 4)), 16),
    "conv_transpose1d": (F.conv_transpose1d, ((1, 4, 9), (4, 2, 4)), 16),
    "einsum": (lambda x, w: torch.einsum("ij, kj -> ik", x, w), ((2, 16), (4, 16)), 16),
    "einsum over two": (lambda x, w: torch.einsum("abj,bj->a", x, w), ((2, 4, 4), (4, 4)), 16),
    "addmm": (lambda x, w: torch.addmm(torch.ones(4), x, w), ((2, 16), (16, 4)), 16),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_noise_of_a_factor_grows_with_the_terms_and_the_other_factor(name: str) -> None:
    """n products of x and w: noise of x becomes n rms(w)^2 times as large. 16 terms: 4 for w = 1/2, 64 for x = 2."""
    function, shapes, terms = PRODUCTS[name]
    asked = Asked(function, (BOTH, W), shapes)
    gain_x, gain_w = terms * 0.25, terms * 4.0
    expected = [
        (0, Need("reader", noise=UP.noise / gain_x, floor=0.125 / gain_x**0.5)),
        (1, Need("reader", noise=UP.noise / gain_w, floor=0.125 / gain_w**0.5)),
    ]
    assert through(asked, UP) == expected


def test_relative_error_passes_a_product_of_positive_factors_alone() -> None:
    positive = Asked(torch.matmul, (PLUS, tensor(0.0, 1.0, 0.5)), ((2, 16), (16, 4)))
    assert [(n.share, n.noise) for _, n in through(positive, RELATIVE)] == [(2.0**-12, INF)] * 2
    mixed = Asked(torch.matmul, (PLUS, W), ((2, 16), (16, 4)))
    assert [(n.share, n.noise) for _, n in through(mixed, RELATIVE)] == [
        (INF, 2.0**-12 / 64 / 4),
        (INF, 2.0**-12 / 64 / 64),
    ]


@pytest.mark.parametrize("other", [None, tensor(0.0, 0.0, 0.0)])
def test_nothing_is_asked_of_a_factor_whose_other_is_unknown_or_zero(other: TensorFacts | None) -> None:
    asked = Asked(torch.matmul, (BOTH, other), ((2, 16), (16, 4)))
    assert [place for place, _ in through(asked, UP)] == [1]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.einsum("...j,kj->...k", x, w),
        lambda x, w: torch.einsum("ij,kj", x, w),
        lambda x, w: torch.einsum("ij,kj,kj->ik", x, w, w),
    ],
)
def test_an_equation_that_does_not_say_its_sums_asks_nothing(function: Any) -> None:
    assert through(Asked(function, (BOTH, W), ((2, 16), (4, 16))), UP) == []


@pytest.mark.parametrize(
    ("function", "gain"),
    [
        (lambda x: x.sum(-1), 16.0),
        (lambda x: x.sum(), 32.0),
        (lambda x: x.mean(-1), 1 / 16),
        (lambda x: x.nanmean(-1), 1 / 16),
        (lambda x: F.avg_pool1d(x, 4), 1 / 4),
        (lambda x: F.adaptive_avg_pool1d(x, 1), 1 / 16),
    ],
)
def test_noise_of_a_term_grows_with_their_number_and_falls_with_their_mean(function: Any, gain: float) -> None:
    asked = Asked(function, (BOTH,), ((2, 16),))
    floor = 0.125 / gain**0.5
    assert through(asked, UP) == [(0, Need("reader", noise=UP.noise / gain, floor=floor))]
    ((_, cancels),) = through(asked, RELATIVE)
    assert (cancels.noise, cancels.share) == (2.0**-12 / 64 / gain, INF)
    for one_sign in (PLUS, MINUS):
        ((_, kept),) = through(Asked(function, (one_sign,), ((2, 16),)), RELATIVE)
        assert (kept.noise, kept.share, kept.floor) == (INF, 2.0**-12, floor)


@pytest.mark.parametrize(
    ("function", "facts", "steep", "floors"),
    [
        (torch.mul, (PLUS, W), 1.0, (0.125 * 2 / 4, 0.125 * 0.5 / 4)),
        (torch.div, (PLUS, W), 1.0, (0.125 * 2 / 4, 0.125 * 0.5 / 4)),
        (lambda x: x**3, (PLUS,), 3.0, (0.5,)),  # 1/8 is the cube of 1/2
        (lambda x: x**-2, (PLUS,), 2.0, (0.0,)),
        (lambda x: x**0.25, (PLUS,), 1.0, (0.125**4,)),
        (lambda x: x**1, (PLUS,), 1.0, (0.125 * 2 / 4,)),
        (torch.sqrt, (PLUS,), 1.0, (0.125**2,)),
        (torch.square, (PLUS,), 2.0, (0.125**0.5,)),
        (torch.reciprocal, (PLUS,), 1.0, (0.0,)),
        (torch.rsqrt, (PLUS,), 1.0, (0.0,)),
        (torch.neg, (PLUS,), 1.0, (0.125 * 2 / 4,)),
    ],
)
def test_products_and_powers_keep_a_relative_error(
    function: Any, facts: tuple[TensorFacts, ...], steep: float, floors: tuple[float, ...]
) -> None:
    asked = Asked(function, facts)
    expected = [
        Need("reader", noise=UP.noise * x.rms**2 / 16 / steep**2, floor=floor)
        for x, floor in zip(facts, floors, strict=True)
        if x.rms is not None
    ]
    assert [need for _, need in through(asked, UP)] == expected
    shares = [n.share for _, n in asked.by(RELATIVE) if not n.firm]
    assert shares == [2.0**-12 / steep**2] * len(facts)


def test_a_power_that_is_a_tensor_is_as_steep_as_its_largest() -> None:
    asked = Asked(torch.pow, (PLUS, tensor(0.0, 4.0, 1.0)))
    assert [n.noise for _, n in through(asked, UP)] == [UP.noise * 4 / 16 / 16, UP.noise / 16 / 16]
    flat = Asked(torch.pow, (PLUS, tensor(0.0, 0.5, 1.0)))
    assert [n.noise for _, n in through(flat, UP)] == [UP.noise * 4 / 16, UP.noise / 16]
    unknown = Asked(torch.pow, (PLUS, None))
    assert [n.noise for _, n in through(unknown, UP)] == [UP.noise * 4 / 16]


@pytest.mark.parametrize(("base", "asked"), [(2.0, True), (0.5, True), (1.0, False), (-2.0, False), (0.0, False)])
def test_a_number_to_a_power_asks_for_an_absolute_error(base: float, asked: bool) -> None:
    """2^(x + e) is 2^x (1 + e log 2)."""
    found = Asked(lambda x: base**x, (PLUS,)).by(UP)
    expected = [(0, Need("reader", noise=UP.noise / 16 / math.log(base or 1.0) ** 2, firm=True))] if asked else []
    assert found == expected
    relative = Asked(lambda x: base**x, (PLUS,)).by(RELATIVE)
    assert [n.noise for _, n in relative] == ([2.0**-12 / math.log(base) ** 2] if asked else [])


@pytest.mark.parametrize(("result", "rms"), [(None, 2.0), (TensorFacts("r", rms=0.0), 2.0), (RESULT, 0.0)])
def test_nothing_is_asked_where_a_size_is_unknown_or_zero(result: TensorFacts | None, rms: float) -> None:
    assert through(Asked(torch.neg, (tensor(0.5, 4.0, rms),), result=result), UP) == []


@pytest.mark.parametrize(
    ("function", "highest", "need", "expected"),
    [
        # exp(x + e) is exp(x) (1 + e); the rms of the result is 4. What is far below the largest hardly counts.
        (torch.exp, 8.0, UP, Need("reader", noise=UP.noise / 16, most=8.0, firm=True)),
        (torch.exp, 2.0, UP, Need("reader", noise=UP.noise / 16, most=4.0, firm=True)),
        (torch.exp, 8.0, RELATIVE, Need("reader", noise=2.0**-12, firm=True)),
        (lambda x: x.softmax(-1), 8.0, UP, Need("reader", noise=UP.noise / 16, most=8.0, firm=True)),
        # tan has poles: its slope is 1 + tan^2, at most 1 + 16^2 here.
        (torch.tan, 8.0, UP, Need("reader", noise=UP.noise / 16 / 257, most=8.0, firm=True)),
    ],
)
def test_exponentials_ask_for_an_absolute_error(function: Any, highest: float, need: Need, expected: Need) -> None:
    found = Asked(function, (tensor(-1.0, highest),)).by(need)
    assert found[0] == (0, expected)


def test_exponential_of_what_is_unknown_counts_everywhere() -> None:
    assert Asked(torch.exp, (None,)).by(UP) == [(0, Need("reader", noise=UP.noise / 16, firm=True))]
    assert Asked(torch.exp, (PLUS,), result=None).by(UP) == []
    assert Asked(torch.exp, (PLUS,), result=TensorFacts("r", rms=0.0)).by(UP) == []


@pytest.mark.parametrize(
    ("need", "share"),
    [(UP, UP.noise), (RELATIVE, 2.0**-12 / 64), (Need("reader", noise=3.0), 0.25)],
)
def test_logarithms_ask_for_a_relative_error(need: Need, share: float) -> None:
    """At most 1/4, whose root is a half: a larger one is no small error. The smallest element counts, too."""
    asked = Asked(torch.log, (tensor(0.5, 4.0, smallest=0.5),))
    assert asked.by(need)[0] == (0, Need("reader", share=share, floor=0.5))
    assert Asked(torch.log, (None,)).by(need) == []


@pytest.mark.parametrize(
    ("function", "keeps"),
    [
        (torch.relu, True),
        (lambda x: x.clamp(min=0.25), True),
        (torch.tanh, False),
        (lambda x: x.clamp_max(2.0), False),
        (lambda x: x.log_softmax(-1), False),
    ],
)
def test_a_slope_of_one_hands_on_an_error(function: Any, keeps: bool) -> None:
    """Where a small input gives a small result, a relative error of one is that of the other."""
    ((place, found),) = through(Asked(function, (PLUS,)), UP)
    assert (place, found.noise, found.most) == (0, UP.noise, UP.most if keeps else INF)
    relative = [n for _, n in Asked(function, (PLUS,)).by(RELATIVE) if not n.firm]
    wanted = Need("reader", share=2.0**-12, floor=0.125) if keeps else Need("reader", noise=2.0**-12 / 64)
    assert relative == [wanted]


def test_movers_hand_on_what_is_asked_and_ask_nothing_themselves() -> None:
    for function in (lambda x: x.reshape(-1), lambda x: x.to(torch.float16)):
        assert Asked(function, (PLUS,)).by(UP) == [(0, UP)]
        assert Asked(function, (PLUS,)).by(None, UP) == []


def test_what_a_result_needs_by_itself_is_asked_beside_what_its_readers_need() -> None:
    own = Need("me", noise=0.5)
    found = Asked(torch.add, (PLUS, PLUS)).by(UP, own)
    assert [(place, n.asked, n.noise) for place, n in found] == [
        (0, "me", 0.5), (1, "me", 0.5), (0, "reader", UP.noise), (1, "reader", UP.noise),
    ]  # fmt: skip
    # A slope of one removes no offset by itself, but a logarithm of a softmax may.
    assert Asked(torch.tanh, (PLUS,)).by(None, own) == []
    assert [n.noise for _, n in Asked(lambda x: x.log_softmax(-1), (PLUS,)).by(None, own)] == [0.5]


STEPS: dict[str, tuple[Callable[..., Any], tuple[TensorFacts | None, ...], list[tuple[int, float]]]] = {
    # A quarter of the share of a step squared.
    "floor": (torch.floor, (PLUS,), [(0, 1.0)]),
    "floor_divide by a number": (lambda x: x // 0.5, (PLUS,), [(0, 0.5)]),
    "floor_divide by a negative number": (lambda x: x // -8.0, (PLUS,), [(0, 8.0)]),
    "remainder of a tensor": (torch.remainder, (PLUS, W), [(0, 0.5)]),
    "fmod of an unknown tensor": (torch.fmod, (PLUS, None), [(0, 1.0)]),
    "to integers": (lambda x: x.to(torch.int64), (PLUS,), [(0, 1.0)]),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_ask_for_a_share_of_their_size(name: str) -> None:
    function, facts, steps = STEPS[name]
    found = [(place, n) for place, n in Asked(function, facts).by() if n.share == INF]
    asks = "to" if name == "to integers" else None
    assert [(place, n.noise) for place, n in found] == [(place, SHARE / 4 * step**2) for place, step in steps]
    assert all(n.firm and (asks is None or n.asked == asks) for _, n in found)


def test_what_turns_into_a_float_asks_for_no_step() -> None:
    assert Asked(lambda x: x.to(torch.float16), (PLUS,)).by() == []


@pytest.mark.parametrize(
    ("mean", "rms", "noise"), [(0.0, 2.0, 4.0), (1.5, 2.5, 4.0), (None, 2.0, 4.0), (2.0, 2.0, None)]
)
def test_orders_ask_for_a_share_of_the_variance(mean: float | None, rms: float, noise: float | None) -> None:
    found = Asked(lambda x: x.argsort(-1), (tensor(0.5, 4.0, rms, mean=mean),)).by()
    assert found == ([] if noise is None else [(0, Need("argsort", noise=SHARE * noise, firm=True))])


def test_norms_ask_for_a_share_of_what_they_divide_by() -> None:
    """Layer norms of the least variance of a slice, batch norms of that of a channel."""
    near, far = [0] * 256, [0] * 256
    near[120], far[130] = 100, 100
    layer: Callable[..., Any] = lambda x: F.layer_norm(x, (8,))  # noqa: E731
    offset = tensor(100.0, 101.0, 100.0, mean=100.0, histogram=far)
    assert Asked(layer, (offset,), least=0.25).by() == [(0, Need("layer_norm", noise=SHARE / 4, firm=True))]
    assert Asked(layer, (offset,), least=None).by() == []
    assert Asked(layer, (tensor(-1.0, 1.0, histogram=near),), least=0.25).by() == []
    batch: Callable[..., Any] = lambda x, m, v: F.batch_norm(x, m, v)  # noqa: E731
    asked = Asked(batch, (tensor(0.0, 4.0, 2.0), PLUS, PLUS), ((2, 8), (8,), (8,)), channels=7.0)
    assert [(p, n.noise) for p, n in asked.by()] == [(0, SHARE * 4.0 / 8)]
    asked.channels = None
    assert asked.by() == []


def test_coordinates_ask_for_a_share_of_a_pixel() -> None:
    """From -1 to 1, a pixel of 16 is 2/16 wide; the larger of height and width counts."""
    asked = Asked(lambda x, grid: F.grid_sample(x, grid, align_corners=False), (PLUS, W), ((1, 3, 8, 16), (1, 4, 4, 2)))
    assert [(p, n.noise) for p, n in asked.by()] == [(1, SHARE * (2 / 16) ** 2)]


@pytest.mark.parametrize(
    ("function", "low", "high", "noise", "most"),
    [
        (torch.log1p, -0.75, 3.0, SHARE / 16, 2.0),
        (torch.log1p, -1.5, 3.0, 1e-24, 2.0),
        (torch.log1p, -3.0, -1.25, SHARE / 16, 2.0),
        (torch.acos, -0.5, 0.5, SHARE / 4, 2.0),
    ],
)
def test_poles_ask_for_a_share_of_the_distance(
    function: Any, low: float, high: float, noise: float, most: float
) -> None:
    found = [n for _, n in Asked(function, (tensor(low, high),)).by() if math.isfinite(n.noise)]
    assert found
    assert all((n.noise, n.most, n.firm) == (pytest.approx(noise, rel=1e-12), most, True) for n in found)


@pytest.mark.parametrize(
    ("function", "facts", "place", "asked"),
    [
        (torch.div, (PLUS, tensor(0.5, 4.0, smallest=0.5)), 1, True),
        (torch.div, (PLUS, None), 1, False),
        (torch.reciprocal, (tensor(0.5, 4.0, smallest=0.5),), 0, True),
        (lambda x: x**-1.5, (tensor(0.5, 4.0, smallest=0.5),), 0, True),
        (lambda x: x**-0.25, (tensor(0.5, 4.0, smallest=0.5),), 0, True),
        (lambda x: x**0.25, (tensor(0.5, 4.0, smallest=0.5),), 0, False),
        (lambda x: x**1.5, (tensor(0.5, 4.0, smallest=0.5),), 0, False),
        (lambda x: x**0.0, (tensor(0.5, 4.0, smallest=0.5),), 0, False),
        (torch.log, (tensor(0.5, 4.0, smallest=0.5),), 0, False),  # asks by its result
    ],
)
def test_a_pole_at_zero_asks_for_a_relative_error(
    function: Any, facts: tuple[TensorFacts | None, ...], place: int, asked: bool
) -> None:
    found = [(p, n) for p, n in Asked(function, facts).by() if math.isfinite(n.share)]
    assert [(p, n.share, n.floor, n.firm) for p, n in found] == ([(place, SHARE, 0.5, True)] if asked else [])
