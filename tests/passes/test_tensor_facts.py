"""The magnitude that a share of the elements stays within, and the tensors that a node answers for."""

from __future__ import annotations

import math

import pytest
import torch
from calibcast.passes import NodeFacts, TensorFacts
from calibcast.passes.number_formats import BFLOAT16, FLOAT16


def histogram(counts: dict[int, int]) -> list[int]:
    return [counts.get(place, 0) for place in range(256)]


@pytest.mark.parametrize(
    ("counts", "quantile", "magnitude"),
    [
        ({127: 90, 130: 10}, 0.9, 2.0),  # bin 127 has the magnitudes from 1 to 2
        ({127: 90, 130: 10}, 0.91, 9.0),  # bin 130 ends at 16, and nothing is above 9
        ({127: 90, 129: 5, 130: 5}, 0.91, 8.0),
        ({127: 90, 130: 10}, 0.5, 2.0),
        ({127: 90, 130: 10}, 1.0, 9.0),
        ({0: 99, 130: 1}, 0.99, 2.0**-126),  # zeros
        ({254: 100}, 0.5, 9.0),
        ({100: 49, 254: 51}, 0.5, 9.0),  # the largest bin counts ..
        ({100: 49, 255: 51}, 0.5, 2.0**-26),  # .. and what is not finite does not
        ({}, 0.5, 2.0**-126),
    ],
)
def test_a_share_of_the_finite_elements(counts: dict[int, int], quantile: float, magnitude: float) -> None:
    assert TensorFacts("x", absmax=9.0, histogram=histogram(counts)).magnitude(quantile) == magnitude


def test_without_a_histogram_the_peak_counts_and_without_a_peak_nothing_is_known() -> None:
    assert TensorFacts("x", absmax=9.0).magnitude(0.5) == 9.0
    assert math.isnan(TensorFacts("x", histogram=histogram({127: 1})).magnitude(0.5))


def test_what_a_node_answers_for() -> None:
    own, made, weight = TensorFacts("x"), TensorFacts("y", precision="low"), TensorFacts("w", kind="parameter")
    result = TensorFacts("z")
    facts = NodeFacts("n", inputs=(own, made, weight), outputs=(result,))
    assert facts.tensors == facts.judged == (own, made, weight, result)
    assert NodeFacts("n", inputs=(own, made), outputs=(result,), moves=True).judged == (own,)
    assert [TensorFacts("x", kind=kind).is_weight for kind in ("parameter", "buffer", "constant", "input")] == [
        True, True, True, False,
    ]  # fmt: skip
    assert (facts.low, facts.low_type) == (FLOAT16, torch.float16)
    assert NodeFacts("n", low_type=BFLOAT16).low is BFLOAT16
