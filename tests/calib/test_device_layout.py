"""How work is laid out for a GPU: the arithmetic around the kernels, which needs none."""

from __future__ import annotations

import pytest
import torch
from calibcast.calib import device_observer
from calibcast.calib.device_observer import BLOCK, PROGRAMS, Layout, fused_problem, observer_for
from calibcast.calib.graph import TensorSpec
from calibcast.calib.hidden import SlicesInMemory
from calibcast.calib.memory_layout import is_dense, memory_levels, pieces, without_repeats
from calibcast.calib.observer import Observer


def slices(count: int, length: int, apart: int = 1) -> SlicesInMemory:
    return SlicesInMemory(count, length, apart, width=count, step=length, pitch=0)


def test_positions_fit_in_int32() -> None:
    """Programs step past the end by at most a block each."""
    most = device_observer._MOST
    assert most > 2**30
    assert most + PROGRAMS * BLOCK < 2**31


@pytest.mark.parametrize(("number", "power"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1023, 1024), (1025, 2048)])
def test_powers_of_two_are_at_least_the_number(number: int, power: int) -> None:
    assert device_observer._power(number) == power


@pytest.mark.parametrize(
    ("places", "group"),
    [
        (slices(1000, 768), (4, 1024)),
        (slices(1000, 5000), (4, 1024)),
        (slices(1000, 60), (64, 64)),
        (slices(3, 60), (4, 64)),
        (slices(100_000, 2), (1024, 2)),
        (slices(10_000, 60, apart=10_000), (32, 1)),  # one cache line of neighbours
        (slices(100_000, 60, apart=100_000), (128, 1)),  # 126 for each program
        (slices(10_000_000, 60, apart=10_000_000), (1024, 1)),
        (slices(20, 60, apart=20), (32, 1)),
    ],
)
def test_a_program_takes_some_slices_at_a_time(places: SlicesInMemory, group: tuple[int, int]) -> None:
    """4096 elements where they lie together, at most 1024 of a slice."""
    assert device_observer._group(places) == group


@pytest.mark.parametrize(
    ("places", "programs", "steps"),
    [
        (slices(1000, 768), 250, 1),
        (slices(1000, 1025), 250, 2),
        (slices(1000, 5000), 250, 5),
        (slices(8000, 1024), 2 * PROGRAMS, 3),  # 2000 groups for 792 programs
        (slices(10_000, 60, apart=10_000), 313, 60),
        (slices(1, 1 << 20), 1, 1024),
    ],
)
def test_steps_are_those_of_one_program(places: SlicesInMemory, programs: int, steps: int) -> None:
    assert device_observer._programs(places) == programs
    assert device_observer._steps(places) == steps


def test_a_layout_gives_rows_their_tensor_and_its_size() -> None:
    layout = Layout(sizes={0: 7, 2: 9}, equals={5: 2, 6: 0}, attention=[2, 5])
    where, attention = layout.tensors(torch.device("cpu"))
    assert where.tolist() == [[0, 2, 5, 6], [0, 2, 2, 0], [7, 9, 9, 7]]
    assert where.dtype == torch.int64
    assert attention.tolist() == [2, 5]
    layout.sizes[8] = 1
    assert layout.tensors(torch.device("cpu"))[0] is where  # made once
    empty, none = Layout().tensors(torch.device("cpu"))
    assert (tuple(empty.shape), tuple(none.shape)) == ((3, 0), (0,))


def test_a_start_is_where_the_memory_of_a_tensor_begins() -> None:
    x = torch.arange(12.0).reshape(3, 4)[1:, 2:]
    start = device_observer._start_of(x)
    assert (start.tolist(), start.data_ptr()) == ([6.0], x.data_ptr())


def test_without_a_gpu_the_plain_observer_measures(caplog: pytest.LogCaptureFixture) -> None:
    assert fused_problem(torch.device("cpu")) == "cpu is no GPU"
    found = observer_for(
        [TensorSpec("x", 0, "", "", "", "activation", "float32", ())], torch.device("cpu"), True, frozenset()
    )
    assert type(found) is Observer
    assert not caplog.records
    with device_observer.on(torch.device("cpu")) as nothing:
        assert nothing is None


@pytest.mark.parametrize(
    ("shape", "expanded", "times"),
    [((3, 1), (3, 5), 5), ((1, 1), (4, 5), 20), ((3, 4), (3, 4), 1), ((1, 3), (1, 3), 1), ((3, 1, 2), (3, 7, 2), 7)],
)
def test_repeats_of_an_expanded_tensor_are_measured_once(
    shape: tuple[int, ...], expanded: tuple[int, ...], times: int
) -> None:
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    found, count = without_repeats(x.expand(expanded))
    assert (found.numel(), count) == (x.numel(), times)
    assert sorted(found.flatten().tolist()) == sorted(x.flatten().tolist())


@pytest.mark.parametrize(
    ("dimensions", "levels"),
    [
        ([(3, 4), (4, 1)], [(12, 1)]),
        ([(4, 1), (3, 4)], [(12, 1)]),
        ([(3, 8), (4, 1)], [(4, 1), (3, 8)]),
        ([(3, 8), (1, 99), (4, 2)], [(12, 2)]),
        ([(1, 5)], [(1, 1)]),
        ([], [(1, 1)]),
        ([(2, 60), (3, 12), (4, 3)], [(12, 3), (2, 60)]),
        ([(2, 36), (3, 12), (4, 3)], [(24, 3)]),
        ([(2, 1), (3, 4), (5, 12)], [(2, 1), (15, 4)]),
        ([(2, 1), (3, 4), (5, 6)], [(2, 1), (3, 4), (5, 6)]),
    ],
)
def test_runs_of_equal_steps_are_joined(dimensions: list[tuple[int, int]], levels: list[tuple[int, int]]) -> None:
    assert memory_levels(dimensions) == levels


@pytest.mark.parametrize("limit", [1, 5, 7, 12, 100])
@pytest.mark.parametrize("cut", [False, True])
def test_pieces_have_every_element_once_and_at_most_so_many(limit: int, cut: bool) -> None:
    x = torch.arange(84.0).reshape(3, 4, 7)
    x = x[:, :, 1:6] if cut else x
    assert is_dense(x) is not cut
    found = list(pieces(x, limit))
    assert all(piece.dim() == 1 and 0 < piece.numel() <= limit for piece in found)
    assert sorted(torch.cat(found).tolist()) == sorted(x.flatten().tolist())
    # No smaller than need be: whole rows of the widest dimension, or a whole tensor.
    assert len(found) <= -(-x.numel() // limit) * 2
    assert list(pieces(x[:0], limit)) == []
