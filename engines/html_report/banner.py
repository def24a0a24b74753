"""The banner at the top of the page: whether anything is at risk, and what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from calibcast.calib.graph import dtype_name
from calibcast.calib.number_text import percent
from calibcast.calib.range_scaling import true_frame
from calibcast.calib.ranges import RangeTable
from calibcast.passes.plan import PrecisionPlan

_LABELS = {"float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Banner:
    """level: `good`, `bad` or empty. headline: the verdict in a sentence. lines: the facts behind it."""

    level: str
    headline: str
    lines: tuple[str, ...]


def low_label(plan: PrecisionPlan | None) -> str:
    """`fp16` or `bf16`: the low type of the plan, fp16 without one."""
    return _LABELS["float16" if plan is None else dtype_name(plan.low_precision_type)]


def banner(ranges: RangeTable, plan: PrecisionPlan | None, verification: Mapping[str, Any] | None) -> Banner:
    """The verdict against its bounds, the worst tensor, and what the plan keeps in fp32."""
    lines = [_worst(ranges, plan)]
    if plan is not None:
        stay, nodes = len(plan.high_precision_nodes), len(plan.high_precision_nodes) + len(plan.low_precision_nodes)
        lines.append(
            f"The plan keeps {stay} of {nodes} nodes in fp32; {percent(plan.share()[1])} of the work runs in "
            f"{low_label(plan)}."
        )
    if verification is None:
        return Banner("", "Not judged yet: no verification was given", tuple(lines))
    return Banner(verdict_level(verification), f"Accuracy gate: {verdict_words(verification)}", tuple(lines))


def verdict_level(verification: Mapping[str, Any]) -> str:
    """`good` where bounds were set and hold, `bad` where the verification failed; empty where no bounds were set."""
    if not verification.get("passed"):
        return "bad"
    return "good" if verification.get("bounds") else ""


def verdict_words(verification: Mapping[str, Any]) -> str:
    """The verdict in the words of the file, which include its bounds. Older files have no such words."""
    return str(verification.get("verdict") or ("no bounds were set" if verification.get("passed") else "failed"))


def _worst(ranges: RangeTable, plan: PrecisionPlan | None) -> str:
    low = torch.float16 if plan is None else plan.low_precision_type
    label, most = low_label(plan), float(torch.finfo(low).max)
    values = true_frame(ranges).filter(pl.col("kind").is_in(["input", "activation"]))
    broken = values.filter(pl.sum_horizontal("nan", "posinf", "neginf") > 0)
    if len(broken):
        row = broken.row(0, named=True)
        return f"{_place(row)} is NaN or Inf in fp32 itself, first in batch {row['nonfinite_batch']}."
    known = values.drop_nulls("absmax")
    if not len(known):
        return "No activation was measured."
    row = known.sort("stored_absmax", descending=True).row(0, named=True)
    peak = row["stored_absmax"]
    true = f", stored as 2^{-row['exponent']} of {row['absmax']:.4g}" if row["exponent"] else ""
    if peak > most:
        over = known.filter(pl.col("stored_absmax") > most).height
        more = "" if over == 1 else f"; {over} tensors pass it"
        reach = f"it reaches {peak:.4g}{true}, {label} ends at {most:.5g}{more}"
        return f"{_place(row)} is {peak / most:.2g}x over {label}: {reach}."
    if peak == 0:
        return "All activations are 0."
    room = f"{most / peak:.2g}x below the largest {label}"
    return f"The largest activation is {_place(row)}, {room}: it reaches {peak:.4g}{true}."


def _place(row: Mapping[str, Any]) -> str:
    return f"{row['node']} ({row['module']})" if row["module"] else str(row["node"])
