"""What a program keeps between calls: carried from call to call, saved, loaded, put back."""

import copy

import pytest
import torch
from calibcast.calib import ArtifactError, CalibcastError, NewSequence
from calibcast.calib.sequences import FlatInputs
from calibcast.calib.tensor_files import load_tensors, save_tensors
from calibcast.engines import Engine, build, compile, verify
from calibcast.engines.tensorrt.trial_run import judged
from calibcast.passes import classify, insert_casts
from torch import nn

from tests.unmeasured import calibrate


class Mean(nn.Module):
    """A running mean and a counter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        self.calls.add_(1)
        return self.linear(x - self.mean), self.calls + 0


@pytest.fixture
def program():
    torch.manual_seed(0)
    return torch.export.export(Mean().eval(), (torch.randn(4, 8),))


@pytest.fixture(params=["as exported", "functional", "cast"])
def kind(request, program):
    if request.param == "functional":
        return program.run_decompositions({})
    if request.param == "cast":
        ranges = calibrate(program, [torch.randn(4, 8)], progress=False)
        return insert_casts(program, classify(program, ranges))
    return program


CALLS = [torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


def test_an_engine_carries_its_state_from_call_to_call_and_begins_anew(kind, program):
    engine, reference = build(kind, backend="eager"), copy.deepcopy(program).module()
    for _ in range(2):
        for number, x in enumerate(CALLS, 1):
            output, calls = engine(x)
            assert int(calls) == number
            if number == 1:
                first = output
            last = output
        torch.testing.assert_close(engine.runtime._runner.state["b_calls"], torch.tensor(5))
        engine.reset()
    for x in CALLS:
        wanted, _ = reference(x)
    torch.testing.assert_close(last, wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(engine(CALLS[0])[0], first)
    assert int(kind.state_dict["calls"]) == 0, "the program's own buffers are left alone"


def test_state_is_saved_loaded_and_put_back(kind, tmp_path):
    engine = build(kind, backend="eager")
    engine(CALLS[0])
    engine.save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine")
    for x in CALLS[1:]:
        torch.testing.assert_close(loaded(x), engine(x), rtol=0, atol=0)
    loaded.reset()
    assert int(loaded(CALLS[0])[1]) == 1


def test_state_of_another_program_is_refused(program, tmp_path):
    engine = build(program, backend="eager")
    engine(CALLS[0])
    engine.save(tmp_path / "engine")
    save_tensors(tmp_path / "engine" / "state_now.safetensors", {"other": torch.zeros(3)})
    with pytest.raises(ArtifactError, match="has other, which the program does not have"):
        engine.runtime.restore({"other": torch.zeros(3)})
    with pytest.raises(ArtifactError, match="is not the state_now that"):
        Engine.load(tmp_path / "engine")
    (tmp_path / "engine" / "state_now.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ArtifactError, match="is not the state_now that"):
        Engine.load(tmp_path / "engine")


def test_tensors_of_every_kind_are_kept(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        "half": torch.randn(3).bfloat16(),
        "turned": base.t(),
        "part": base[1],
        "none": torch.zeros(0, 2),
        "bool": torch.tensor([True, False]),
        "number": torch.tensor(3),
    }
    save_tensors(tmp_path / "t.safetensors", tensors)
    found = load_tensors(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_calibration_can_carry_state_from_batch_to_batch(program):
    ones = [torch.full((4, 8), 100.0)] * 6

    def mean_of(batches, **options):
        ranges = calibrate(program, batches, progress=False, **options)
        row = ranges.frame.filter((ranges.frame["node"] == "add_") & (ranges.frame["output"] == 0))
        return row["max"][0]

    assert mean_of(ones) == pytest.approx(10)
    assert mean_of(ones, carry_state=True) == pytest.approx(100 * (1 - 0.9**6), rel=1e-4)
    split = [*ones[:3], NewSequence(ones[3]), *ones[4:]]
    assert mean_of(split, carry_state=True) == pytest.approx(100 * (1 - 0.9**3), rel=1e-4)
    as_told = iter([False, False, False, True, False, False])
    found = mean_of(ones, carry_state=True, transform=lambda x: NewSequence(x) if next(as_told) else x)
    assert found == pytest.approx(100 * (1 - 0.9**3), rel=1e-4)
    with pytest.raises(CalibcastError, match="cannot be resumed"):
        calibrate(program, ones, carry_state=True, checkpoint="x")


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        self.total.add_(x * 1.0)
        return self.total + 0


def test_verification_starts_from_equal_state_and_errors_add_up_over_a_sequence():
    program = torch.export.export(Sum().eval(), (torch.ones(4),))

    class Off:
        """An engine that adds a little too much in each call."""

        device = torch.device("cpu")

        def __init__(self):
            self.total, self.resets = torch.zeros(4), 0

        def __call__(self, x):
            self.total = self.total + x * 1.01
            return self.total

        def reset(self):
            self.total, self.resets = torch.zeros(4), self.resets + 1

    calls = [torch.ones(4)] * 5
    engine = build(program, backend="eager")
    engine(torch.ones(4))
    exact = verify(engine, program, calls, progress=False)
    assert exact.frame["max_abs"][0] == 0
    assert verify(engine, program, calls, progress=False, carry_state=True).frame["max_abs"][0] == 0
    assert verify(Off(), program, calls, progress=False).frame["max_abs"][0] == pytest.approx(0.01, rel=1e-3)
    off = Off()
    assert verify(off, program, calls, progress=False, carry_state=True).frame["max_abs"][0] == pytest.approx(
        0.05, rel=1e-3
    )
    assert off.resets == 2
    split = [*calls[:3], NewSequence(calls[3]), calls[4]]
    found = verify(Off(), program, split, progress=False, carry_state=True)
    assert found.frame["max_abs"][0] == pytest.approx(0.03, rel=1e-3)


def test_compile_proves_the_plan_over_the_sequence():
    x = torch.ones(4)
    for carry in (True, False):
        engine = compile(
            Sum().eval(), (x,), calibration_dataloader=[x] * 4, backend="eager", carry_state=carry, progress=False
        )
        assert engine.plan.proof.carry_state is carry


def test_a_trial_can_run_over_a_sequence():
    """An engine that keeps a little more than it should is right in every single call."""
    program = torch.export.export(Sum().eval(), (torch.ones(4),))

    class Keeping:
        def __init__(self):
            self.total = torch.zeros(4)

        def __call__(self, x):
            self.total = self.total * 1.05 + x
            return self.total

        def reset(self):
            self.total = torch.zeros(4)

    calls = [[torch.ones(4)], [torch.ones(4)]]
    assert judged(Keeping(), program, calls).problem is None
    found = judged(Keeping(), program, calls, carry_state=True)
    assert "of the engine has" in found.problem
    calls[1] = FlatInputs(calls[1])
    calls[1].begins = True
    assert judged(Keeping(), program, calls, carry_state=True).problem is None


class GivenCache(nn.Module):
    def forward(self, x, cache):
        cache["keys"].add_(x)
        return cache["keys"] * 2


def test_an_engine_leaves_inputs_as_they_are_and_says_so():
    """A decoder whose caller holds the cache would otherwise forget, without a word."""
    program = torch.export.export(GivenCache().eval(), (torch.ones(4), {"keys": torch.zeros(4)}))
    with pytest.warns(UserWarning, match=r"writes to its inputs cache\['keys'\].*Return the new values too"):
        engine = build(program, backend="eager")
    cache = {"keys": torch.zeros(4)}
    assert engine(torch.ones(4), cache).tolist() == [2.0] * 4
    assert cache["keys"].tolist() == [0.0] * 4
