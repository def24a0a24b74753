"""What only a GPU can show: run with `python -m pytest -m gpu` where CUDA and Torch-TensorRT are."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import engines
from calib import BatchError, BuildError, calibrate
from engines import Engine, verify

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


def test_auto_takes_tensorrt(program, batches):
    built = engines.build(program, ranges=calibrate(program, batches, progress=False))
    assert built.backend == "tensorrt"


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
    from calib.execution import ProgramRunner
    from calib.graph import tensor_specs
    from calib.observer import Observer

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
    from engines.torch_tensorrt_adapter import installed_flavour

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
