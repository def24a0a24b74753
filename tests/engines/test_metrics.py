"""The streamed comparison of two outputs, against formulas on whole tensors."""

import math

import pytest
import torch
from calibcast.engines.judging.metrics import RTOL, OutputError


def compared(pairs):
    error = OutputError("output")
    for batch, (engine, reference) in enumerate(pairs):
        error.update(engine, reference, batch)
    return error


def test_streaming_gives_what_the_whole_gives():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(12, 5, generator=generator)
    engine = reference + 0.01 * torch.randn(12, 5, generator=generator)
    row = compared(list(zip(engine.split(5), reference.split(5), strict=True))).row()
    difference = (engine - reference).double()
    wide = reference.double()
    assert row["max_abs"] == pytest.approx(float(difference.abs().max()))
    assert row["mean_abs"] == pytest.approx(float(difference.abs().mean()))
    assert row["rel_l2"] == pytest.approx(float(difference.norm() / wide.norm()))
    assert row["sqnr_db"] == pytest.approx(10 * math.log10(float(wide.square().sum() / difference.square().sum())))
    cosine = torch.nn.functional.cosine_similarity(engine.double().flatten(), wide.flatten(), dim=0)
    assert row["cosine"] == pytest.approx(float(cosine))
    assert row["top1"] == pytest.approx(float((engine.argmax(-1) == reference.argmax(-1)).double().mean()))
    assert torch.allclose(engine, reference, rtol=RTOL, atol=row["passing_atol"] * 1.001)
    assert not torch.allclose(engine, reference, rtol=RTOL, atol=row["passing_atol"] * 0.99)


def test_equal_outputs_have_no_error_and_infinite_sqnr():
    x = torch.randn(3, 4)
    row = compared([(x, x)]).row()
    assert (row["max_abs"], row["rel_l2"], row["sqnr_db"], row["cosine"], row["top1"]) == (0, 0, math.inf, 1, 1)


def test_only_what_the_engine_alone_made_nonfinite_is_held_against_it():
    reference = torch.tensor([[1.0, math.inf, -math.inf, math.nan, 2.0]])
    same = compared([(reference.clone(), reference)])
    assert (same.row()["nonfinite"], same.row()["nonfinite_reference"], same.only_engine) == (3, 3, 0)
    worse = compared([(torch.tensor([[math.nan, math.inf, -math.inf, math.nan, 2.0]]), reference)])
    assert worse.only_engine == 1
    assert "batch 0" in worse.problem
    assert worse.row()["max_abs"] == 0.0  # over what is finite in both


def test_integer_outputs_are_compared_without_top1():
    row = compared([(torch.tensor([[1, 2]]), torch.tensor([[1, 4]]))]).row()
    assert row["max_abs"] == 2
    assert row["top1"] is None


def test_a_zero_reference_is_told_apart():
    zero = torch.zeros(2, 2)
    assert compared([(zero, zero)]).row()["sqnr_db"] == math.inf
    assert compared([(zero + 1, zero)]).row()["sqnr_db"] == -math.inf
    assert compared([(zero + 1, zero)]).row()["cosine"] == 0.0
