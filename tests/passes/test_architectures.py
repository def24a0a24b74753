"""Every architecture of the zoo: cast, run, close to fp32, no more fp32 than the data asks for, saved and loaded."""

from __future__ import annotations

import io

import pytest
import torch

for package in ("timm", "torchvision", "transformers"):
    pytest.importorskip(package)

from calibcast.passes import insert_casts  # noqa: E402

from benchmarks.zoo import ZOO  # noqa: E402
from benchmarks.zoo.architecture import CALIBRATION_BATCHES  # noqa: E402
from benchmarks.zoo.coverage import ITEMS, coverage  # noqa: E402
from benchmarks.zoo.judgement import TOLERANCE, Trial, excess_of, outputs_of, shares_of  # noqa: E402

SLOW = {name: pytest.mark.slow for name, entry in ZOO.items() if entry.slow}
LOW_TYPES = pytest.mark.parametrize("low_type", TOLERANCE, ids=["fp16", "bf16"])
# Of each kind one that is quick, and those whose noise is spread, whose outputs are integers, or near 0 by chance.
QUICK = {
    "resnet", "mobilenet_v3", "video_resnet", "densenet", "wavenet", "pointnet", "many_outputs", "bert",
    "mixture_of_experts",
}  # fmt: skip
BY_EVIDENCE = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ZOO]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=SLOW.get(name, ())) for name in ZOO])
def trial(request: pytest.FixtureRequest) -> Trial:
    """A model of the zoo, exported and calibrated on three batches; a fourth is unseen."""
    return Trial.of(ZOO[request.param])


@LOW_TYPES
def test_the_cast_graph_is_close_and_no_more_than_needed_is_fp32(trial: Trial, low_type: torch.dtype) -> None:
    """Types, shapes and structure stay; errors are within 1% (fp16) or 5% (bf16), or near whole-half's own."""
    plan = trial.plan(low_type)
    mixed = insert_casts(trial.program, plan)
    outcome = trial.judged(plan, mixed)
    assert not outcome.misses, "\n".join([*outcome.misses, *map(str, outcome.high)])


@pytest.fixture(scope="module", params=BY_EVIDENCE)
def measured(request: pytest.FixtureRequest) -> Trial:
    """The same with evidence of rounding from all three batches."""
    return Trial.of(ZOO[request.param], CALIBRATION_BATCHES)


@LOW_TYPES
def test_a_plan_for_the_budget_keeps_no_more_than_that_takes(measured: Trial, low_type: torch.dtype) -> None:
    """As close as the rules' plan has to be; and no more fp32 than that, but where it takes that to meet the budget."""
    plan, by_rules = measured.plan(low_type), measured.plan_by_rules(low_type)
    outcome = measured.judged(plan, insert_casts(measured.program, plan))
    shares = shares_of(measured.program, by_rules, insert_casts(measured.program, by_rules))
    half = measured.half_error(low_type, by_channel=True)
    short = [*outcome.misses, *excess_of(outcome, shares, half, TOLERANCE[low_type])]
    assert not short, "\n".join([*short, *map(str, outcome.high)])


def test_the_cast_graph_saves_and_loads(trial: Trial) -> None:
    """A file of it gives the same bits."""
    mixed = insert_casts(trial.program, trial.plan(torch.float16))
    stream = io.BytesIO()
    torch.export.save(mixed, stream)
    stream.seek(0)
    loaded = torch.export.load(stream)
    (mine,), (theirs,) = outputs_of(loaded, trial.inputs[-1:]), outputs_of(mixed, trial.inputs[-1:])
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other


def test_the_zoo_has_everything_that_real_models_have() -> None:
    assert len(ZOO) >= 50
    assert [item for item, models in coverage(ZOO.values()).items() if not models] == []
    assert {item for entry in ZOO.values() for item in entry.covers} <= set(ITEMS)


@pytest.mark.parametrize("name", ["bert", "resnet", "lstm_tagger"])
def test_a_model_is_the_same_on_every_call(name: str) -> None:
    one, other = (ZOO[name].sample().module.state_dict() for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert str(ZOO[name].unseen()) == str(ZOO[name].unseen())
    assert str(ZOO[name].unseen()) != str(ZOO[name].batches()[0])
