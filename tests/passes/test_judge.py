"""The judge: which verdicts bind, in which order, and what is said of a low node."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from calibcast.calib.errors import PlanError
from calibcast.passes import NodeFacts, TensorFacts, Verdict
from calibcast.passes.judge import Included, Judge, default_budget, weight_limit

LOW = "its largest magnitude is"


def judge(*rules: Any, included: bool = False, data_max: float | None = 512.0) -> Judge:
    return Judge(rules, lambda facts: included, data_max, torch.float16)


def facts(absmax: float | None = 3.0, **more: Any) -> NodeFacts:
    tensors = (
        TensorFacts("x", kind="activation", absmax=absmax),
        TensorFacts("unmeasured", measured=False, absmax=400.0),
        TensorFacts("weight", kind="parameter", absmax=500.0),
    )
    return NodeFacts(**{"name": "n", "base": "linear", "inputs": tensors, **more})


@pytest.mark.parametrize(
    ("of", "made", "said"),
    [
        (facts(), judge(), (f"{LOW} 3, within data_max 512", 3.0, 512.0)),
        (facts(), judge(data_max=None), (f"{LOW} 3, within data_max 512", 3.0, 512.0)),
        (facts(512.0), judge(), (f"{LOW} 512, within data_max 512", 512.0, 512.0)),
        (facts(600.0), judge(), (f"no rule is met; {LOW} 600", 600.0, 512.0)),
        (facts(None), judge(), ("no rule is met", None, None)),
        (facts(has_ranges=False), judge(), ("no rule that needs no ranges is met; none was given", None, None)),
        (facts(), judge(included=True), ("the user's include list asks for it", 3.0, 512.0)),
        (facts(None), judge(included=True), ("the user's include list asks for it", None, None)),
    ],
)
def test_why_a_node_is_low(of: NodeFacts, made: Judge, said: tuple[str, float | None, float | None]) -> None:
    decision = made.decide(of, 7, None)
    assert (decision.precision, decision.rule, decision.verdicts, decision.work) == ("low", None, (), 7)
    assert (decision.reason, decision.evidence, decision.limit) == said


FIRST, SECOND = Verdict("first", "one", 1.0, 2.0), Verdict("second", "two")
TIED = Verdict("alias", "shared")


def test_the_first_rule_decides_and_all_are_kept() -> None:
    decision = judge(lambda _: None, lambda _: FIRST, lambda _: SECOND).decide(facts(refused="no kernel"), 0, TIED)
    assert (decision.precision, decision.rule, decision.reason) == ("high", "alias", "shared")
    assert [v.rule for v in decision.verdicts] == ["alias", "first", "second", "legality"]
    assert decision.verdicts[-1].reason == "it cannot run in float16: no kernel"
    alone = judge(lambda _: FIRST, lambda _: SECOND).decide(facts(), 0, None)
    assert (alone.rule, alone.evidence, alone.limit) == ("first", 1.0, 2.0)
    assert alone.verdicts == (FIRST, SECOND)


def test_include_beats_rules_but_neither_legality_nor_ties_nor_refusals() -> None:
    made = judge(lambda _: FIRST, included=True)
    assert made.decide(facts(), 0, None).precision == "low"
    assert made.decide(facts(), 0, None).verdicts == (FIRST,)
    for of, tied, rule in (
        (facts(base="cdist"), None, "legality"), (facts(), TIED, "alias"), (facts(refused="no"), None, "legality"),
    ):  # fmt: skip
        decision = made.decide(of, 0, tied)
        assert (decision.precision, decision.rule) == ("high", rule)
        assert FIRST in decision.verdicts
    assert made.decide(facts(custom=True), 0, None).precision == "low"
    assert judge().decide(facts(custom=True), 0, None).rule == "legality"


@pytest.mark.parametrize(
    ("included", "met", "base", "refused"), list(itertools.product((0, 1), (0, 1), ("add", "cdist"), (None, "no")))
)
def test_keeps_high_is_what_decide_says(included: int, met: int, base: str, refused: str | None) -> None:
    made = judge(lambda _: FIRST if met else None, included=bool(included))
    of = facts(base=base, refused=refused)
    assert made.keeps_high(of) == (made.decide(of, 0, None).precision == "high")


def test_a_rule_that_raises_or_answers_nonsense_is_named() -> None:
    def broken(_: NodeFacts) -> Any:
        raise KeyError("x")

    with pytest.raises(PlanError, match=r"rule broken raised KeyError on node n: 'x'"):
        judge(broken).decide(facts(), 0, None)
    with pytest.raises(PlanError, match=r"answered True on node n; a rule answers a Verdict or None"):
        judge(lambda _: True).decide(facts(), 0, None)


def test_included_by_node_module_or_target() -> None:
    of = facts(op="aten.linear.default", module="head.0")
    assert not Included((), frozenset())(of)
    assert Included(("^n$",), frozenset())(of)
    assert Included((r"head\.",), frozenset())(of)
    assert not Included(("^m$",), frozenset({"aten.add.Tensor"}))(of)
    assert Included((), frozenset({"aten.linear.default"}))(of)
    assert Included((), frozenset({"aten.linear"}))(of)


def test_limits_and_budgets_of_the_types() -> None:
    assert (default_budget(torch.float16), default_budget(torch.bfloat16)) == (40.0, 26.0)
    assert weight_limit(None, torch.float16) == 65504.0
    assert (weight_limit(7, torch.float16), weight_limit(math.inf, torch.bfloat16)) == (7.0, math.inf)
    assert judge().budget == 40.0
    assert Judge((), lambda _: False, None, torch.float16, min_sqnr_db=33.0).budget == 33.0
