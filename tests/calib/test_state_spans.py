"""Which bytes a tensor covers in its storage, and which tensors share some."""

from __future__ import annotations

import pytest
import torch
from calibcast.calib.state_copies import _overlapping, _span, copies_of_written

WHOLE = torch.arange(24, dtype=torch.float32)


@pytest.mark.parametrize(
    ("tensor", "first", "end"),
    [
        (WHOLE, 0, 96),
        (WHOLE[3], 12, 16),
        (WHOLE[4:6], 16, 24),
        (WHOLE.view(4, 6)[1:, 2], 32, 84),
        (WHOLE.view(4, 6).t()[2:4], 8, 88),
        (WHOLE[:1].expand(5), 0, 4),
        (WHOLE.view(torch.int16)[3:5], 6, 10),
    ],
)
def test_the_bytes_of_a_tensor(tensor: torch.Tensor, first: int, end: int) -> None:
    assert _span(tensor) == (WHOLE.data_ptr(), first, end)


def test_what_is_empty_or_sparse_covers_none() -> None:
    assert _span(WHOLE[:0]) is None
    assert _span(torch.eye(2).to_sparse()) is None


def test_groups_are_of_tensors_that_share_bytes() -> None:
    spans = {"a": (1, 0, 8), "b": (1, 8, 12), "c": (1, 11, 20), "d": (1, 12, 13), "e": (1, 19, 21), "f": (2, 0, 8),
             "g": (1, 21, 30), "h": (3, 0, 100), "i": (3, 10, 20), "j": (3, 90, 110)}  # fmt: skip
    assert _overlapping(spans) == [{"a"}, {"b", "c", "d", "e"}, {"g"}, {"f"}, {"h", "i", "j"}]
    assert _overlapping({}) == []


@pytest.mark.parametrize("first", range(8))
def test_copies_overlap_as_the_tensors_did_wherever_they_begin(first: int) -> None:
    memory = WHOLE.clone()
    tensors = {"a": memory[first : first + 4], "b": memory[first + 3 : first + 6], "c": memory[first + 6 :]}
    copies = copies_of_written(tensors, {"a"})
    assert copies.keys() == {"a", "b"}
    assert all(torch.equal(copies[name], tensors[name]) for name in copies)
    copies["a"][3] = -1.0
    assert copies["b"][0] == -1.0
    assert torch.equal(memory, WHOLE)


def test_one_number_is_copied_and_so_is_what_has_no_memory() -> None:
    memory, empty = torch.tensor([5.0]), torch.zeros(0)
    tensors = {"a": memory[0], "b": memory, "empty": empty, "other": empty}
    copies = copies_of_written(tensors, {"a", "empty", "unknown"})
    assert copies.keys() == {"a", "b", "empty"}
    copies["a"].fill_(7.0)
    assert (copies["b"].tolist(), memory.tolist()) == ([7.0], [5.0])
    assert copies["empty"] is not empty
