"""Which batches are held out and which process takes which: a partition, whatever the numbers."""

from itertools import islice, takewhile

from calibcast.engines.job.shares import Share
from hypothesis import given
from hypothesis import strategies as st

lengths = st.integers(0, 60)
worlds = st.integers(1, 7)
shares = st.sampled_from([0.0, 0.01, 0.1, 0.2, 1 / 3, 0.5, 0.9])
mosts = st.none() | st.integers(1, 20)


@given(lengths, worlds, shares, mosts)
def test_processes_together_take_what_one_takes(length, world, share, most):
    alone = list(Share(share, False, most).numbers(length))
    parts = [list(Share(share, False, most, rank, world).numbers(length)) for rank in range(world)]
    assert sorted(number for part in parts for number in part) == alone
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(lengths, shares)
def test_held_out_batches_are_the_others(length, share):
    calibration, held = (list(Share(share, held_out).numbers(length)) for held_out in (False, True))
    assert sorted(calibration + held) == list(range(length))
    assert abs(len(held) - share * length) <= 2
    assert bool(held) == (share > 0 and length > 0)


@given(st.integers(2, 6), st.integers(0, 5), st.sampled_from([0.1, 0.2, 0.5]))
def test_every_second_or_third_batch_has_its_share_too(step, first, share):
    """So the shards of a loader that makes its own have something on both sides."""
    held = set(Share(share, True).numbers(1200))
    mine = range(first, 1200, step)
    assert abs(len(held.intersection(mine)) / len(mine) - share) <= 0.03


@given(lengths, shares)
def test_a_batch_does_not_change_sides_when_there_are_more(length, share):
    fewer = set(Share(share, True).numbers(length))
    more = set(Share(share, True).numbers(length + 10))
    assert fewer == {number for number in more if number < length}


@given(st.integers(1, 40), shares, mosts)
def test_of_an_endless_stream_the_first_are_the_same(length, share, most):
    endless = list(islice(Share(share, False, most).numbers(None), length))
    assert endless == list(Share(share, False, most).numbers(length * 12 + 20))[:length]


@given(worlds, shares, mosts)
def test_shards_of_a_loader_of_its_own_take_what_one_takes(world, share, most):
    every = 120
    alone = list(Share(share, False, most).numbers(every))
    parts = [
        number for rank in range(world)
        for number in takewhile(lambda n: n < every, Share(share, False, most, rank, world).own_numbers())
    ]  # fmt: skip
    assert sorted(parts) == alone
