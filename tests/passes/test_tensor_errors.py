"""How far tensors are apart, against numpy over all batches at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from calibcast.passes import tensor_errors
from calibcast.passes.tensor_errors import (
    COLUMNS,
    TensorErrors,
    decibels,
    decibels_of_changed,
    most_changed,
    rounding_db,
)

CPU = torch.device("cpu")
INF, NAN = math.inf, math.nan
Pair = tuple[torch.Tensor, torch.Tensor]


def columns(*batches: Pair, exact: bool = False, mask: float | None = None) -> dict[str, Any]:
    errors = TensorErrors(2, CPU, [1] if exact else [])
    for number, (ours, theirs) in enumerate(batches):
        errors.update(1, ours, theirs, number + 5, mask)
    found = errors.columns()
    assert list(found) == list(COLUMNS)
    # The row that nothing was compared in stays empty.
    assert [found[name][0] for name in ("elements", "nonfinite", "max_abs", "unlike")] == [0, 0, 0.0, 0]
    assert math.isnan(found["rel_l2"][0])
    assert found["first_nonfinite_batch"][0] is None
    return {name: values[1] for name, values in found.items()}


def by_numpy(*batches: Pair) -> dict[str, Any]:
    ours, theirs = (np.concatenate([b[i].double().numpy().ravel() for b in batches]) for i in (0, 1))
    both = np.isfinite(ours) & np.isfinite(theirs)
    difference, reference = (ours - theirs)[both], theirs[both]
    ratio = np.linalg.norm(difference) / np.linalg.norm(reference)
    bad = [i + 5 for i, (a, b) in enumerate(batches) if bool((~a.isfinite() & b.isfinite()).any())]
    return {
        "sqnr_db": -20 * math.log10(ratio), "rel_l2": ratio, "changed": None, "max_abs": np.abs(difference).max(),
        "absmax": np.abs(ours[np.isfinite(ours)]).max(), "absmax_reference": np.abs(theirs[np.isfinite(theirs)]).max(),
        "elements": ours.size, "nonfinite": (~np.isfinite(ours)).sum(),
        "nonfinite_reference": (~np.isfinite(theirs)).sum(),
        "nonfinite_alone": (~np.isfinite(ours) & np.isfinite(theirs)).sum(),
        "first_nonfinite_batch": min(bad, default=None), "unlike": 0,
    }  # fmt: skip


def noisy(seed: int, bad: tuple[float, ...] = (), reference_bad: tuple[float, ...] = ()) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    theirs = 10 * torch.randn(4, 6, 5, generator=generator)
    ours = theirs + 0.1 * torch.randn(4, 6, 5, generator=generator)
    ours.view(-1)[3 : 3 + len(bad)] = torch.tensor(bad)
    theirs.view(-1)[4 : 4 + len(reference_bad)] = torch.tensor(reference_bad)
    return ours, theirs


BATCHES: dict[str, list[Pair]] = {
    "one": [noisy(0)],
    "two": [noisy(0), noisy(1)],
    "ours is not finite": [noisy(0), noisy(1, (NAN, INF, -INF)), noisy(2, (INF,))],
    "theirs is not": [noisy(0, (), (INF, NAN)), noisy(1)],
    "both are not": [noisy(0, (NAN, INF, -INF), (INF, INF)), noisy(1)],
    "other strides": [(noisy(0)[0].permute(2, 0, 1), noisy(0)[1].permute(2, 0, 1).contiguous())],
    "half and double": [(noisy(0)[0].half(), noisy(0)[1].double())],
}


@pytest.mark.parametrize("step", [None, 7, 25])
@pytest.mark.parametrize("name", BATCHES)
def test_numbers_are_those_of_all_batches_at_once(monkeypatch: pytest.MonkeyPatch, name: str, step: int | None) -> None:
    if step is not None:
        monkeypatch.setattr(tensor_errors, "_STEP", step)
    found, expected = columns(*BATCHES[name]), by_numpy(*BATCHES[name])
    for column, value in expected.items():
        assert found[column] == (value if value is None else pytest.approx(value)), column


def test_equal_tensors_are_infinitely_near() -> None:
    x = torch.arange(5.0)
    found = columns((x, x.clone()))
    assert (found["sqnr_db"], found["rel_l2"], found["max_abs"], found["first_nonfinite_batch"]) == (
        INF,
        0.0,
        0.0,
        None,
    )
    zero = columns((x, x * 0))
    assert (zero["sqnr_db"], zero["rel_l2"]) == (-INF, INF)
    none = columns((x * NAN, x))
    assert math.isnan(none["sqnr_db"])
    assert math.isnan(none["rel_l2"])
    assert none["first_nonfinite_batch"] == 5
    empty = columns((x[:0], x[:0]))
    assert (empty["elements"], math.isnan(empty["sqnr_db"])) == (0, True)


def test_integers_have_the_share_that_differs() -> None:
    x = torch.tensor([1, 2, 3, 4])
    found = columns((x, torch.tensor([1, 9, 3, 9])), (x, x), exact=True)
    assert (found["changed"], found["sqnr_db"], found["rel_l2"]) == (2 / 8, None, None)
    assert (found["max_abs"], found["elements"]) == (7.0, 8)
    flags = columns((torch.tensor([True, False]), torch.tensor([True, True])), exact=True)
    assert flags["changed"] == 0.5
    assert math.isnan(columns((x[:0], x[:0]), exact=True)["changed"])


def test_complex_tensors_are_pairs_of_numbers() -> None:
    x = torch.tensor([1 + 1j, 2 - 1j])
    found = columns((x + 0.5j, x))
    assert found["rel_l2"] == pytest.approx(math.sqrt(0.5 / 7))
    assert found["elements"] == 4
    assert columns((x.conj(), torch.tensor([1 - 1j, 2 + 1j])))["rel_l2"] == 0.0


def test_other_shapes_are_counted_and_not_compared() -> None:
    x = torch.ones(3)
    found = columns((x, x), (torch.ones(4), x), (x + 1, x), (torch.ones(3, 1), x))
    assert (found["unlike"], found["elements"]) == (2, 6)


@pytest.mark.parametrize(
    ("ours", "theirs", "apart"),
    [
        (-1e4, -INF, False),
        (-65504.0, -1e9, False),
        (-9999.0, -1e9, True),
        (-1e9, -9999.0, True),
        (-1e9, NAN, False),
    ],
)
def test_mask_values_mean_the_same_however_low(ours: float, theirs: float, apart: bool) -> None:
    """At or below the limit in both; NaN is no mask value."""
    found = columns((torch.tensor([ours, 1.0]), torch.tensor([theirs, 1.0])), mask=-1e4)
    assert (found["rel_l2"] > 0) is apart
    assert found["nonfinite_reference"] == math.isnan(theirs)


def test_a_row_tells_its_sums() -> None:
    errors = TensorErrors(1, CPU)
    errors.update(0, torch.tensor([1.0, 5.0, INF]), torch.tensor([4.0, 1.0, 2.0]), 0)
    assert (errors.compared(0), errors.powers(0)) == (2, (25.0, 17.0))
    assert errors.relative(0) == pytest.approx(math.sqrt(25 / 17))


def test_decibels_of_errors_and_of_shares() -> None:
    assert [decibels(0.0), decibels(0.01), decibels(INF), decibels(1.0)] == [INF, pytest.approx(40.0), -INF, 0.0]
    assert math.isnan(decibels(NAN))
    assert [decibels_of_changed(0.005), decibels_of_changed(0.0)] == [pytest.approx(40.0), INF]
    assert most_changed(40.0) == pytest.approx(0.005)
    assert decibels_of_changed(most_changed(27.0)) == pytest.approx(27.0)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_rounding_leaves_at_least_what_is_said(low: torch.dtype) -> None:
    """Just above a power of two, where a step is largest beside the value."""
    x = torch.linspace(1.0, 1.02, 100_001)
    error = float((x.to(low).float() - x).norm() / x.norm())
    assert rounding_db(low) == pytest.approx(decibels(error), abs=0.3)
