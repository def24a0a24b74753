"""State and sizes of engines on a GPU: run with `python -m pytest -m gpu` where CUDA and Torch-TensorRT are."""

import pytest
import torch
from calibcast.calib import NewSequence, calibrate
from calibcast.engines import Engine, build, verify
from calibcast.passes import classify, insert_casts

from benchmarks.pipelines import PROMPT, continued, sequenced, trained_decoder

pytestmark = pytest.mark.gpu
STEPS = 20


@pytest.fixture(scope="module")
def decoding():
    """(model on the GPU, prompts, its tokens, calls, program)"""
    model, _, numbers = trained_decoder(60)
    model = model.cuda()
    prompts = [numbers[start : start + PROMPT] for start in (0, 5000)]
    calls = []
    hook = model.register_forward_pre_hook(lambda _, args: calls.append(tuple(value.cpu() for value in args)))
    with torch.no_grad():
        wanted = [continued(sequenced(model), prompt, "cuda") for prompt in prompts]
    hook.remove()
    sequenced(model)
    calls = [NewSequence(call) if call[1].item() == 0 else call for call in calls]
    program = torch.export.export(model, (torch.zeros(1, 1, dtype=torch.int64).cuda(), torch.tensor([3]).cuda()))
    return prompts, wanted, calls, program


@pytest.mark.parametrize("kind", ["fp32", "cast"])
def test_a_decoder_with_a_static_cache_gives_the_programs_tokens(decoding, tmp_path, kind):
    prompts, wanted, calls, program = decoding
    ranges = calibrate(program, calls, progress=False, carry_state=True)
    plan = None if kind == "fp32" else classify(program, ranges)
    mixed = program if plan is None else insert_casts(program, plan)
    engine = build(mixed, plan, ranges, backend="tensorrt", cache=False, progress=False, on_failure="fallback",
                   batches=calls[:2], reference=program)  # fmt: skip
    for prompt, theirs in zip(prompts, wanted, strict=True):
        engine.reset()
        assert continued(engine, prompt, "cuda")[:STEPS] == theirs[:STEPS]
    report = verify(engine, program, calls, progress=False, carry_state=True)
    report.require(min_sqnr_db=30.0)
    engine.reset()
    for call in calls[1:8]:
        engine(*call)
    engine.save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine")
    for call in calls[8:12]:
        torch.testing.assert_close(loaded(*call), engine(*call), rtol=1e-2, atol=1e-2)
    engine.reset()
    loaded.reset()
    torch.testing.assert_close(loaded(*calls[1]), engine(*calls[1]), rtol=1e-2, atol=1e-2)


def test_an_engine_is_tried_set_up_once_and_says_what_was_seen(decoding):
    _, _, calls, program = decoding
    engine = build(program, backend="tensorrt", cache=False, progress=False, batches=calls[:2], on_failure="fallback")
    trial = engine.record["trial"]
    assert trial["batches"] == 2
    assert trial["problem"] is None
    assert trial["outputs"][0]["engine_db"] >= trial["outputs"][0]["asked_db"]
    assert "outside_of_support" in engine.record
