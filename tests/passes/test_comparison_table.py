"""What `compare` prints, whole, from frames that are given."""

from __future__ import annotations

import math
from typing import Any

import polars as pl
import pytest
from calibcast.passes.comparison_result import CULPRIT_DB, SCHEMA, Comparison, NonfiniteNode

ROW: dict[str, Any] = {
    "node": "linear", "module": "encoder.0", "sqnr_db": 51.25, "loss_db": 20.5, "output": 0,
    "op": "aten.linear.default",
    "source": "net.py:7", "kind": "activation", "dtype": "float16", "dtype_reference": "float32", "absmax": 3.5,
    "absmax_reference": 3.25, "rel_l2": 0.003, "max_abs": 0.01, "changed": None, "nonfinite": 0,
    "nonfinite_reference": 0,
    "nonfinite_alone": 0, "first_nonfinite_batch": None, "input_sqnr_db": 71.75,
}  # fmt: skip
EQUAL = {"node": "relu", "sqnr_db": math.inf, "loss_db": 0.0, "rel_l2": 0.0, "module": ""}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def frame(*changed: dict[str, Any]) -> pl.DataFrame:
    rows = [ROW | one for one in changed]
    return pl.DataFrame({name: [row.get(name) for row in rows] for name in SCHEMA}, schema=SCHEMA)


def test_a_comparison_as_text() -> None:
    integers = {"node": "argmax", "output": 1, "changed": 0.0125, "sqnr_db": None, "rel_l2": None, "dtype": "int64"}
    every = frame({}, integers, EQUAL, {"node": "gone", "dtype": None, "rel_l2": math.nan, "loss_db": 0.0})
    assert str(Comparison(every, every.head(1), 1)).split("\n") == [
        "Comparison: 1 batch, 4 tensors, 2 differ from the program",
        "first non-finite node: none",
        "where error enters, by what the SQNR loses there:",
        "  node   module    dtype   sqnr_db loss_db absmax in fp32",
        "  linear encoder.0 float16    51.2    20.5    3.5    3.25",
        "worst tensors:",
        "  node      module    dtype    sqnr_db loss_db absmax in fp32",
        "  linear    encoder.0 float16     51.2    20.5    3.5    3.25",
        "  argmax[1] encoder.0 int64   1.25% !=    20.5    3.5    3.25",
        "  relu                float16      inf     0.0    3.5    3.25",
        "  gone      encoder.0 not run     51.2     0.0    3.5    3.25",
    ]


def test_only_some_rows_are_shown() -> None:
    every = frame(*({"node": f"n{i}"} for i in range(15)))
    lines = str(Comparison(every, every, 3)).split("\n")
    assert lines[0] == "Comparison: 3 batches, 15 tensors, 15 differ from the program"
    assert [lines.index("  and 3 more"), lines.count("  and 3 more"), len(lines)] == [16, 2, 32]
    lines = Comparison(every, every.head(0), 3).table(rows=14).split("\n")
    assert lines[2:5] == ["no node loses more than 20 dB", "worst tensors:", lines[4]]
    assert lines[-1] == "  and 1 more"
    assert "more" not in Comparison(every, every.head(0), 3).table(rows=15).split("\n")[-1]


def test_the_first_node_that_is_not_finite() -> None:
    bad = {
        "node": "exp",
        "nonfinite_alone": 12,
        "first_nonfinite_batch": 2,
        "absmax_reference": 123456.0,
        "rel_l2": 0.0,
    }
    every = frame(EQUAL, bad, {"node": "later", "nonfinite_alone": 1, "first_nonfinite_batch": 0})
    first = NonfiniteNode.first(every)
    assert first == NonfiniteNode("exp", 0, "aten.linear.default", "encoder.0", "net.py:7", "float16", 2, 12, 123456.0)
    lines = str(Comparison(every, every.head(0), 2, first)).split("\n")
    assert lines[:3] == [
        "Comparison: 2 batches, 3 tensors, 2 differ from the program",
        "first non-finite node: exp (aten.linear.default, encoder.0, net.py:7), batch 2",
        "  12 elements of its float16 result are NaN or Inf over all batches; the program's are finite, "
        "up to 1.235e+05",
    ]
    assert "NaN/Inf" in lines[5]
    assert lines[7].endswith("      12")
    assert NonfiniteNode.first(frame({}, EQUAL)) is None
    bare = NonfiniteNode("n", 0, "op", "", "", "float16", 0, 1, 1.0)
    assert str(bare).startswith("n (op), batch 0\n")


def test_a_loss_of_20_db_is_normal() -> None:
    assert CULPRIT_DB == 20.0
