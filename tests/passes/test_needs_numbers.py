"""The numbers of `passes/needs.py`: how much noise is too much, which need is the tighter, where growth is cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from calibcast.calib import calibrate
from calibcast.passes import TensorFacts
from calibcast.passes.facts import Lost
from calibcast.passes.needs import LEAST_DB, _Walk
from calibcast.passes.number_formats import format_of
from calibcast.passes.rescaling.breaks import input_breaks, segment_breaks
from calibcast.passes.rescaling.measures import Measures
from calibcast.passes.rescaling.rescaling import solved
from calibcast.passes.rescaling.system import system_of
from calibcast.passes.tensor_rules import most_noise, rounding_noise
from calibcast.passes.transmission import Need, Seen
from torch import fx, nn
from torch.export import ExportedProgram

from tests.passes.rescaling_models import measured, rising

FP16 = format_of(torch.float16)
INF = math.inf
SPREAD = TensorFacts("x", min=-4.0, max=4.0, absmax=4.0, mean=0.0, rms=2.0)
NOISE = most_noise(2.0, FP16)


def exported(function: Any) -> ExportedProgram:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return function(x, y)

    return torch.export.export(Net(), (torch.ones(4, 8), torch.ones(8)))


def walk(function: Any = lambda x, y: x + y, **facts: TensorFacts) -> tuple[_Walk, dict[str, fx.Node]]:
    nodes = {n.name: n for n in exported(function).graph.nodes if n.op != "output"}
    seen = Seen(lambda node: facts.get(node.name), lambda node: None, lambda node: None)
    return _Walk({node: name for name, node in nodes.items()}, seen, FP16), nodes


@pytest.mark.parametrize(
    ("need", "excess"),
    [
        (Need("r", noise=NOISE), 0.0),
        (Need("r", noise=NOISE * 0.999), 1 / 0.999),
        (Need("r", noise=NOISE / 8), 8.0),
        (Need("r", noise=0.0), INF),
        # Relative errors: a step is eps of a value, so the mean of their squares is eps^2 / 24.
        (Need("r", share=2.0**-20 / 24), 1.0),
        (Need("r", share=2.0**-20 / 48), 2.0),
        (Need("r", noise=NOISE, share=2.0**-20 / 48), 2.0),
        (Need("r", noise=NOISE / 8, share=2.0**-20 / 48), 8.0),
        (Need("r", share=0.0), INF),
        (Need("r"), 0.0),
    ],
)
def test_rounding_is_held_against_what_is_allowed(need: Need, excess: float) -> None:
    walker, nodes = walk()
    assert walker._excess(nodes["add"], SPREAD, need) == pytest.approx(excess)


def test_elements_above_the_most_do_not_count() -> None:
    histogram = [0] * 256
    histogram[127], histogram[137] = 50, 50
    facts = TensorFacts("x", min=-2000.0, max=2000.0, absmax=2000.0, mean=0.0, rms=1000.0, histogram=histogram)
    walker, nodes = walk()
    for most in (INF, 1.5):
        noise = rounding_noise(facts, FP16, most)
        assert walker._excess(nodes["add"], facts, Need("r", noise=noise / 2, most=most)) == pytest.approx(2.0)


def test_a_norm_looks_at_the_median_element() -> None:
    histogram = [0] * 256
    histogram[127], histogram[137] = 60, 40
    facts = TensorFacts("x", min=-2000.0, max=2000.0, absmax=2000.0, mean=0.0, rms=600.0, histogram=histogram)
    walker, nodes = walk(lambda x, y: F.layer_norm(x, (8,)))
    allowed = (2.0**-10) ** 2 / 12
    assert walker._excess(nodes["layer_norm"], facts, Need("r", noise=allowed)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("value", "noise", "excess"),
    [(1.0, 1e-9, 0.0), (1.0, 0.0, 0.0), (0.1, 1e-12, None), (0.1, 0.0, INF)],
)
def test_a_constant_tensor_has_the_error_of_its_value(value: float, noise: float, excess: float | None) -> None:
    facts = TensorFacts("x", min=value, max=value, absmax=value, mean=value, rms=value)
    walker, nodes = walk()
    error = (float(torch.tensor(value).half()) - value) ** 2
    expected = error / noise if excess is None else excess
    assert walker._excess(nodes["add"], facts, Need("r", noise=noise)) == pytest.approx(expected, rel=1e-3)


def test_what_is_lost_is_told_in_decibels() -> None:
    walker, nodes = walk()
    for excess, decibels in ((10.0, 30.0), (1.0, 40.0), (0.0, 40.0), (INF, -INF)):
        walker._found.clear()
        walker._lose(nodes["add"], Need("reader"), excess)
        assert walker._found == {"add": Lost("reader", pytest.approx(decibels), 40.0)}
    walker._lose(nodes["add"], Need("other"), 1e9)
    assert walker._found["add"].node == "reader"  # the first that was found
    assert LEAST_DB == {"float16": 40.0, "bfloat16": 20.0}


def test_the_tighter_need_is_kept_and_the_wider_reach() -> None:
    walker, nodes = walk()
    x = nodes["x"]
    walker._ask(x, Need("a", noise=4.0, most=8.0))
    walker._ask(x, Need("b", noise=2.0, most=6.0))
    assert walker._asked[x] == Need("b", 2.0, 8.0, INF, 0.0, True)
    walker._ask(x, Need("c", noise=3.0, most=9.0))
    assert walker._asked[x] == Need("b", 2.0, 9.0, INF, 0.0, True)
    walker._ask(x, Need("d", share=0.5, floor=0.25))
    assert walker._asked[x] == Need("d", 2.0, INF, 0.5, 0.25, True)
    walker._ask(x, Need("e", share=0.75, floor=0.5, forced=True))
    assert walker._asked[x] == Need("d", 2.0, INF, 0.5, 0.25, True, True)


@pytest.mark.parametrize(
    ("facts", "judged"),
    [
        ({}, True),
        ({"kind": "parameter"}, False),
        ({"masked": 1}, False),
        ({"nonfinite": 1}, False),
        ({"absmax": None}, False),
        ({"absmax": 65505.0}, False),
        ({"absmax": 65504.0}, True),
        ({"rms": None}, False),
    ],
)
def test_tensors_that_other_rules_cover_are_left_to_them(facts: dict[str, Any], judged: bool) -> None:
    known = {"min": -4.0, "max": 4.0, "absmax": 4.0, "mean": 0.0, "rms": 2.0} | facts
    walker, nodes = walk(lambda x, y: x.sin() + y)
    walker._seen = Seen(lambda node: TensorFacts(node.name, **known), lambda n: None, lambda n: None)
    walker._judge(nodes["add"], nodes["sin"], Need("r", noise=NOISE / 100))
    assert set(walker._found) == ({"add", "sin"} if judged else set())


@pytest.mark.parametrize(
    ("excess", "share", "asked"), [(0.5, INF, False), (0.5, 2.0**-20 / 12, True), (2.0, INF, True)]
)
def test_a_need_goes_on_where_it_is_firm_or_not_met(excess: float, share: float, asked: bool) -> None:
    walker, nodes = walk(lambda x, y: x.sin() + y)
    walker._seen = Seen(lambda node: SPREAD, lambda n: None, lambda n: None)
    walker._judge(nodes["add"], nodes["sin"], Need("r", noise=NOISE / excess, share=share))
    assert (nodes["sin"] in walker._asked) is asked
    assert bool(walker._found) is (excess > 1)
    if excess > 1:
        assert walker._asked[nodes["sin"]] == Need("r", noise=NOISE / excess, firm=True)
    walker._judge(nodes["add"], nodes["sin"], Need("r", noise=NOISE * 4, firm=True))
    assert nodes["sin"] in walker._asked


@pytest.mark.parametrize(("noise", "lost"), [(1e-12, True), (1e-6, False)])
def test_numbers_in_a_call_are_rounded_like_tensors(noise: float, lost: bool) -> None:
    """0.9999 becomes 1 in float16: an error of 1e-4, whose square is 1e-8."""
    walker, nodes = walk(lambda x, y: x.clamp(max=0.9999))
    walker._look_at_numbers(nodes["clamp"], Need("r", noise=noise))
    assert (set(walker._found) == {"clamp"}) is lost
    if lost:
        error = (1 - 0.9999) ** 2
        assert walker._found["clamp"].decibels == pytest.approx(40 - 10 * math.log10(error / noise), abs=0.01)
    walker._found.clear()
    walker._look_at_numbers(nodes["clamp"], None)
    walker._look_at_numbers(nodes["clamp"], Need("r", share=1e-30))
    assert walker._found == {}


@pytest.mark.parametrize(("largest", "lost"), [(12.0, False), (300.0, True), (0.0, False)])
def test_a_number_to_a_power_loses_more_the_larger_that_is(largest: float, lost: bool) -> None:
    """0.99 is 9.8e-5 off in float16, relatively: 300 times that is 3%, 12 times is 0.1%."""
    power = TensorFacts("x", min=0.0, max=largest, absmax=largest, mean=1.0, rms=1.0)
    walker, nodes = walk(lambda x, y: 0.99**x, x=power)
    (node,) = (n for name, n in nodes.items() if name.startswith("pow"))
    walker._look_at_numbers(node, None)
    assert bool(walker._found) is lost


def test_sums_that_grow_have_breaks_and_inputs_above_the_limit_too() -> None:
    program, data = rising()
    measures = Measures.of(program, measured(program, data))
    solutions = solved(program, system_of(program))
    assert segment_breaks(measures, solutions, 512.0) == {"linear": frozenset({"add"})}
    assert segment_breaks(measures, solutions, 1e9) == {}
    loud = exported(lambda x, y: (x * 2).sin() + y)
    table = calibrate(loud, [(torch.full((4, 8), 600.0), torch.ones(8))], progress=False, rounding_batches=0)
    found = Measures.of(loud, table)
    assert input_breaks(found, 512.0) == {"x": frozenset({"mul"})}
    assert input_breaks(found, 600.0) == {}
    returned = exported(lambda x, y: (x, x.sin()))
    table = calibrate(returned, [(torch.full((4, 8), 600.0), torch.ones(8))], progress=False, rounding_batches=0)
    assert input_breaks(Measures.of(returned, table), 512.0) == {}  # a result of the program
