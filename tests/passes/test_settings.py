"""The rules that settings make, whole, and what a plan stores of them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib.errors import SettingError
from calibcast.passes import Verdict
from calibcast.passes.regions import candidates
from calibcast.passes.rules import (
    Follows,
    Interior,
    LiteralRange,
    Mask,
    MaxDepthOfReduction,
    NodesToExclude,
    TargetsToExclude,
    Unmeasured,
)
from calibcast.passes.settings import Settings, check_budget, check_limits
from calibcast.passes.tensor_rules import DataMax, Headroom, InitMax, Nonfinite, Storage
from torch import nn

PROGRAM = torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.ones(2, 4),))
NODES = candidates(PROGRAM)
MEASURED: Any = SimpleNamespace(rounding=pl.DataFrame({"noise": [1.0]}))
BARE: Any = SimpleNamespace(rounding=pl.DataFrame({"noise": []}))


def judge(ranges: Any = None, low_type: torch.dtype = torch.float16, **settings: Any) -> Any:
    return Settings(**settings).judge(NODES, ranges, low_type)


@pytest.mark.parametrize("ranges", [None, BARE])
def test_without_evidence_512_is_a_limit_that_is_given(ranges: Any) -> None:
    made = judge(ranges)
    assert made.rules == (
        NodesToExclude(()), TargetsToExclude(frozenset()), Unmeasured(), Nonfinite(), DataMax(512.0, 1.0, given=True),
        InitMax(65504.0), Mask(), LiteralRange(), Interior(frozenset()), Storage(), Follows(),
    )  # fmt: skip
    assert (made.data_max, made.init_max, made.min_sqnr_db, made.budget) == (512.0, None, None, 40.0)
    assert made.settings == {
        "data_max": 512.0, "init_max": 65504.0, "max_depth_of_reduction": None, "nodes_to_exclude": [],
        "targets_to_exclude": [], "nodes_to_include": [], "targets_to_include": [], "range_quantile": 1.0,
        "wide_accumulation": [], "rules": [
            "nodes_to_exclude", "targets_to_exclude", "unmeasured", "nonfinite", "data_max", "init_max", "mask",
            "literal", "interior", "storage", "follows",
        ],
    }  # fmt: skip


def test_with_evidence_the_budget_and_the_headroom_decide() -> None:
    made = judge(MEASURED, torch.bfloat16)
    assert made.rules[4:7] == (
        DataMax(512.0, 1.0, given=False),
        Headroom(),
        InitMax(float(torch.finfo(torch.bfloat16).max)),
    )
    assert (made.data_max, made.settings["data_max"], made.settings["min_sqnr_db"]) == (None, None, 26.0)
    assert made.settings["rules"][4:6] == ["data_max", "headroom"]
    assert made.settings["rules"][-1] == "rounding"
    made = judge(MEASURED, data_max=100, min_sqnr_db=50.0)
    assert made.rules[4] == DataMax(100.0, 1.0, given=True)
    assert (made.data_max, made.budget, made.settings["min_sqnr_db"]) == (100.0, 50.0, 50.0)


def own(facts: Any) -> Verdict | None:
    return None


def test_what_the_user_gives() -> None:
    made = judge(
        data_max=math.inf, init_max=10, max_depth_of_reduction=7, nodes_to_exclude=["relu", "^linear$", "relu"],
        targets_to_exclude=torch.ops.aten.relu.default, nodes_to_include="^0", targets_to_include=["aten.linear"],
        range_quantile=0.5, rules=own, wide_accumulation="aten.linear.default",
    )  # fmt: skip
    assert made.rules == (
        NodesToExclude(("^linear$", "relu")), TargetsToExclude(frozenset({"aten.relu.default"})), Unmeasured(),
        Nonfinite(), DataMax(math.inf, 0.5, given=True), InitMax(10.0), Mask(), LiteralRange(), MaxDepthOfReduction(7),
        Interior(frozenset({"linear"})), Storage(), own, Follows(),
    )  # fmt: skip
    assert (made.included.nodes, made.included.targets) == (("^0",), {"aten.linear"})
    kept = {name: value for name, value in made.settings.items() if name != "rules"}
    assert kept == {
        "data_max": math.inf, "init_max": 10.0, "max_depth_of_reduction": 7, "nodes_to_exclude": ["^linear$", "relu"],
        "targets_to_exclude": ["aten.relu.default"], "nodes_to_include": ["^0"], "targets_to_include": ["aten.linear"],
        "range_quantile": 0.5, "wide_accumulation": ["linear"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nodes_to_exclude": 3}, "nodes_to_exclude=3: give a list or a set of them"),
        ({"nodes_to_exclude": [3]}, "nodes_to_exclude: 3 is no text"),
        ({"nodes_to_include": ["re(lu"]}, "nodes_to_include: 're(lu' is not a regular expression"),
        ({"nodes_to_include": ["^rely$"]}, "nodes_to_include: '^rely$' matches no node name and no module path; "),
        ({"nodes_to_exclude": ["relu", "rely"]}, "nodes_to_exclude: 'rely' matches no node"),
        ({"targets_to_exclude": ["aten.rely"]}, "targets_to_exclude: no node has the target 'aten.rely'"),
        ({"targets_to_include": ["aten"]}, "targets_to_include: no node has the target 'aten'"),
        ({"wide_accumulation": ["relu"]}, "wide_accumulation: 'relu' is no operator that sums"),
    ],
)
def test_what_matches_nothing_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError) as caught:
        judge(**settings)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("data_max", "init_max", "depth", "quantile", "named"),
    [
        (None, None, None, 1.0, None),
        (1e-300, math.inf, 1, 1e-9, None),
        (0, None, None, 1.0, "data_max=0"),
        (None, -1.0, None, 1.0, "init_max=-1.0"),
        (None, None, False, 1.0, "max_depth_of_reduction=False"),
        (None, None, "7", 1.0, "max_depth_of_reduction='7'"),
        (math.nan, None, None, 1.0, "data_max=nan"),
        (None, None, None, 0.0, "range_quantile=0.0"),
        (None, None, None, 1.0000001, "range_quantile=1.0000001"),
        (None, None, None, True, "range_quantile=True"),
    ],
)
def test_limits_and_quantiles(data_max: Any, init_max: Any, depth: Any, quantile: Any, named: str | None) -> None:
    if named is None:
        check_limits(data_max, init_max, depth, quantile, None)
        return
    with pytest.raises(SettingError) as caught:
        check_limits(data_max, init_max, depth, quantile, None)
    assert str(caught.value).startswith(f"{named}: give ")


def test_quantiles_need_all_histograms() -> None:
    some: Any = SimpleNamespace(frame=pl.DataFrame({"histogram": [[1], None, [2]]}))
    every: Any = SimpleNamespace(frame=pl.DataFrame({"histogram": [[1], [2]]}))
    check_limits(None, None, None, 1.0, some)
    check_limits(None, None, None, 0.99, every)
    with pytest.raises(SettingError, match=r"^range_quantile=0\.99 needs histograms"):
        check_limits(None, None, None, 0.99, some)


@pytest.mark.parametrize("budget", [0, -3.0, True, "40", math.nan])
def test_a_budget_is_a_positive_number_of_db(budget: Any) -> None:
    check_budget(None, measured=False)
    check_budget(0.1, measured=True)
    with pytest.raises(SettingError, match=f"^min_sqnr_db={budget!r}: give a positive number of dB"):
        check_budget(budget, measured=True)
    with pytest.raises(SettingError, match=r"^min_sqnr_db=0\.1 needs ranges in which rounding was measured"):
        check_budget(0.1, measured=False)
