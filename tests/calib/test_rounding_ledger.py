"""Sums that wait for the end of a sweep: each comes back to whoever gave it, in order."""

from __future__ import annotations

import pytest
import torch
from calibcast.calib.rounding_ledger import Error, Ledger, energy, on_host, parts_of


def test_numbers_come_back_to_who_gave_them() -> None:
    """Nothing before it is settled; then in the order in which they were given, once."""
    ledger, seen = Ledger(), []
    ledger.await_([torch.tensor(1.0), torch.tensor([2.0, 3.0])], lambda numbers: seen.append(("a", [*numbers])))
    ledger.await_([], lambda numbers: seen.append(("b", [*numbers])))
    assert seen == []
    ledger.settle()
    ledger.settle()
    assert seen == [("a", [1.0, 2.0, 3.0]), ("b", [])]


def test_tensors_of_several_types_are_copied_to_the_host_by_type() -> None:
    """As of a GPU: numbers that are on the host already stay where they are."""
    parts = [torch.tensor([1.0]), [2.0], torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([5.0])]
    assert on_host(parts) == [[1.0], [2.0], [3.0, 4.0], [5.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.complex64])
def test_energy_is_the_sum_of_squares(dtype: torch.dtype) -> None:
    """Of half precision in fp32: 300 squared is no float16."""
    tensor = torch.full((2, 3), 300.0).to(dtype).t()
    assert float(energy(tensor)) == pytest.approx(6 * 300.0**2)


def test_an_error_leaves_what_it_is_held_against() -> None:
    """The memory of a result may be used, but not where it is that of the exact one."""
    exact = torch.ones(3)
    assert Error(exact.view(3), lambda: exact, may_write=True).difference(exact).tolist() == [0.0] * 3
    assert exact.tolist() == [1.0] * 3
    made = torch.full((3,), 3.0)
    assert Error(made, lambda: made, may_write=True).difference(exact).data_ptr() == made.data_ptr()


def test_parts_are_alike_where_nothing_is_known() -> None:
    """No energy, or infinite."""
    assert parts_of([1.0, 3.0]) == parts_of([0.125, 0.375]) == [0.25, 0.75]
    assert parts_of([0.0, 0.0]) == parts_of([float("inf"), 1.0]) == [0.5, 0.5]
