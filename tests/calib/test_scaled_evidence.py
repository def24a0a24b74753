"""Which evidence an edge of a rescaled program gets: kept, estimated from one of two types, summed, or a gap."""

from __future__ import annotations

import math
from typing import Any

import polars as pl
import pytest
from calibcast.calib.range_schema import SCHEMA, Calibration, RangeData, Rescaled
from calibcast.calib.rounding_scaling import NumberScale, scaled_rounding
from calibcast.calib.rounding_table import ROUNDING_KEY, ROUNDING_SCHEMA

FP16, BF16 = "float16", "bfloat16"
OVERFLOWS = "rescaled, and it overflows there"
NEITHER = "rescaled, and neither type was measured where this one holds the values: calibrate the rescaled program"
Cells = dict[str, Any]


def evidence(node: str, maker: str, low: str, **cells: Any) -> Cells:
    """8 units of noise in float16; bfloat16 has 64 times as much. The worst batch has twice the mean."""
    noise = 8.0 if low == FP16 else 512.0
    same = {
        "node": node, "input": maker, "output": 0, "low_precision_type": low, "noise": noise, "noise_worst": 2 * noise,
        "worst_batch": 3, "noise_by_output": [noise / 4, 3 * noise / 4], "nonfinite": 0, "steps": 0,
        "local_sqnr_db": 40.0, "batches": 5, "method": "gradient", "why_missing": None,
    }  # fmt: skip
    return same | cells


def gap(node: str, maker: str, low: str) -> Cells:
    none = dict.fromkeys(ROUNDING_SCHEMA.keys() - set(ROUNDING_KEY))
    return evidence(node, maker, low) | none | {"batches": 0, "why_missing": "no batch reached it"}


def tensor(node: str, most: float | None, least: float | None, bins: bool, op: str = "aten.relu.default") -> Cells:
    """All of its elements lie in the bins of the largest and the smallest, four in each."""
    counts = [0] * 256
    for magnitude in (most, least):
        if magnitude:
            counts[math.frexp(magnitude)[1] + 126] += 4
    known = {"node": node, "output": 0, "op": op, "absmax": most, "smallest": least}
    return known | {"histogram": counts if bins else None}


def table(tensors: list[Cells], rows: list[Cells]) -> RangeData:
    frame = pl.DataFrame({name: [one.get(name) for one in tensors] for name in SCHEMA}, schema=SCHEMA)
    return RangeData(frame, Calibration({}, "", 5), rounding=pl.DataFrame(rows, schema=ROUNDING_SCHEMA))


def of_one_edge(most: float, least: float, k: int, bins: bool = True, op: str = "relu", **changed: Any) -> list[Cells]:
    """The rows of both types of the edge from `x` to `y`. fp16, bf16: other evidence than usual."""
    rows = [changed.get(name, evidence("y", "x", low)) for name, low in (("fp16", FP16), ("bf16", BF16))]
    tensors = [tensor("x", most, least, bins), tensor("y", 1.0, 1.0, bins, f"aten.{op}.default")]
    record = Rescaled({"x:0": k}, {})
    rows = [row for row in rows if row is not None]
    return scaled_rounding(table(tensors, rows), record, {}, [("y", "x", 0)]).rows(named=True)


@pytest.mark.parametrize(
    ("most", "least", "k"),
    [
        (1e9, 1.0, 0),  # it is stored as before
        (1024.0, 1.0, 3),  # held in full before and after
        (65504.0, 2.0**-13, 1),
        (0.0, 0.0, 5),
    ],
)
def test_evidence_is_kept_where_the_type_holds_all_values(most: float, least: float, k: int) -> None:
    assert of_one_edge(most, least, k) == [evidence("y", "x", low) for low in (FP16, BF16)]


def test_bfloat16_has_the_range_of_float32_and_keeps_its_evidence() -> None:
    assert of_one_edge(2.0**30, 2.0**-30, 12)[1] == evidence("y", "x", BF16)


def test_a_missing_row_is_a_gap() -> None:
    fp16, bf16 = of_one_edge(1.0, 1.0, 0, fp16=None)
    assert (fp16["batches"], fp16["why_missing"], fp16["noise"]) == (0, NEITHER, None)
    assert bf16 == evidence("y", "x", BF16)


@pytest.mark.parametrize(("k", "why"), [(3, None), (2, OVERFLOWS)])
def test_what_overflows_still_is_a_gap(k: int, why: str | None) -> None:
    """Stored as an eighth, 2^18 is 2^15; stored as a quarter, it is above 65504."""
    fp16, _ = of_one_edge(2.0**18, 1.0, k, fp16=gap("y", "x", FP16))
    assert fp16["why_missing"] == why
    # 65504 itself is held.
    assert of_one_edge(65504.0 * 4, 1.0, 2, fp16=gap("y", "x", FP16))[0]["why_missing"] is None
    assert of_one_edge(65505.0 * 4, 1.0, 2, fp16=gap("y", "x", FP16))[0]["why_missing"] == OVERFLOWS


def noise_of(row: Cells) -> tuple[float, ...]:
    assert row["method"] == "scaled"
    assert row["noise_worst"] == pytest.approx(2 * row["noise"])
    assert row["noise_by_output"] == pytest.approx([row["noise"] / 4, 3 * row["noise"] / 4])
    assert (row["worst_batch"], row["batches"]) == (3, 5)
    return row["noise"], row["local_sqnr_db"]


def test_float16_that_overflowed_has_a_64th_of_the_noise_of_bfloat16() -> None:
    """Where it holds the values in full: its steps are an eighth as wide."""
    overflowed = evidence("y", "x", FP16, nonfinite=3)
    for fp16 in (gap("y", "x", FP16), overflowed, evidence("y", "x", FP16, noise=math.inf)):
        row, _ = of_one_edge(2.0**18, 2.0**10, 5, fp16=fp16)
        assert noise_of(row) == pytest.approx((512 / 64, 40 + 10 * math.log10(64)))
    # Where rounding changed steps, noise is proportional to their number, an eighth.
    row, _ = of_one_edge(2.0**18, 2.0**10, 5, fp16=overflowed, bf16=evidence("y", "x", BF16, steps=1))
    assert noise_of(row)[0] == pytest.approx(512 / 8)
    # And what had a finite result for another reason than that it was held is not used, either.
    row, _ = of_one_edge(2.0**18, 2.0**10, 5)
    assert noise_of(row)[0] == pytest.approx(512 / 64)


def test_without_evidence_in_any_type_there_is_a_gap() -> None:
    for bf16 in (None, gap("y", "x", BF16), evidence("y", "x", BF16, nonfinite=1)):
        row = of_one_edge(2.0**18, 2.0**10, 5, fp16=gap("y", "x", FP16), bf16=bf16)[0]
        assert (row["noise"], row["why_missing"]) == (None, NEITHER)


def test_what_falls_below_the_normal_numbers_has_more_noise() -> None:
    """2^-12 stored as 2^-16 is rounded in steps of 2^-24, at its own scale 2^-20, four times its usual 2^-22.

    Four such elements, squares of steps by 12, and as many of 2^-12: from 2 x 4 x 2^-44/12 to 2 x 4 x 2^-40/12.
    """
    row, _ = of_one_edge(2.0**-12, 2.0**-12, 4, bf16=gap("y", "x", BF16))
    assert noise_of(row) == pytest.approx((8.0 * 16, 40 - 10 * math.log10(16)))
    # bfloat16 says 512 times 2^-40 by 2^-38, which is the same.
    row, _ = of_one_edge(2.0**-12, 2.0**-12, 4)
    assert noise_of(row)[0] == pytest.approx(128.0)
    # The smaller of two estimates is taken.
    row, _ = of_one_edge(2.0**-12, 2.0**-12, 4, bf16=evidence("y", "x", BF16, noise=256.0, noise_worst=512.0,
                                                              noise_by_output=[64.0, 192.0]))  # fmt: skip
    assert noise_of(row)[0] == pytest.approx(64.0)
    row, _ = of_one_edge(2.0**-12, 2.0**-12, 4, bf16=evidence("y", "x", BF16, noise=1024.0, noise_worst=2048.0))
    assert noise_of(row)[0] == pytest.approx(128.0)


def test_an_estimate_is_never_below_what_was_measured() -> None:
    """Stored 2^6 times as large, 2^-16 is a normal number; its noise may have other causes."""
    row, _ = of_one_edge(2.0**-16, 2.0**-16, -6, bf16=gap("y", "x", BF16))
    assert noise_of(row) == (8.0, 40.0)
    row, _ = of_one_edge(2.0**-16, 2.0**-16, -6)
    assert noise_of(row)[0] == 8.0


def test_at_a_pole_the_smallest_value_decides() -> None:
    """2^-12 stored as 2^-16 has four times the relative step; 1 keeps its own. Squared, that is 16."""
    for op, bins in (("reciprocal", True), ("relu", False)):  # and where there is no histogram
        row, _ = of_one_edge(1.0, 2.0**-12, 4, bins=bins, op=op, bf16=gap("y", "x", BF16))
        assert noise_of(row)[0] == pytest.approx(8.0 * 16)
        row, _ = of_one_edge(1.0, 2.0**-12, 14, bins=bins, op=op)  # below half of the smallest: it is 0 there
        assert row["why_missing"] == NEITHER
    row, _ = of_one_edge(1.0, 2.0**-12, 4, op="relu", bf16=gap("y", "x", BF16))
    assert noise_of(row)[0] == pytest.approx(8.0, rel=1e-4)
    # An operator that writes in place is the same operator.
    row, _ = of_one_edge(1.0, 2.0**-12, 4, op="reciprocal_", bf16=gap("y", "x", BF16))
    assert noise_of(row)[0] == pytest.approx(8.0 * 16)


def of_a_number(value: float, k: int, known: bool = True, **changed: Any) -> list[Cells]:
    rows = [changed.get(name, evidence("y", "literal:other", low)) for name, low in (("fp16", FP16), ("bf16", BF16))]
    numbers = {("y", "other"): NumberScale(value, k)} if known else {}
    rows = [row for row in rows if row is not None] or [evidence("other", "x", FP16)]
    made = table([tensor("x", 1.0, 1.0, True)], rows)
    return scaled_rounding(made, Rescaled({}, {}), numbers, [("y", "literal:other", 0)]).rows(named=True)


NOTHING = {
    "noise": 0.0, "noise_worst": 0.0, "worst_batch": 0, "noise_by_output": [0.0, 0.0], "nonfinite": 0, "steps": 0,
    "local_sqnr_db": math.inf, "batches": 5, "method": "scaled", "why_missing": None,
}  # fmt: skip


def without_key(row: Cells) -> Cells:
    return {name: value for name, value in row.items() if name not in ROUNDING_KEY}


def test_a_number_that_the_type_holds_has_no_noise() -> None:
    for found in of_a_number(0.5, 3):
        assert without_key(found) == NOTHING
    # Of an added multiplication it is a power of two.
    assert [without_key(found) for found in of_a_number(0.1, 3, known=False, fp16=None, bf16=None)] == [NOTHING] * 2
    assert of_a_number(0.1, 3, known=False)[0] == evidence("y", "literal:other", FP16)


def test_a_number_that_is_as_exact_as_before_keeps_its_evidence() -> None:
    assert of_a_number(0.1, 3) == [evidence("y", "literal:other", low) for low in (FP16, BF16)]


def test_noise_of_a_number_is_that_of_its_error_squared() -> None:
    """1 + 3/1024 is exact in float16. Stored as 2^-16 of itself it keeps 8 bits: 1 + 4/1024, off by a third of that."""
    value = 1 + 2.5 / 1024  # a tie, to even: 1 + 2/1024, off by 0.5/1024; at 2^-16 to 1 + 4/1024, off by 1.5/1024
    fp16, bf16 = of_a_number(value, 16)
    assert noise_of(fp16)[0] == pytest.approx(8.0 * 9)
    assert bf16 == evidence("y", "literal:other", BF16)
    # What was infinite is estimated from the error in bfloat16, 1 + 0/128, off by 2.5/1024.
    for before in (None, gap("y", "literal:other", FP16), evidence("y", "literal:other", FP16, nonfinite=1)):
        fp16, _ = of_a_number(value, 16, fp16=before)
        assert noise_of(fp16)[0] == pytest.approx(512 * (1.5 / 2.5) ** 2)
        fp16, _ = of_a_number(value, 16, fp16=before, bf16=gap("y", "literal:other", BF16))
        assert fp16["why_missing"] == NEITHER
    # What is infinite now cannot be told.
    assert of_a_number(1.1e5, 0, fp16=None)[0]["why_missing"] == NEITHER
    assert of_a_number(1.1, -17, fp16=None)[0]["why_missing"] == NEITHER


def test_an_added_multiplication_has_the_noise_of_all_its_readers() -> None:
    """`x` is multiplied before `a` and `b` read it. They had 8 and 24 units, and rounding `x` there costs both."""
    rows = [evidence("a", "x", low) for low in (FP16, BF16)]
    rows += [evidence("b", "x", low, noise=24.0, noise_worst=30.0, local_sqnr_db=35.0) for low in (FP16, BF16)]
    made = table([tensor("x", 1.0, 0.5, True), tensor("a", 1.0, 1.0, True), tensor("b", 1.0, 1.0, True)], rows)
    record = Rescaled({"x_rescaled:0": 2}, {}, added={"x_rescaled": "x"})
    edges = [("x_rescaled", "x", 0), ("x_rescaled", "literal:other", 0), ("a", "x_rescaled", 0), ("b", "x_rescaled", 0)]
    found = scaled_rounding(made, record, {}, edges).rows(named=True)
    assert [(row["node"], row["input"], row["low_precision_type"]) for row in found] == [
        (node, maker, low) for node, maker, _ in edges for low in (FP16, BF16)
    ]
    both = found[0]
    assert (both["noise"], both["noise_worst"], both["local_sqnr_db"], both["method"]) == (32.0, 46.0, 35.0, "scaled")
    assert both["noise_by_output"] == [4.0, 12.0]
    assert [without_key(row) for row in found[2:4]] == [NOTHING] * 2
    assert [row["noise"] for row in found[4:]] == [8.0, 512.0, 24.0, 24.0]
    # With the exponent of `x` itself it would overflow, and that is a gap; without readers there is nothing.
    loud = table([tensor("x", 2.0**18, 0.5, True)], rows)
    assert [row["why_missing"] for row in scaled_rounding(loud, Rescaled({"x:0": 1}, {}, added={"x_rescaled": "x"}), {},
                                                          edges).rows(named=True)[:2]] == [OVERFLOWS, None]  # fmt: skip
    alone = scaled_rounding(made, record, {}, edges[:1]).rows(named=True)
    assert [without_key(row) for row in alone] == [NOTHING] * 2


def test_without_evidence_there_is_none() -> None:
    made = table([tensor("x", 1.0, 1.0, True)], [])
    assert scaled_rounding(made, Rescaled({}, {}), {}, [("y", "x", 0)]).height == 0


def test_what_was_not_told_apart_is_not_told_apart_now() -> None:
    rows = [evidence("y", "x", low, noise_by_output=None) for low in (FP16, BF16)]
    made = table([tensor("x", 2.0**-12, 2.0**-12, True)], rows)
    found = scaled_rounding(made, Rescaled({"x:0": 4}, {}), {}, [("y", "x", 0), ("z", "literal:other", 0)])
    assert found["noise_by_output"].to_list() == [None] * 4
    assert found["noise"].to_list() == [pytest.approx(128.0), 512.0, 0.0, 0.0]
