"""The table of edges as plans read it: batch by batch, output by output."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from calibcast.calib.rounding_edges import Edge
from calibcast.calib.rounding_table import ROUNDING_SCHEMA
from calibcast.passes.rounding_course import noise_of
from calibcast.passes.rounding_evidence import rounding_evidence

A, B = Edge("a", "x", 0), Edge("b", "a", 0)


def frame(**rows: dict[str, Any]) -> pl.DataFrame:
    """By reader: what is not the same of both edges."""
    common = {"output": 0, "low_precision_type": "float16", "batches": 4, "nonfinite": 0, "steps": 0}
    keys = {"a": {"node": "a", "input": "x"}, "b": {"node": "b", "input": "a"}}
    return pl.DataFrame([{**common, **keys[name], **row} for name, row in rows.items()], schema=ROUNDING_SCHEMA)


def test_edges_that_are_worst_in_different_batches_do_not_add_up() -> None:
    """One batch has most of the one, another of the other: no batch has both."""
    worst = {"noise": 2.0, "noise_worst": 5.0, "noise_by_output": [2.0]}
    table = frame(a={**worst, "worst_batch": 0}, b={**worst, "worst_batch": 3})
    evidence = rounding_evidence([A, B], table, "float16")
    assert evidence is not None
    assert [edge.weight for edge in evidence.edges] == [5.0, 5.0]
    assert noise_of(evidence.edges) == pytest.approx(5.0 + (4 * 2.0 - 5.0) / 3)


def test_the_worst_output_of_the_worst_batch_is_named() -> None:
    """Two outputs, of which the second has more in every batch."""
    row = {"noise": 3.0, "noise_worst": 6.0, "worst_batch": 1, "noise_by_output": [1.0, 2.0]}
    evidence = rounding_evidence([A, B], frame(a=row, b={**row, "worst_batch": 2}), "float16")
    assert evidence is not None
    assert [edge.worst_output for edge in evidence.edges] == [1, 1]
    assert evidence.edges[0].weight == 4.0


def test_of_integers_the_share_that_changes_counts_like_an_amplitude() -> None:
    """One of a hundred in one batch of four: a quarter of a percent, as 52 dB of noise would change."""
    row = {"noise": 0.0025, "noise_worst": 0.01, "worst_batch": 1, "noise_by_output": [0.0, 0.0025]}
    evidence = rounding_evidence([A], frame(a=row), "float16", integers={1})
    assert evidence is not None
    assert evidence.edges[0].weight == pytest.approx(0.0025**2)
