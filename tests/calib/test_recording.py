"""What a pipeline really calls its modules with, recorded and read as a dataset."""

import pytest
import torch
from calibcast.calib import ArtifactError, CalibcastError, NewSequence, RecordedCalls, calibrate, recorded
from torch import nn
from torch.utils.data import DataLoader


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, t, *, hint=None, extra=None):
        y = self.linear(x) * t
        if hint is not None:
            y = y + hint["bias"][0]
        return y

    def decode(self, z):
        return self.linear(z)


def run(module, steps=10, size=4):
    torch.manual_seed(0)
    x = torch.randn(3, size)
    for step in range(steps):
        x = module(x, torch.tensor(float(steps - step)), hint={"bias": (torch.ones(4), None)}, extra=None)
    return x


def inputs(item):
    return item.batch if isinstance(item, NewSequence) else item


def test_calls_come_back_as_they_were_made(tmp_path):
    module, seen = Denoiser(), []
    module.register_forward_pre_hook(lambda _, a, k: seen.append((a, k)), with_kwargs=True)
    with recorded(module, tmp_path / "calls") as calls:
        result = run(module)
    torch.testing.assert_close(run(Denoiser.forward.__get__(module)), result, msg="recording changes nothing")
    assert len(calls) == len(RecordedCalls(tmp_path / "calls")) == 10
    assert [isinstance(item, NewSequence) for item in calls] == [True] + [False] * 9
    for item, (args, kwargs) in zip(calls, seen, strict=True):
        mine, named = inputs(item)
        torch.testing.assert_close(list(mine), list(args), rtol=0, atol=0)
        assert named.keys() == {"hint", "extra"}
        assert named["extra"] is None
        assert isinstance(named["hint"]["bias"], tuple)
        torch.testing.assert_close(named["hint"]["bias"][0], kwargs["hint"]["bias"][0])
    run(module)
    assert len(calls) == 10, "the hook is gone"


@pytest.mark.parametrize("made", ["", "deep", "deep/down"])
def test_a_folder_is_made_or_may_be_there_while_it_is_empty(tmp_path, made):
    (tmp_path / "calls").mkdir()
    module = nn.Identity()
    with recorded(module, tmp_path / "calls" / made) as calls:
        module(torch.ones(2))
    assert len(calls) == 1
    for full in (tmp_path / "calls" / made, next((tmp_path / "calls" / made).glob("*.safetensors"))):
        with pytest.raises(ArtifactError, match="exists and is not empty"), recorded(module, full):
            pass


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float64])
def test_types_are_kept(tmp_path, dtype):
    module = nn.Identity()
    value = torch.ones(2, 3).to(dtype).t()
    with recorded(module, tmp_path / "calls") as calls:
        module(value)
    ((found,), _) = inputs(calls[0])
    torch.testing.assert_close(found, value, rtol=0, atol=0)


def test_a_value_is_kept_as_it_was_before_the_module_wrote_into_it(tmp_path):
    class Writes(nn.Module):
        def forward(self, x):
            return x.add_(1)

    module = Writes()
    with recorded(module, tmp_path / "calls") as calls:
        module(torch.zeros(3))
    assert inputs(calls[0])[0][0].sum() == 0


@pytest.mark.parametrize(("when_full", "kept"), [("thin", [0, 16, 32, 48]), ("stop", list(range(8)))])
def test_a_recording_keeps_to_its_bytes(tmp_path, when_full, kept):
    module = nn.Identity()
    with recorded(module, tmp_path / "calls", max_bytes=38_000, when_full=when_full) as calls:
        for step in range(60):
            module(torch.full((1000,), float(step)))
    assert sum(path.stat().st_size for path in (tmp_path / "calls").glob("*.safetensors")) <= 38_000
    steps = [int(inputs(item)[0][0][0]) for item in calls]
    assert steps[0] == 0
    assert len(steps) >= len(kept)
    assert steps == kept if when_full == "stop" else steps[-1] >= 48, steps


def test_several_modules_and_a_method_of_one(tmp_path):
    first, second = Denoiser(), Denoiser()
    with recorded({"unet": first, "decoder": second.decode}, tmp_path / "calls") as calls:
        run(first, 3)
        second.decode(torch.ones(2, 4))
    assert {name: len(found) for name, found in calls.items()} == {"unet": 3, "decoder": 1}
    assert len(RecordedCalls(tmp_path / "calls" / "decoder")) == 1
    assert "decode" not in vars(second)


def test_new_sequences_are_said_by_the_user(tmp_path):
    module = nn.Identity()
    with recorded(module, tmp_path / "calls") as calls:
        for _ in range(2):
            calls.new_sequence()
            module(torch.ones(1))
            module(torch.ones(1))
    assert [isinstance(item, NewSequence) for item in calls] == [True, False, True, False]


def test_calibration_reads_recorded_calls_also_through_a_loader(tmp_path):
    module = Denoiser().eval()
    with recorded(module, tmp_path / "calls") as calls:
        run(module)
    args, kwargs = inputs(calls[0])
    program = torch.export.export(module, args, kwargs)
    ranges = calibrate(program, calls, progress=False)
    assert ranges.calibration.batches == 10
    loader = DataLoader(calls, batch_size=None, collate_fn=lambda call: call)
    again = calibrate(program, loader, progress=False)
    assert again.frame.equals(ranges.frame)


def test_what_cannot_be_recorded_is_said(tmp_path):
    with (
        pytest.raises(CalibcastError, match=r"the call\[0\]\[0\] is a object, which cannot be recorded"),
        recorded(nn.Identity(), tmp_path / "a") as _,
        recorded(module := nn.Identity(), tmp_path / "b"),
    ):
        module(object())
    with pytest.raises(CalibcastError, match="takes a module or a method of one"), recorded(len, tmp_path / "c"):
        pass
    with pytest.raises(ArtifactError, match="is not empty"), recorded(nn.Identity(), tmp_path / "a"):
        pass
    with (
        pytest.raises(CalibcastError, match="cannot be the name of a folder"),
        recorded({"../x": nn.Identity()}, tmp_path / "d"),
    ):
        pass
    with pytest.raises(ArtifactError):
        RecordedCalls(tmp_path)


def test_a_damaged_call_is_told(tmp_path):
    module = nn.Identity()
    with recorded(module, tmp_path / "calls") as calls:
        module(torch.ones(100))
    (path,) = (tmp_path / "calls").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="not a readable recorded call"):
        calls[0]
