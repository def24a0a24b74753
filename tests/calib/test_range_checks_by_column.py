"""Every number of a range table that no calibration writes: the first that is refused, and the last that is not.

The checks are given rows in memory: two that are sound, and one between them that is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from calibcast.calib import ArtifactError
from calibcast.calib.range_checks import check_values
from calibcast.calib.range_schema import HIDDEN_SCHEMA, SCHEMA

# Ten elements: one NaN, one of each infinity, two zeros, one masked; the other four are -2, 0.5, 1 and 4.
SOUND: dict[str, Any] = {
    "node": "conv", "output": 0, "op": "aten.conv2d.default", "module": "", "source": "", "kind": "activation",
    "dtype": "float32", "shape": ["10"], "batches": 1, "elements": 10, "min": -2.0, "max": 4.0, "absmax": 4.0,
    "smallest": 0.5, "mean": 0.5, "rms": 2.0, "nan": 1, "posinf": 1, "neginf": 1, "zeros": 2, "masked": 1,
    "absmax_batch": 0, "nonfinite_batch": 0, "hidden_max": 0.0, "hidden_min": 0.0,
    "histogram": [0] * 126 + [1, 1, 1, 1] + [0] * 126,
}  # fmt: skip
ALL = SCHEMA | HIDDEN_SCHEMA
UNKNOWN_TOO = ("min", "max", "absmax", "smallest", "mean", "rms", "absmax_batch", "nonfinite_batch", "histogram")


def check(**changed: Any) -> None:
    middle = SOUND | {"node": "middle"} | changed
    rows = [SOUND, middle, SOUND | {"node": "last"}]
    columns = {name: [row.get(name) for row in rows] for name in ALL}
    check_values(pl.DataFrame(columns, schema=ALL), Path("r.parquet"))


def refused(**changed: Any) -> str:
    """What is said of the row in the middle."""
    with pytest.raises(ArtifactError) as caught:
        check(**changed)
    said = str(caught.value)
    assert said.startswith("r.parquet: the row of tensor ")
    assert said.endswith(". The file was changed by hand, or is damaged: calibrate again.")
    return said.partition(") ")[2].partition(". The file")[0]


def test_sound_rows_are_taken() -> None:
    check()


@pytest.mark.parametrize(
    "changed",
    [
        dict.fromkeys(("min", "max", "absmax", "smallest")),  # nothing is finite
        dict.fromkeys(UNKNOWN_TOO),
        {"zeros": 6},  # all ten are counted
        {"min": -4.0},
        {"min": 4.0},
        {"min": -4.0, "max": -4.0},
        {"smallest": 4.0},
        {"histogram": [10] + [0] * 255},
        {"module": "m" * (1 << 14)},
        {"hidden_max": float("inf")},  # a sum that overflowed
        *({name: 0} for name in ("batches", "nan", "posinf", "neginf", "zeros", "masked", "output")),
    ],
)
def test_the_last_number_that_may_be_is_taken(changed: dict[str, Any]) -> None:
    check(**changed)


@pytest.mark.parametrize("name", sorted(SCHEMA.keys() - set(UNKNOWN_TOO)))
def test_what_every_tensor_has_must_be_there(name: str) -> None:
    assert refused(**{name: None}) == f"has no {name}"


@pytest.mark.parametrize(
    "name",
    ["output", "batches", "elements", "nan", "posinf", "neginf", "zeros", "masked", "absmax_batch", "nonfinite_batch"],
)
def test_counts_and_numbers_of_batches_are_not_negative(name: str) -> None:
    assert refused(**{name: -1}) == f"has a negative {name}"


@pytest.mark.parametrize("name", ["min", "max", "absmax", "smallest", "mean", "rms"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_statistics_are_of_finite_values(name: str, value: float) -> None:
    assert refused(**{name: value}) == f"has NaN or Inf as its {name}"


@pytest.mark.parametrize("name", ["hidden_max", "hidden_min"])
@pytest.mark.parametrize("value", [float("nan"), -1e-30])
def test_hidden_magnitudes_are_not_negative(name: str, value: float) -> None:
    assert refused(**{name: value}) == f"has a negative {name}, or NaN"


@pytest.mark.parametrize("name", ["node", "op", "module", "source", "dtype"])
def test_texts_have_an_end(name: str) -> None:
    assert refused(**{name: "m" * (1 << 14) + "m"}) == f"has a {name} of more than 16384 bytes"
    assert refused(**{name: "é" * (1 << 13) + "m"}) == f"has a {name} of more than 16384 bytes"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kind": "tensor"}, "has a kind that is none of input, parameter, buffer, constant, activation, other"),
        ({"zeros": 7}, "counts more than its elements"),
        *(({name: 11}, "counts more than its elements") for name in ("nan", "posinf", "neginf", "masked")),
        ({"min": 4.5}, "has a min above its max"),
        ({"min": -4.5}, "has an absmax that is not the larger of |min| and |max|"),
        ({"absmax": None}, "has an absmax that is not the larger of |min| and |max|"),
        ({"min": None, "max": None}, "has an absmax that is not the larger of |min| and |max|"),
        ({"smallest": 4.5}, "has a smallest magnitude above its absmax"),
        ({"histogram": [0] * 255}, "has a histogram without 256 bins"),
        ({"histogram": [0] * 257}, "has a histogram without 256 bins"),
        ({"histogram": [1] + [-1] + [0] * 254}, "has a negative count in its histogram"),
        ({"histogram": [11] + [0] * 255}, "counts more in its histogram than its elements"),
    ],
)
def test_a_row_does_not_contradict_itself(changed: dict[str, Any], said: str) -> None:
    assert refused(**changed) == said


def test_the_row_is_named_with_its_numbers_and_how_many_more_there_are() -> None:
    with pytest.raises(ArtifactError) as caught:
        check(nan=-1, output=3)
    assert (
        "the row of tensor middle (output 3; min -2.0, max 4.0, absmax 4.0, elements 10) has a negative nan. "
        in str(caught.value)
    )
    rows = [SOUND | {"nan": -1}, SOUND, SOUND | {"nan": -1}]
    columns = {name: [row.get(name) for row in rows] for name in ALL}
    with pytest.raises(ArtifactError, match="has a negative nan, and so do 1 more"):
        check_values(pl.DataFrame(columns, schema=ALL), Path("r.parquet"))
