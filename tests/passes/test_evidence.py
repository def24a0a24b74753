"""What is read of a range table for the rules: the same numbers, later."""

from __future__ import annotations

import pickle
from functools import partial

import torch
from calibcast.calib import calibrate as measure
from calibcast.passes.evidence import Histogram, evidence_of

# The rules as they stand without evidence from rounding: tests of plans that have it are in test_rounding_plan.py.
calibrate = partial(measure, rounding_batches=0)


def test_evidence_has_the_numbers_of_the_table() -> None:
    """Each column that rules read, and the counts of each histogram."""
    program = torch.export.export(torch.nn.Linear(8, 4), (torch.randn(3, 8),))
    ranges = calibrate(program, [torch.randn(3, 8)], progress=False)
    evidence = evidence_of(ranges)
    assert list(evidence) == list(ranges.frame.select("node", "output").iter_rows())
    for row in ranges.frame.iter_rows(named=True):
        facts = evidence[row["node"], row["output"]]
        for name in ("kind", "min", "max", "absmax", "smallest", "mean", "rms", "masked", "absmax_batch"):
            assert getattr(facts, name) == row[name]
        assert list(facts.histogram or ()) == row["histogram"]
        assert sum(row["histogram"][:255]) == row["elements"]


def test_a_histogram_is_a_tuple_that_is_read_late() -> None:
    """A rule of the user's own finds what it found when it was one: length, slices, comparison, copies."""
    program = torch.export.export(torch.nn.ReLU(), (torch.ones(3),))
    ranges = calibrate(program, [torch.ones(3)], progress=False)
    found = evidence_of(ranges)["relu", 0].histogram
    assert isinstance(found, Histogram)
    counts = tuple(ranges.frame.filter(node="relu")["histogram"][0].to_list())
    assert (len(found), found[127], found[:255], found) == (256, 3, counts[:255], counts)
    assert counts == found == evidence_of(ranges)["input", 0].histogram
    assert hash(found) == hash(counts)
    assert pickle.loads(pickle.dumps(found)) == counts


def test_without_histograms_there_is_none() -> None:
    program = torch.export.export(torch.nn.ReLU(), (torch.ones(3),))
    ranges = calibrate(program, [torch.ones(3)], progress=False, histogram=False)
    assert evidence_of(ranges)["relu", 0].histogram is None
