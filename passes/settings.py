"""The arguments of `classify`, checked, and the judge that they make."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, SupportsFloat, TypeGuard

import torch
from calibcast.calib.errors import SettingError, known
from calibcast.calib.graph import module_path, op_name
from calibcast.calib.operators import OPERATORS, canonical
from calibcast.calib.ranges import RangeTable
from calibcast.passes.judge import Included, Judge, weight_limit
from calibcast.passes.low_types import LOW_TYPES
from calibcast.passes.number_formats import format_of
from calibcast.passes.regions import Candidate
from calibcast.passes.rules import (
    Follows,
    Interior,
    LiteralRange,
    Mask,
    MaxDepthOfReduction,
    NodesToExclude,
    TargetsToExclude,
    Unmeasured,
    matched,
    rule_id,
)
from calibcast.passes.tensor_rules import DEFAULT_DATA_MAX, DataMax, Headroom, InitMax, Nonfinite, Storage
from calibcast.passes.verdict import Rule

Target = Any  # an OpOverload, an OpOverloadPacket, or a name of either


@dataclass(frozen=True)
class Settings:
    """How to decide, for any program and low type: the arguments of `classify`, which documents them.

    Collections are kept as tuples; a single pattern or target counts as a list of one.
    """

    data_max: float | None = None
    init_max: float | None = None
    max_depth_of_reduction: int | None = None
    nodes_to_exclude: Iterable[str] = ()
    targets_to_exclude: Iterable[Target] = ()
    nodes_to_include: Iterable[str] = ()
    targets_to_include: Iterable[Target] = ()
    range_quantile: float = 1.0
    rules: Iterable[Rule] = ()
    wide_accumulation: Iterable[str] = ()
    min_sqnr_db: float | None = None

    def __post_init__(self) -> None:
        for name in [entry.name for entry in fields(self) if entry.default == ()]:
            value = getattr(self, name)
            one = isinstance(value, str) or callable(value)
            if not one and not isinstance(value, Iterable):
                raise SettingError(f"{name}={value!r}: give a list or a set of them")
            object.__setattr__(self, name, (value,) if one else tuple(value))

    def judge(self, nodes: Sequence[Candidate], ranges: RangeTable | None, low_type: torch.dtype) -> Judge:
        """All rules with these settings, for these nodes.

        Raises:
            SettingError: a setting is out of range, or a pattern or target matches no node.
        """
        check_limits(self.data_max, self.init_max, self.max_depth_of_reduction, self.range_quantile, ranges)
        measured = ranges is not None and ranges.rounding.height > 0
        check_budget(self.min_sqnr_db, measured)
        data_max = None if self.data_max is None and measured else float(self.data_max or DEFAULT_DATA_MAX)
        exclude = _patterns(self.nodes_to_exclude, "nodes_to_exclude", nodes)
        include = _patterns(self.nodes_to_include, "nodes_to_include", nodes)
        targets = _targets(self.targets_to_exclude, "targets_to_exclude", nodes)
        included = Included(include, _targets(self.targets_to_include, "targets_to_include", nodes))
        wide = _accumulating(self.wide_accumulation)
        limit = weight_limit(self.init_max, low_type)
        depth = self.max_depth_of_reduction
        every: tuple[Rule, ...] = (
            NodesToExclude(exclude),
            TargetsToExclude(targets),
            Unmeasured(),
            Nonfinite(),
            DataMax(data_max or DEFAULT_DATA_MAX, self.range_quantile, given=data_max is not None),
            *((Headroom(),) if measured else ()),
            InitMax(limit),
            Mask(),
            LiteralRange(),
            *(() if depth is None else (MaxDepthOfReduction(depth),)),
            Interior(wide),
            Storage(),
            *self.rules,
            Follows(),
        )
        kept: dict[str, Any] = {
            "data_max": data_max,
            "init_max": limit,
            "max_depth_of_reduction": depth,
            "nodes_to_exclude": list(exclude),
            "targets_to_exclude": sorted(targets),
            "nodes_to_include": list(include),
            "targets_to_include": sorted(included.targets),
            "range_quantile": self.range_quantile,
            "wide_accumulation": sorted(wide),
            "rules": [rule_id(rule) for rule in every],
        }
        budget = self.min_sqnr_db
        judge = Judge(every, included, data_max, low_type, self.init_max, budget, settings=kept)
        if measured:
            kept["min_sqnr_db"] = judge.budget
            kept["rules"].append("rounding")
        return judge


def low_type_of(value: torch.dtype | str) -> torch.dtype:
    """`torch.float16` or `torch.bfloat16`, from itself or a name. Raises SettingError for anything else."""
    return LOW_TYPES[format_of(value).name]


def check_limits(
    data_max: float | None, init_max: float | None, depth: int | None, quantile: float, ranges: RangeTable | None
) -> None:
    """Raise SettingError for a limit that is not positive, and for a quantile outside (0, 1] or without histograms."""
    for name, value in (("data_max", data_max), ("init_max", init_max), ("max_depth_of_reduction", depth)):
        if value is not None and not (_is_number(value) and value > 0):
            raise SettingError(f"{name}={value!r}: give a positive number, or inf to switch the rule off")
    if not (_is_number(quantile) and 0 < quantile <= 1):
        raise SettingError(f"range_quantile={quantile!r}: give a share above 0 and at most 1")
    if quantile < 1 and ranges is not None and ranges.frame["histogram"].null_count():
        raise SettingError(
            f"range_quantile={quantile} needs histograms, and these ranges were measured with histogram=False. "
            "Calibrate with histogram=True, or use range_quantile=1.0."
        )


def check_budget(min_sqnr_db: float | None, measured: bool) -> None:
    """Raise SettingError for a budget that is no positive number of dB, and for one without rounding evidence."""
    if min_sqnr_db is None:
        return
    if not (_is_number(min_sqnr_db) and min_sqnr_db > 0):
        raise SettingError(f"min_sqnr_db={min_sqnr_db!r}: give a positive number of dB")
    if not measured:
        raise SettingError(
            f"min_sqnr_db={min_sqnr_db:g} needs ranges in which rounding was measured. Calibrate with "
            "rounding_batches=4, or leave min_sqnr_db out: rules then judge by magnitude."
        )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, SupportsFloat) and not isinstance(value, bool)


def _patterns(patterns: Iterable[str], argument: str, nodes: Sequence[Candidate]) -> tuple[str, ...]:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise SettingError(f"{argument}: {pattern!r} is no text; give regular expressions as str")
    checked = tuple(sorted(set(patterns)))
    if not checked:
        return ()
    names = [(candidate.name, module_path(candidate.node)) for candidate in nodes]
    for pattern in checked:
        try:
            hit = any(matched((pattern,), name, module) for name, module in names)
        except re.error as error:
            raise SettingError(f"{argument}: {pattern!r} is not a regular expression: {error}") from error
        if not hit:
            plain = re.sub(r"[\^$\\.*+?()\[\]{}|]", "", pattern)
            every = {text for pair in names for text in pair if text}
            raise SettingError(
                f"{argument}: {pattern!r} matches no node name and no module path; {known(plain, every)}"
            )
    return checked


def _accumulating(names: Iterable[Target]) -> frozenset[str]:
    """Operators that sum, as the operator table names them. Raises SettingError for any other name."""
    summing = {entry.name: entry for entry in OPERATORS if entry.hides or entry.epsilon or entry.product}
    found = set()
    for given in names:
        name = canonical(str(given).removeprefix("torch.ops.").removeprefix("aten.").partition(".")[0])
        if name not in summing:
            raise SettingError(f"wide_accumulation: {str(given)!r} is no operator that sums; {known(name, summing)}")
        found.add(name)
    return frozenset(found)


def _targets(targets: Iterable[Target], argument: str, nodes: Sequence[Candidate]) -> frozenset[str]:
    if not targets:
        return frozenset()
    present = {op_name(candidate.node.target) for candidate in nodes}
    present |= {name.rpartition(".")[0] for name in present if name.count(".") > 1}
    found = set()
    for target in targets:
        name = str(target).removeprefix("torch.ops.")
        if name not in present:
            raise SettingError(f"{argument}: no node has the target {name!r}; {known(name, present)}")
        found.add(name)
    return frozenset(found)
