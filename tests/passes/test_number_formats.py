"""The limits of the half-precision formats are those of torch."""

import pytest
import torch
from calibcast.calib import PlanError
from calibcast.passes import NodeFacts
from calibcast.passes.number_formats import BFLOAT16, FLOAT16, format_of


@pytest.mark.parametrize(("dtype", "found"), [(torch.float16, FLOAT16), (torch.bfloat16, BFLOAT16)])
def test_limits_are_those_of_torch(dtype, found):
    info = torch.finfo(dtype)
    assert format_of(dtype) is found
    assert (found.max, found.smallest_normal, found.eps) == (info.max, info.smallest_normal, info.eps)
    assert str(dtype) == f"torch.{found.name}"


def test_names_are_as_good_as_types():
    assert [format_of(name) for name in ("fp16", "half", "float16", "torch.float16")] == [FLOAT16] * 4
    assert [format_of(name) for name in ("bf16", "torch.bfloat16", BFLOAT16)] == [BFLOAT16] * 3


@pytest.mark.parametrize("other", [torch.float32, "int8", None, ["fp16"]])
def test_other_types_are_refused(other):
    with pytest.raises(PlanError, match=r"low_precision_type=.*: known are torch\.float16 and torch\.bfloat16"):
        format_of(other)


def test_facts_without_a_low_type_are_of_half_precision():
    facts = NodeFacts("linear")
    assert facts.low_type is torch.float16
    assert facts.low is FLOAT16
