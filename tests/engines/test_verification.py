"""`verify`: an engine is anything called like the model, so a function is engine enough for most of it."""

import math

import pytest
import torch
from calibcast.calib import CalibcastError, GateError, MismatchError
from calibcast.calib.execution import ProgramRunner
from calibcast.engines import build, verify
from calibcast.passes import classify, insert_casts
from torch import nn

from tests.unmeasured import calibrate


class Logits(nn.Module):
    """A linear with a dict of outputs, one of them integer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        logits = self.linear(x)
        return {"logits": logits, "answer": logits.argmax(-1)}


class Logarithm(nn.Module):
    def forward(self, x):
        return torch.log(x) * 2.0


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Logits().eval()


@pytest.fixture
def program(model):
    return torch.export.export(model, (torch.randn(8, 4),))


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 4, generator=generator) for _ in range(count)]


def test_the_model_itself_passes_with_no_error(model, program):
    report = verify(model, program, batches(3), progress=False)
    assert report.passed
    assert report.batches == 3
    assert report.frame["output"].to_list() == ["output['logits']", "output['answer']"]
    assert report.frame["sqnr_db"].to_list() == [math.inf, math.inf]
    assert report.require(min_sqnr_db=100.0, min_top1=1.0) is report


def test_the_gate_names_output_number_and_bound(model, program):
    def worse(x):
        out = model(x)
        return {**out, "logits": out["logits"] * 1.1}

    report = verify(worse, program, batches(2), progress=False)
    with pytest.raises(GateError, match=r"output\['logits'\]: sqnr_db 20, required at least 40") as failure:
        report.require(min_sqnr_db=40.0)
    assert failure.value.report is report
    report.require(min_sqnr_db=19.0)  # thresholds do not apply to the integer output


def test_nan_of_the_engine_alone_fails_without_any_threshold(model, program):
    def broken(x):
        return {name: value * math.nan if value.is_floating_point() else value for name, value in model(x).items()}

    report = verify(broken, program, batches(1), progress=False)
    assert not report.passed
    with pytest.raises(GateError, match="24 NaN or Inf in batch 0 where the reference is finite"):
        report.require()


def test_nan_in_the_reference_is_named_by_first_node_and_batch():
    program = torch.export.export(Logarithm(), (torch.ones(4),))
    data = [torch.ones(4), torch.tensor([1.0, -1.0, 2.0, 3.0])]
    with pytest.warns(UserWarning, match=r"first in batch 1 at node log"):
        report = verify(Logarithm(), program, data, progress=False)
    assert report.passed  # the engine did no worse
    assert report.frame["nonfinite_reference"].to_list() == [1]
    with pytest.raises(GateError, match=r"fp32 reference itself.*batch 1 at node log"):
        report.require()


def test_metrics_take_two_or_three_arguments_and_are_averaged_over_samples(program, model):
    data = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long)) for _ in range(2)]
    report = verify(
        model,
        program,
        data,
        transform=lambda batch: batch[0],
        metrics={
            "same": lambda output, reference: (output["answer"] == reference["answer"]).float().mean(),
            "label": lambda output, reference, batch: (output["answer"] >= batch[1]).float().mean(),
        },
        progress=False,
    )
    assert report.metrics == {"same": 1.0, "label": 1.0}
    report.require(min_metrics={"same": 1.0})
    with pytest.raises(GateError, match="metric label 1, required at least 2"):
        report.require(min_metrics={"label": 2.0})
    with pytest.raises(CalibcastError, match="no metric 'lable'"):
        report.require(min_metrics={"lable": 1.0})


def test_a_metric_that_raises_is_named_with_its_batch(program, model):
    with pytest.raises(CalibcastError, match="metric 'bad' raised ZeroDivisionError on batch 0"):
        verify(model, program, batches(1), metrics={"bad": lambda output, reference: 1 / 0}, progress=False)


def test_outputs_of_another_structure_or_shape_are_a_mismatch(program):
    with pytest.raises(MismatchError, match="the engine gives 1 outputs"):
        verify(lambda x: x, program, batches(1), progress=False)
    with pytest.raises(MismatchError, match=r"of the program \[8, 3\]"):
        verify(lambda x: {"logits": x, "answer": x}, program, batches(1), progress=False)


def test_data_that_calibration_saw_warns(program):
    seen = batches(2)
    engine = build(program, ranges=calibrate(program, seen, progress=False), backend="eager")
    with pytest.warns(UserWarning, match="2 of 3 batches were also calibrated on"):
        verify(engine, program, seen + batches(1, seed=5), progress=False)


class Scaled:
    """An engine whose error is what it is made with: `factor` on top of its cast graph."""

    backend, device, ranges = "tensorrt", torch.device("cpu"), None

    def __init__(self, program, factor):
        self.program, self.factor = program, factor

    def __call__(self, x):
        out = ProgramRunner(self.program).run([x])
        return {"logits": out[0] * self.factor, "answer": out[1]}


@pytest.mark.parametrize(
    ("low", "factor", "blame"), [(True, 1.0, "plan"), (False, 1.01, "engine"), (False, 1.0, "none")]
)
def test_an_error_is_attributed_to_plan_or_engine(program, low, factor, blame):
    ranges = calibrate(program, batches(1), progress=False)
    plan = classify(program, ranges, nodes_to_exclude=() if low else ["linear"])
    report = verify(Scaled(insert_casts(program, plan), factor), program, batches(2, seed=1), progress=False)
    row = report.attribution.row(0, named=True)
    assert row["output"] == "output['logits']"
    assert row["blame"] == blame
    assert (row["plan_rel_l2"] > 0) == low
    assert (row["engine_rel_l2"] > 0.005) == (factor != 1.0)
    assert f"to blame is {blame}" in str(report)


def test_the_eager_backend_needs_no_attribution_and_a_function_cannot_have_one(model, program):
    engine = build(program, backend="eager")
    assert verify(engine, program, batches(1), progress=False).attribution is None
    assert (
        verify(engine, program, batches(1), progress=False, attribute=True).attribution["blame"].to_list()
        == ["none"] * 2
    )
    with pytest.raises(CalibcastError, match="attribute=True needs an Engine"):
        verify(model, program, batches(1), progress=False, attribute=True)
