"""Engines of the real TensorRT-RTX builder, on a machine without a GPU: built, looked into, cached, saved, refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from calibcast.calib import BuildError, MismatchError
from calibcast.engines import Engine, build
from calibcast.engines.cli import _run
from calibcast.engines.demo import EnergyClassifier
from calibcast.passes import classify, insert_casts
from torch import nn
from torch.export import Dim

from benchmarks.rtx_builder import has_builder
from tests.unmeasured import calibrate

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


class Convolutional(nn.Module):
    """Convolutions, batch norm, in-place ReLU, pooling, and an output that fp16 cannot hold."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3))) * 1e6


class Outside(nn.Module):
    """A sine between linears, and two outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return {"out": self.second(torch.sin(hidden)), "hidden": hidden}


def planned(model, batches, dynamic_shapes=None, **settings):
    torch.manual_seed(0)
    program = torch.export.export(model.eval(), (batches[0],), dynamic_shapes=dynamic_shapes)
    ranges = calibrate(program, batches, progress=False)
    plan = classify(program, ranges, **settings)
    return insert_casts(program, plan), plan, ranges


def ahead(mixed, plan=None, ranges=None, **arguments):
    arguments = {"cache": False, "progress": False, **arguments}
    return build(mixed, plan, ranges, backend="tensorrt", ahead_of_time=True, **arguments)


def ledger_row(engine, node):
    return engine.ledger.row(by_predicate=pl.col("node") == node, named=True)


@pytest.mark.parametrize("low_type", ["float16", "bfloat16"])
def test_the_builder_takes_a_mixed_network_and_its_ledger_shows_the_types(low_type):
    mixed, plan, ranges = planned(Convolutional(), [torch.randn(2, 3, 16, 16)], low_precision_type=low_type)
    # In bf16 TensorRT-RTX 1.6 computes max_pool2d in fp32: a contradiction, which the gate would not pass.
    engine = ahead(mixed, plan, ranges, strict_precision=low_type == "float16")
    assert engine.ledger.filter(pl.col("match") == "unknown").height == 0
    convolution, product = ledger_row(engine, "conv2d"), ledger_row(engine, "mul")
    assert (convolution["planned_type"], convolution["found_by"]) == (low_type, "metadata")
    assert low_type in convolution["actual_types"]
    assert (product["planned_type"], product["agrees"]) == ("float32", True)
    assert engine.record["fallback_to_pytorch"] == {}
    assert engine.record["build_seconds"] > 0


def test_the_builder_takes_the_demos_network():
    mixed, plan, ranges = planned(EnergyClassifier(), [torch.rand(10, 64) * 255])
    assert {"sum_1", "mul_1"} <= set(plan.high_precision_nodes)
    engine = ahead(mixed, plan, ranges)
    assert "float32" in ledger_row(engine, "sum_1")["actual_types"]


@needs_no_gpu
def test_without_a_gpu_it_is_saved_but_neither_run_nor_loaded(tmp_path):
    mixed, plan, ranges = planned(Convolutional(), [torch.randn(2, 3, 16, 16)])
    engine = ahead(mixed, plan, ranges)
    engine.save(tmp_path / "engine")
    files = {
        path.relative_to(tmp_path / "engine").as_posix() for path in (tmp_path / "engine").rglob("*") if path.is_file()
    }
    assert {"manifest.json", "ledger.parquet", "tensorrt/_run_on_acc_0.engine", "tensorrt/wiring.json"} <= files
    with pytest.raises(BuildError, match=r"runs on a GPU and cannot run here.*Save it"):
        engine(torch.randn(2, 3, 16, 16))
    with pytest.raises(BuildError, match="this engine needs a GPU"):
        Engine.load(tmp_path / "engine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tensorrt-rtx": "1.4.0.76"},
            r"built with tensorrt-rtx 1\.4\.0\.76, and here is tensorrt-rtx 1\.6.*Build it again",
        ),
        ({"tensorrt-rtx": None, "tensorrt": "11.0.0"}, r"built with tensorrt 11\.0\.0, and here is"),
    ],
)
def test_an_engine_of_another_version_is_refused(tmp_path, change, message):
    mixed, plan, ranges = planned(Convolutional(), [torch.randn(2, 3, 16, 16)])
    folder = tmp_path / "engine"
    ahead(mixed, plan, ranges).save(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    built = {**manifest["built_with"], **change}
    manifest["built_with"] = {name: version for name, version in built.items() if version is not None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MismatchError, match=message):
        Engine.load(folder)


def test_a_dynamic_input_is_built_for_the_sizes_that_calibration_saw(tmp_path):
    batches = [torch.randn(n, 8) for n in (2, 4, 4, 6)]
    mixed, plan, ranges = planned(Outside(), batches, {"x": {0: Dim("n", min=2, max=64)}})
    ahead(mixed, plan, ranges).save(tmp_path / "engine")
    profiles = json.loads((tmp_path / "engine" / "profiles.json").read_text())["profiles"]
    assert profiles == [[[2, 8], [4, 8], [6, 8]]]


def test_nodes_that_run_in_pytorch_are_named_with_the_reason(tmp_path):
    mixed, plan, ranges = planned(Outside(), [torch.randn(4, 8)])
    engine = ahead(mixed, plan, ranges, torch_executed_ops={torch.ops.aten.sin.default})
    assert engine.record["fallback_to_pytorch"] == {"sin": "kept out by torch_executed_ops"}
    sine = ledger_row(engine, "sin")
    assert (sine["found_by"], sine["actual_types"], sine["agrees"]) == ("pytorch", ["float16"], True)
    engine.save(tmp_path / "engine")
    assert sorted(path.suffix for path in (tmp_path / "engine" / "tensorrt").glob("_run_on*")) == [
        ".engine",
        ".engine",
        ".pt2",
    ]
    with pytest.raises(BuildError, match=r"require_full_compilation=True.*Not taken: sin \(kept out by"):
        ahead(mixed, plan, torch_executed_ops={torch.ops.aten.sin.default}, require_full_compilation=True)


def test_an_unknown_setting_lists_near_names():
    mixed, plan, _ = planned(Outside(), [torch.randn(4, 8)])
    with pytest.raises(BuildError, match=r"no setting 'optimisation_level'; near names: optimization_level"):
        ahead(mixed, plan, optimisation_level=3)
    with pytest.raises(BuildError, match=r"setting custom_engine_cache=.*isolate=False"):
        ahead(mixed, plan, custom_engine_cache=object())


def test_a_second_process_finds_the_engine_of_the_first(empty_cache, tmp_path):
    mixed, _, _ = planned(Convolutional(), [torch.randn(2, 3, 16, 16)])
    torch.export.save(mixed, tmp_path / "mixed.pt2")
    script = (
        "import sys; from calibcast.calib.artifacts import load_program; from calibcast.engines import build\n"
        "engine = build(load_program(sys.argv[1]), backend='tensorrt', ahead_of_time=True, progress=False)\n"
        "engine.save(sys.argv[2]); print(engine.record['cache']['hit'])"
    )

    def run(name):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "mixed.pt2"), str(tmp_path / name)],
            cwd=ROOT, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.split()[-1], next((tmp_path / name).rglob("*.engine")).read_bytes()

    (first, ours), (second, theirs) = run("one"), run("two")
    assert (first, second) == ("False", "True")
    assert ours == theirs
    next(empty_cache.rglob("*.engine")).write_bytes(ours[: len(ours) // 2])
    third, again = run("three")
    assert third == "False"
    assert len(again) > len(ours) // 2


def test_fp16_and_bf16_plans_of_one_model_do_not_share_an_engine(empty_cache):
    torch.manual_seed(0)
    model, x = Outside(), torch.randn(4, 8)
    for low_type in ("float16", "bfloat16"):
        mixed, plan, ranges = planned(model, [x], low_precision_type=low_type)
        engine = ahead(mixed, plan, ranges, cache=True)
        assert engine.record["cache"]["hit"] is False
        assert low_type in ledger_row(engine, "linear")["actual_types"]
    assert len(list(empty_cache.rglob("entry.json"))) == 2


def test_the_command_line_builds_ahead_of_time_and_looks_inside(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), (torch.randn(2, 8),)\n"
        "def data():\n    return [torch.randn(2, 8) for _ in range(2)]\n"
    )
    model, plan, ranges, out = (str(tmp_path / name) for name in ("net.py:model", "p.json", "r.parquet", "engine"))
    assert _run(["calibrate", model, "--data", str(tmp_path / "net.py:data"), "-o", ranges]) == 0
    assert _run(["plan", model, ranges, "-o", plan]) == 0
    command = ["build", model, plan, "--ranges", ranges, "-o", out, "--backend", "tensorrt", "--ahead-of-time"]
    assert _run([*command, "--strict-precision", "--setting", "optimization_level=2"]) == 0
    told = capsys.readouterr().out
    assert "0.0% unknown" in told
    assert "built ahead of time" in told
    assert _run(["inspect", out]) == 0
    told = capsys.readouterr().out
    assert "linear" in told
    assert "metadata" in told
    assert "tensorrt-rtx 1.6" in told
    assert _run([*command, "--setting", "optimization_level"]) == 2
    shutil.rmtree(tmp_path / "engine")
    assert _run(["inspect", out]) == 2


def test_the_gate_on_the_ledger_is_exit_code_3(tmp_path, capsys):
    """In bf16 TensorRT-RTX 1.6 computes a max-pooling in fp32: not what was planned."""
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model():\n    torch.manual_seed(0)\n"
        "    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3))\n"
        "    return net.eval(), (torch.randn(2, 3, 16, 16),)\n"
    )
    model, plan, out = (str(tmp_path / name) for name in ("net.py:model", "p.json", "engine"))
    assert _run(["plan", model, "-o", plan, "--low-precision-type", "bf16"]) == 0
    command = ["build", model, plan, "-o", out, "--ahead-of-time", "--no-cache"]
    assert _run([*command, "--strict-precision"]) == 3
    assert "max_pool2d planned bfloat16, found float32" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()
    assert _run(command) == 0
    assert "1 contradict the plan" in capsys.readouterr().out
