"""The page's data, as columns: small enough to embed, and exact where the page compares values."""

from __future__ import annotations

import base64
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import polars as pl
import torch
from calibcast.calib.range_scaling import true_frame
from calibcast.calib.ranges import RangeTable
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.rounding_plan import DEFAULT_BUDGETS

_SHORT = {"float16": "fp16", "bfloat16": "bf16"}
_TEXTS = ("op", "module", "source", "kind")
_FLOATS = ("min", "max", "absmax", "smallest", "mean", "rms")
_COUNTS = ("output", "elements", "nan", "posinf", "neginf", "zeros", "masked", "absmax_batch", "nonfinite_batch")
_BIAS = 127  # bin e of a histogram holds the magnitudes [2^(e-127), 2^(e-126))
# The band of a tensor leaves out this share of the magnitudes at each end.
_TAIL = 0.001


def payload(ranges: RangeTable, plan: PrecisionPlan | None) -> dict[str, Any]:
    """Tensors in graph order, the plan's nodes with the `data_max` at which each flips, and the limits of the types.

    Numbers that are only shown have six digits; those that the page compares (flips, limits, work) have full precision.
    For a rescaled program all numbers are the tensors' true values, and `exponent` is k: each tensor is stored times
    2^-k.
    """
    types = {name: _type(name, torch.finfo(dtype)) for name, dtype in _dtypes().items()}
    tensors = _tensors(true_frame(ranges), ranges.calibration.rescaled is not None)
    return {"types": types, "tensors": tensors, "nodes": _nodes(plan), "plan": _settings(plan)}


def packed(content: Mapping[str, Any]) -> str:
    """The content as base64 of deflated JSON, which has no character that is special in HTML. 3,000 tensors take about
    half a megabyte."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def unpacked(text: str) -> dict[str, Any]:
    """The content that `packed` was given."""
    content: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(text)))
    return content


def _dtypes() -> dict[str, torch.dtype]:
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}


def _type(name: str, info: torch.finfo) -> dict[str, Any]:
    budget = DEFAULT_BUDGETS[name]
    return {"label": _SHORT[name], "max": info.max, "tiny": info.smallest_normal, "budget": budget}


def _settings(plan: PrecisionPlan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    name = str(plan.low_precision_type).removeprefix("torch.")
    asked = {key: _exact(plan.settings.get(key)) for key in ("data_max", "min_sqnr_db")}
    return {"type": name, **asked, "flips": bool(plan.flips), "budgets": bool(plan.budgets)}


def _nodes(plan: PrecisionPlan | None) -> dict[str, Any]:
    """Columns over the plan's nodes: the least `data_max` and the highest budget at which each is low.

    Each is a number, "inf", or null for never; kept nodes have null.
    """
    decisions = [] if plan is None else plan.decisions
    columns: dict[str, Any] = {
        "name": [d.node for d in decisions],
        "precision": [d.precision for d in decisions],
        "work": [d.work for d in decisions],
        "reason": [d.reason for d in decisions],
    }
    for name in ("op", "module", "rule"):
        columns[name] = _coded([getattr(d, name) or "" for d in decisions])
    for name in _dtypes():
        flips = {} if plan is None else plan.flips.get(name, {})
        columns[name] = [_exact(flips.get(d.node)) for d in decisions]
        budgets = {} if plan is None else plan.budgets.get(name, {})
        columns[f"budget_{name}"] = [_exact(budgets.get(d.node)) for d in decisions]
    return columns


def _tensors(frame: pl.DataFrame, rescaled: bool) -> dict[str, Any]:
    columns: dict[str, Any] = {"node": frame["node"].to_list()}
    for name in _TEXTS:
        values = frame[name].to_list()
        columns[name] = _coded(relative_sources(values) if name == "source" else values)
    columns["shape"] = _coded(["x".join(sizes) for sizes in frame["shape"].to_list()])
    for name in _FLOATS:
        columns[name] = [_short(value) for value in frame[name].to_list()]
    for name in _COUNTS:
        columns[name] = frame[name].to_list()
    histograms = frame["histogram"].to_list()
    columns["bins"] = [_sparse(counts) for counts in histograms]
    bands = [_band(counts) for counts in histograms]
    columns["band_low"], columns["band_high"] = [band[0] for band in bands], [band[1] for band in bands]
    return columns | ({"exponent": frame["exponent"].to_list()} if rescaled else {})


def relative_sources(sources: Sequence[str]) -> list[str]:
    """Shortened paths: the user's files relative to their common folder, files of packages relative to
    `site-packages`."""
    packages = "site-packages/"
    own = {PurePath(s.rpartition(":")[0]).parent.as_posix() for s in sources if s and packages not in s}
    absolute = [folder for folder in own if folder.startswith("/")]
    common = f"{os.path.commonpath(absolute)}/" if absolute else ""
    return [s.rpartition(packages)[2] if packages in s else s.removeprefix(common) for s in sources]


def _coded(values: Sequence[str]) -> dict[str, Any]:
    """Repeated texts, each stored once: the texts, and the index of each value's text."""
    texts = list(dict.fromkeys(values))
    position = {text: i for i, text in enumerate(texts)}
    return {"texts": texts, "of": [position[value] for value in values]}


def _sparse(counts: Sequence[int] | None) -> list[int] | None:
    """The first exponent that was seen, and the counts from it to the last one, without zeros and nonfinite values."""
    if counts is None:
        return None
    seen = [exponent for exponent in range(1, 255) if counts[exponent]]
    return [seen[0] - _BIAS, *counts[seen[0] : seen[-1] + 1]] if seen else []


def _band(counts: Sequence[int] | None) -> tuple[float | None, float | None]:
    """The powers of two between which all nonzero magnitudes lie, except a thousandth at each end; None without any."""
    if counts is None or not any(counts[1:255]):
        return None, None
    whole = sum(counts[1:255])
    ends = []
    for exponents in (range(1, 255), range(254, 0, -1)):
        passed = 0
        for exponent in exponents:
            passed += counts[exponent]
            if passed > _TAIL * whole:
                ends.append(exponent)
                break
    return 2.0 ** (ends[0] - _BIAS), 2.0 ** (ends[1] + 1 - _BIAS)


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _exact(value: float | None) -> float | str | None:
    return "inf" if value is not None and math.isinf(value) else value
