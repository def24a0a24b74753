"""What only a GPU can show: run with `python -m pytest -m gpu` where CUDA and Torch-TensorRT are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from calibcast import engines
from calibcast.calib import BatchError, BuildError, MismatchError
from calibcast.engines import Engine, build, verify
from calibcast.engines.ledger.ledger_text import ledger_text, unknown_share
from calibcast.engines.tensorrt.builder.torch_tensorrt_adapter import installed_flavour
from calibcast.engines.tensorrt.compatibility import supported_gpu
from calibcast.passes import classify, insert_casts
from torch import nn
from torch.export import Dim

from tests.unmeasured import calibrate

pytestmark = pytest.mark.gpu


class Small(nn.Module):
    """A convolution, a squared sum beyond fp16, and a linear."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        features = torch.relu(self.conv(x))
        energy = (features * features * 1000).sum((2, 3))
        return self.head(energy / (1.0 + energy.mean(-1, keepdim=True)))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    model = Small().eval().cuda()
    return torch.export.export(
        model, (torch.randn(4, 3, 16, 16).cuda(),), dynamic_shapes={"x": {0: Dim("n", min=1, max=32)}}
    )


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 16, 16, generator=generator) for n in (4, 8, 8)]


@pytest.fixture(scope="module")
def engine(program, batches):
    return engines.compile(program, (), calibration_dataloader=batches, backend="tensorrt", progress=False)


def test_the_engine_is_close_to_fp32_and_finite(engine, program, batches):
    fresh = [batch.flip(0) * 0.5 for batch in batches]
    report = verify(engine, program, fresh, progress=False)
    report.require(min_sqnr_db=40.0)
    assert engine.plan.low_precision_nodes
    assert engine.plan.high_precision_nodes


def test_the_engine_is_saved_and_loaded(engine, program, batches, tmp_path):
    engine.save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine")
    x = batches[1].cuda()
    torch.testing.assert_close(loaded(x), engine(x))
    assert loaded.plan.decisions == engine.plan.decisions


def test_a_size_that_calibration_never_saw_is_refused_by_name(engine):
    with pytest.raises(BatchError, match=r"built for \[4, 3, 16, 16\] to \[8, 3, 16, 16\]"):
        engine(torch.randn(16, 3, 16, 16).cuda())


def test_auto_takes_tensorrt_where_the_flavour_supports_the_gpu(program, batches):
    """Else Inductor: on a Hopper GPU under TensorRT-RTX."""
    name, _ = installed_flavour()
    built = engines.build(program, ranges=calibrate(program, batches, progress=False))
    assert built.backend == ("tensorrt" if supported_gpu(name, torch.cuda.get_device_capability()) else "inductor"), (
        built.why
    )


def test_calibration_on_the_gpu_measures_what_the_cpu_measures(batches):
    torch.manual_seed(0)
    host = torch.export.export(Small().eval(), (batches[0],), dynamic_shapes={"x": {0: Dim("n", min=1, max=32)}})
    torch.backends.cudnn.allow_tf32 = False
    there = calibrate(host, batches, device="cuda", progress=False)
    here = calibrate(host, batches, progress=False)
    assert there.fingerprint == here.fingerprint
    for name in ("node", "output", "kind", "batches", "elements", "nan", "posinf", "neginf"):
        assert there.frame[name].to_list() == here.frame[name].to_list()
    for name in ("min", "max", "absmax", "mean", "rms"):
        ours, theirs = (torch.tensor(table.frame[name].to_list()) for table in (there, here))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert next(iter(host.state_dict.values())).device.type == "cpu"


def test_calibration_does_not_wait_for_the_gpu_within_a_batch(program, batches):
    """Nothing is read back from the device while a batch runs: a synchronisation would raise."""
    from calibcast.calib.execution import ProgramRunner
    from calibcast.calib.graph import tensor_specs
    from calibcast.calib.observer import Observer

    runner = ProgramRunner(program)
    observer = Observer(tensor_specs(program), runner.device, histogram=True)
    flat = [batches[0].cuda()]
    runner.run(flat, observer.watch)  # warm up: lazy initialisation synchronises
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        observer.start(0)
        runner.run(flat, observer.watch)
        observer.finish()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(observer.total.batches.sum()) > 0


def test_batches_replayed_as_a_graph_measure_what_the_interpreter_measures():
    """One kernel a tensor, captured from the second batch of a size on, against some twenty kernels, interpreted."""
    from calibcast.calib.calibration_run import prepare
    from calibcast.calib.captured_execution import CapturedRunner
    from calibcast.calib.device_observer import DeviceObserver, fused_problem
    from calibcast.calib.masks import mask_tensors
    from calibcast.calib.observer import Observer

    assert fused_problem(torch.device("cuda")) is None
    torch.manual_seed(0)
    program = torch.export.export(
        Small().eval().cuda(), (torch.randn(4, 3, 16, 16).cuda(),), dynamic_shapes={"x": {0: Dim("n", min=1, max=32)}}
    )
    run = prepare(program, None, True, "warn")
    fused = DeviceObserver(run.specs, run.runner.device, True, mask_tensors(program))
    plain = Observer(run.specs, run.runner.device, True, mask_tensors(program))
    captured = CapturedRunner(run.runner, fused)
    for index, size in enumerate((4, 8, 4, 4, 8, 8, 4)):
        flat = [torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(index)).cuda() * (index + 1)]
        captured.run_batch(flat, index, fused.watch)
        plain.start(index)
        run.runner.run_batch(flat, index, plain.watch)
        for observer in (fused, plain):
            observer.finish()
    assert captured.replayed == 5
    assert torch.equal(fused.total.counts, plain.total.counts)
    assert torch.equal(fused.total.histograms, plain.total.histograms)
    assert torch.equal(fused.total.absmax_batch, plain.total.absmax_batch)
    torch.testing.assert_close(fused.total.values[:, :3], plain.total.values[:, :3], rtol=1e-6, atol=0)
    torch.testing.assert_close(fused.total.values[:, 3:], plain.total.values[:, 3:], rtol=1e-5, atol=1e-4)


def test_the_fused_kernels_measure_what_the_host_measures():
    root = Path(__file__).parents[2]
    script = root / "tests" / "calib" / "fused_against_host.py"
    done = subprocess.run(
        [sys.executable, str(script), "cuda"], cwd=root, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def test_batches_on_the_gpu_are_known_again_on_the_host(batches):
    """Their hash is taken beside the run, of memory that the run does not wait for."""
    host = torch.export.export(Small().eval(), (batches[0],), dynamic_shapes={"x": {0: Dim("n", min=1, max=32)}})
    on_host = calibrate(host, batches * 3, device="cuda", progress=False)
    on_gpu = calibrate(host, (batch.cuda() for batch in batches * 3), device="cuda", progress=False)
    assert on_gpu.calibration.input_hashes == on_host.calibration.input_hashes
    assert len(on_gpu.calibration.input_hashes) == len(batches)


class Regions(nn.Module):
    """A convolution, then a linear inside `torch.autocast(fp32)`, as in Torch-TensorRT's proposal."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.conv(x)).mean((2, 3))
        with torch.autocast("cuda", dtype=torch.float32):
            return self.head(x)


def test_a_network_with_an_autocast_region_builds_and_runs(batches):
    torch.manual_seed(0)
    model = Regions().eval().cuda()
    engine = engines.compile(
        model, (batches[0].cuda(),), calibration_dataloader=batches[:1], backend="tensorrt", progress=False
    )
    assert "conv2d" in engine.plan.low_precision_nodes
    x = batches[0].cuda()
    torch.testing.assert_close(engine(x), model(x), rtol=1e-2, atol=1e-2)
    assert engine(x).dtype == torch.float32


def test_whole_bf16_and_other_settings_reach_torch_tensorrt(batches):
    torch.manual_seed(0)
    model = Small().eval().cuda()
    arguments = {"calibration_dataloader": batches[:1], "backend": "tensorrt", "progress": False}
    engine = engines.compile(
        model, (batches[0].cuda(),), low_precision_type=torch.bfloat16, optimization_level=1, **arguments
    )
    verify(engine, torch.export.export(model, (batches[0].cuda(),)), [batches[0] * 0.9], progress=False).require(
        min_sqnr_db=25.0
    )
    with pytest.raises(BuildError, match="has no setting 'optimisation_level'; near names: optimization_level"):
        engines.compile(model, (batches[0].cuda(),), optimisation_level=1, **arguments)


def test_weak_typing_is_refused_where_tensorrt_has_it_no_more():
    from calibcast.engines.tensorrt.builder.torch_tensorrt_adapter import installed_flavour

    if installed_flavour()[0] != "torch-tensorrt-rtx":
        pytest.skip("the standard flavour may still have weak typing")
    model = Small().eval().cuda()
    with pytest.raises(BuildError, match=r"weak typing.*is not in torch-tensorrt-rtx"):
        engines.compile(
            model,
            (torch.randn(2, 3, 8, 8).cuda(),),
            use_explicit_typing=False,
            enable_autocast=False,
            backend="tensorrt",
        )


class Attending(nn.Module):
    """Attention with 8 heads of 64 between linears, as in BERT."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(512, 512) for _ in range(4))

    def forward(self, x):
        batch, length, width = x.shape
        heads = [layer(x).view(batch, length, 8, 64).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        attended = nn.functional.scaled_dot_product_attention(*heads)
        return x + self.out(attended.transpose(1, 2).reshape(batch, length, width))


class Outside(nn.Module):
    """A sine between linears, and two outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return {"out": self.second(torch.sin(hidden)), "hidden": hidden}


def planned(model, batches, **settings):
    program = torch.export.export(model.eval().cuda(), (batches[0].cuda(),))
    ranges = calibrate(program, batches, progress=False)
    plan = classify(program, ranges, **settings)
    return program, insert_casts(program, plan), plan, ranges


def test_the_ledger_of_a_built_engine_finds_its_nodes(engine):
    assert engine.record["isolated"] is True
    assert engine.ledger.height == len(engine.plan.low_precision_nodes) + len(engine.plan.high_precision_nodes)
    text = ledger_text(engine.ledger)
    assert unknown_share(engine.ledger) < 0.2, text
    convolution = engine.ledger.row(by_predicate=pl.col("node") == "conv2d", named=True)
    assert "float16" in convolution["actual_types"], text


def test_an_engine_built_ahead_of_time_runs_here(batches, tmp_path):
    torch.manual_seed(0)
    program, mixed, plan, ranges = planned(Small(), batches[:1])
    built = build(mixed, plan, ranges, backend="tensorrt", ahead_of_time=True, cache=False, progress=False)
    built.save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine")
    report = verify(loaded, program, [batches[0] * 0.9], progress=False)
    report.require(min_sqnr_db=40.0)
    assert report.attribution["blame"].to_list()[0] in {"plan", "engine", "both"}
    assert loaded.ledger.equals(built.ledger)


def test_nodes_in_pytorch_and_engines_give_what_the_program_gives(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    _, mixed, plan, ranges = planned(Outside(), [x])
    engine = build(
        mixed, plan, ranges, backend="tensorrt", cache=False, torch_executed_ops={torch.ops.aten.sin.default}
    )
    assert set(engine.record["fallback_to_pytorch"]) == {"sin"}
    ours, theirs = engine(x), mixed.module()(x.cuda())
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
    engine.save(tmp_path / "engine")
    torch.testing.assert_close(Engine.load(tmp_path / "engine")(x), ours, rtol=0, atol=0)


def test_a_fresh_process_loads_and_runs_a_saved_engine(engine, batches, tmp_path):
    engine.save(tmp_path / "engine")
    torch.save(batches[1], tmp_path / "x.pt")
    script = (
        "import sys, torch; from calibcast.engines import Engine\n"
        "x = torch.load(sys.argv[2]); torch.save(Engine.load(sys.argv[1])(x).cpu(), sys.argv[3])"
    )
    files = [str(tmp_path / name) for name in ("engine", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", script, *files], check=True, timeout=900, cwd=Path(__file__).parents[2])
    # TensorRT-RTX compiles for the GPU when an engine is loaded, and may take other kernels in another process.
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), engine(batches[1].cuda()).cpu(), rtol=1e-2, atol=2e-3)


def test_another_gpu_is_refused(engine, tmp_path):
    engine.save(tmp_path / "engine")
    path = tmp_path / "engine" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["built_with"]["gpu"] = "NVIDIA L40S"
    path.write_text(json.dumps(manifest))
    with pytest.raises(MismatchError, match="built for NVIDIA L40S, and here is"):
        Engine.load(tmp_path / "engine")


def test_half_precision_attention_is_built_or_remedied():
    """TensorRT-RTX 1.4 fails to set half-precision attention up on an H200, inside cuDNN."""
    torch.manual_seed(0)
    x = torch.randn(4, 128, 512)
    program, mixed, plan, ranges = planned(Attending(), [x], data_max=float("inf"))
    engine = build(mixed, plan, ranges, backend="tensorrt", cache=False, on_failure="fallback")
    print("remedies:", engine.record["remedies"])
    verify(engine, program, [x * 0.9], progress=False).require(min_sqnr_db=40.0)


class Masked(nn.Module):
    """Attention over words, some of which are padding."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(384, 1152), nn.Linear(384, 384)

    def forward(self, x, keep):
        q, k, v = (part.unflatten(-1, (12, 32)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mask = keep.bool()[:, None, None, :].expand(-1, 1, 128, 128)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(x.shape))


def test_masked_attention_in_fp32_is_right():
    """Fused by TensorRT-RTX 1.4 it is not: with `decompose_attention=False` its error was 1.3."""
    torch.manual_seed(0)
    x, lengths = torch.randn(3, 128, 384, device="cuda") * 3, torch.tensor([5, 20, 128], device="cuda")
    keep = (torch.arange(128, device="cuda")[None] < lengths[:, None]).long()
    program = torch.export.export(Masked().eval().cuda(), (x, keep))
    engine = build(program, None, backend="tensorrt", cache=False, progress=False)
    with torch.no_grad():
        wanted = program.module()(x, keep)
    assert float((engine(x, keep) - wanted).norm() / wanted.norm()) < 0.02


def test_building_in_this_process_gives_the_same(batches, monkeypatch):
    torch.manual_seed(0)
    _, mixed, plan, ranges = planned(Small(), batches[:1])
    arguments = {"backend": "tensorrt", "cache": False, "progress": False}
    from torch_tensorrt.dynamo.runtime import TorchTensorRTModule

    set_up, real = [], TorchTensorRTModule.setup_engine
    monkeypatch.setattr(TorchTensorRTModule, "setup_engine", lambda module: set_up.append(real(module)))
    here = build(mixed, plan, ranges, isolate=False, **arguments)
    assert len(set_up) == 1, "it takes as long as the build"
    there = build(mixed, plan, ranges, **arguments)
    x = batches[0].cuda()
    torch.testing.assert_close(here(x), there(x), rtol=1e-3, atol=1e-3)
    assert here.record["isolated"] is False
    assert here.ledger["match"].to_list() == there.ledger["match"].to_list()
