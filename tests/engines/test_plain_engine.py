"""An engine that leaves alone: its files, and the runner that needs TensorRT and torch only.

TensorRT cannot run here, so one that stands for it computes with the program what the engine would, at the addresses
that the runner gives.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from calibcast import Engine, build, classify, insert_casts
from calibcast.calib.artifacts import load_json, save_json
from calibcast.calib.errors import ArtifactError, BatchError, BuildError, MismatchError
from calibcast.engines.cli import _run, main
from calibcast.engines.plain_engine import export_engine
from calibcast.engines.runtime import PlainEngine, read_tensors
from calibcast.engines.triton_config import triton_config
from torch import nn
from torch.export import Dim

from tests.unmeasured import calibrate

if importlib.util.find_spec("torch_tensorrt") is None:
    pytest.skip("needs Torch-TensorRT-RTX to build with", allow_module_level=True)


class Counting(nn.Module):
    """Keeps a sum over its calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("total", torch.zeros(4))

    def forward(self, image, more):
        logits = self.last(torch.relu(self.first(image)) * more["scale"][0])
        self.total.add_(logits.mean(0))
        return {"logits": logits, "probs": torch.softmax(logits + self.total, -1)}


def inputs(rows):
    return torch.randn(rows, 8), {"scale": [torch.rand(rows, 1)]}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An engine of TensorRT-RTX in its folder, and its cast program."""
    rows = {0: Dim("batch", min=1, max=16)}
    shapes = {"image": rows, "more": {"scale": [rows]}}
    program = torch.export.export(Counting().eval(), inputs(3), dynamic_shapes=shapes)
    ranges = calibrate(program, [inputs(2), inputs(4), inputs(4)], progress=False)
    plan = classify(program, ranges)
    engine = build(insert_casts(program, plan), plan, ranges, backend="tensorrt", ahead_of_time=True, progress=False)
    folder = tmp_path_factory.mktemp("built") / "engine"
    engine.save(folder)
    return folder, engine.program


@pytest.fixture
def exported(built, tmp_path):
    return export_engine(built[0], tmp_path / "out").parent


def test_io_json_says_what_goes_in_and_out(exported):
    """The caller's names, also on the engine itself; types, sizes, profiles, state, versions."""
    io = json.loads((exported / "io.json").read_text())
    assert [(t["name"], t["binding"], t["dtype"], t["shape"]) for t in io["inputs"]] == [
        ("image", "image", "float32", ["batch", 8]),
        ("more_scale_0", "more_scale_0", "float32", ["batch", 1]),
    ]
    assert [io["inputs"][0][key] for key in ("min", "opt", "max")] == [[2, 8], [4, 8], [4, 8]]
    assert [(t["name"], t["binding"], t["shape"]) for t in io["outputs"]] == [
        ("logits", "logits", ["batch", 4]),
        ("probs", "probs", ["batch", 4]),
    ]
    (pair,) = io["state"]
    assert (pair["name"], pair["input"], pair["in_place"], pair["shape"]) == ("total", "buf_total", False, [4])
    assert io["library"] == "tensorrt-rtx"
    assert io["least_compute_capability"] == "8.0"
    assert io["versions"]["tensorrt-rtx"]
    assert read_tensors(exported / "state.safetensors")["total"].tolist() == [0.0] * 4
    assert not (exported / "config.pbtxt").exists()  # Triton has no backend for TensorRT-RTX


def test_the_engine_is_what_the_builder_gave(built, exported):
    """Byte for byte."""
    assert (exported / "model.engine").read_bytes() == (built[0] / "tensorrt/_run_on_acc_0.engine").read_bytes()


class StandIn:
    """`tensorrt_rtx`, as far as the runner uses it: `run` takes and gives {binding: tensor}."""

    Logger = type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None})
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")

    def __init__(self, io, run, gives=lambda: True):
        self.__version__ = io["versions"]["tensorrt-rtx"]
        ins = [t["binding"] for t in io["inputs"]] + [pair["input"] for pair in io["state"]]
        outs = [t["binding"] for t in io["outputs"]] + [pair["output"] for pair in io["state"]]
        self.modes = dict.fromkeys(ins, "in") | dict.fromkeys(outs, "out")
        self.run, self.gives, self.shapes, self.at = run, gives, {}, {}

    def Runtime(self, logger):  # noqa: N802 - TensorRT's name
        return self

    def deserialize_cuda_engine(self, data):
        return self if self.gives() else None

    def create_execution_context(self):
        return self

    @property
    def num_io_tensors(self):
        return len(self.modes)

    def get_tensor_name(self, index):
        return list(self.modes)[index]

    def get_tensor_mode(self, name):
        return self.modes[name]

    def get_tensor_dtype(self, name):
        return "DataType.FLOAT"

    def is_shape_inference_io(self, name):
        return False

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name):
        return (4,) if name.startswith("output") else (self.shapes["image"][0], 4)

    def set_tensor_address(self, name, address):
        self.at[name] = address

    def execute_async_v3(self, stream):
        given = {name: self._tensor(name, self.shapes[name]) for name, mode in self.modes.items() if mode == "in"}
        for name, value in self.run(given).items():
            self._tensor(name, tuple(value.shape)).copy_(value)
        return True

    def _tensor(self, name, shape):
        memory = (ctypes.c_char * (4 * math.prod(shape))).from_address(self.at[name])
        return torch.frombuffer(memory, dtype=torch.float32).reshape(shape)


def by_program(module):
    """What the engine computes, by the program that it was built from."""

    def run(given):
        with torch.no_grad():
            module.total.copy_(given["buf_total"])
            answer = module(given["image"], {"scale": [given["more_scale_0"]]})
            return {"logits": answer["logits"], "probs": answer["probs"], "output2": module.total.clone()}

    return run


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, whose memory is the host's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "L4")
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))


@pytest.fixture
def runner(built, exported, gpu, monkeypatch):
    io = json.loads((exported / "io.json").read_text())
    stand_in = StandIn(io, by_program(copy.deepcopy(built[1].module())))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", stand_in)
    return lambda: PlainEngine(exported, device="cpu")


def test_the_runner_carries_state_and_gives_the_programs_answers(built, runner):
    """Three calls of two sizes, by position and by name; `reset` puts the state back."""
    engine, module = runner(), copy.deepcopy(built[1].module())
    first = None
    for rows in (2, 4, 3):
        image, more = inputs(rows)
        wanted = module(image, more)
        given = engine(image, more["scale"][0]) if rows != 3 else engine(more_scale_0=more["scale"][0], image=image)
        for name in ("logits", "probs"):
            torch.testing.assert_close(given[name], wanted[name])
        first = (image, more, wanted) if first is None else first
    assert engine.state["total"].abs().sum() > 0
    engine.reset()
    torch.testing.assert_close(engine(first[0], first[1]["scale"][0])["probs"], first[2]["probs"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((torch.randn(5, 8), torch.randn(5, 1)), r"\[5, 8\], but the engine was built for \[2, 8\] to \[4, 8\]"),
        ((torch.randn(2, 8).half(), torch.randn(2, 1)), "float16, expected torch.float32"),
        ((torch.randn(2, 8),), "takes image, more_scale_0; got 1"),
        (("image", torch.randn(2, 1)), "image is a str"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(runner, given, says):
    with pytest.raises(BatchError, match=says):
        runner()(*given)


def test_another_version_gpu_or_engine_is_refused(runner, exported, monkeypatch):
    """Each with what to do."""
    trt = sys.modules["tensorrt_rtx"]
    monkeypatch.setattr(trt, "gives", lambda: False)
    with pytest.raises(BuildError, match=r"not deserialise .*L4, compute capability 8\.9"):
        runner()
    monkeypatch.setattr(trt, "__version__", "1.4.0.76")
    with pytest.raises(MismatchError, match=r"here is 1\.4\.0\.76.*pip install tensorrt-rtx=="):
        runner()
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "T4")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    with pytest.raises(MismatchError, match=r"needs compute capability 8\.0 or later, and here is T4"):
        PlainEngine(exported, device="cpu")
    (exported / "io.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"io\.json is not what"):
        PlainEngine(exported, device="cpu")


def changed(folder, tmp_path, **build_facts):
    """A copy of an engine's folder of which the manifest says something else."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    manifest = load_json(copy / "manifest.json", "engine")
    own = {key: value for key, value in manifest.items() if key not in {"calibcast", "schema", "versions"}}
    save_json(copy / "manifest.json", "engine", {**own, **build_facts})
    return copy


def test_what_is_not_one_network_is_refused_with_the_nodes(built, tmp_path, capsys):
    """By the call, and by the command with exit code 1; nothing is written."""
    facts = {"ahead_of_time": True, "fallback_to_pytorch": {"nonzero": "no converter takes aten.nonzero"}}
    folder = changed(built[0], tmp_path, build=facts)
    with pytest.raises(BuildError, match=r"1 nodes run in PyTorch \(nonzero: no converter takes aten\.nonzero\)"):
        export_engine(folder, tmp_path / "out")
    with pytest.raises(SystemExit) as done:
        main(["export", str(folder), "--engine", str(tmp_path / "out")])
    assert done.value.code == 1
    assert "nonzero" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_standard_flavour_has_a_configuration_for_triton(built, exported, tmp_path):
    """TensorRT proper: every tensor with type and sizes; with state there is none."""
    facts = {"tensorrt": "11.0.0", "gpu": "A100"}
    folder = changed(built[0], tmp_path, built_with=facts, build={"ahead_of_time": False})
    export_engine(folder, tmp_path / "model.plan")
    io = json.loads((tmp_path / "io.json").read_text())
    assert (io["library"], io["gpu"], io["least_compute_capability"]) == ("tensorrt", "A100", None)
    assert io["engine"] == "model.plan"
    assert triton_config(io) is None
    text = triton_config({**io, "state": []})
    assert 'platform: "tensorrt_plan"' in text
    assert 'name: "more_scale_0"\n    data_type: TYPE_FP32\n    dims: [ -1, 1 ]' in text
    assert text.count("    name:") == 4


def test_the_runner_imports_torch_and_nothing_that_builds(exported):
    """In a fresh process: neither Torch-TensorRT nor calibcast's builders, nor packages that a server may lack."""
    script = (
        "import sys, calibcast.engines.runtime as r; "
        f"r.read_io({str(exported)!r}); "
        "print(sorted({'torch_tensorrt', 'polars', 'safetensors', 'datasets', 'pydantic', 'calibcast.engines.engine'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_engine_of_another_backend_does_not_leave(tmp_path):
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    build(program, backend="eager").save(tmp_path / "engine")
    assert Engine.load(tmp_path / "engine").backend == "eager"
    with pytest.raises(BuildError, match="built by the backend eager"):
        export_engine(tmp_path / "engine", tmp_path / "out")


MODEL_FILE = """
import torch

def model():
    torch.manual_seed(0)
    rows = {0: torch.export.Dim("batch", min=1, max=16)}
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    return module.eval(), (torch.randn(3, 8),), {}, ({0: torch.export.Dim("batch", min=1, max=16)},)

def batches():
    return [torch.randn(rows, 8) for rows in (2, 5, 5, 7)]
"""


def test_a_model_and_its_plan_leave_as_an_engine_in_one_command(tmp_path):
    """Built here, for the sizes that calibration saw, and taken out: no engine's folder is left behind."""
    (tmp_path / "functions.py").write_text(MODEL_FILE)
    model, data = f"{tmp_path}/functions.py:model", f"{tmp_path}/functions.py:batches"
    ranges, plan, out = str(tmp_path / "ranges.parquet"), str(tmp_path / "plan.json"), tmp_path / "out"
    assert _run(["calibrate", model, "--data", data, "-o", ranges, "--rounding-batches", "0"]) == 0
    assert _run(["plan", model, ranges, "-o", plan]) == 0
    assert _run(["export", model, "--plan", plan, "--ranges", ranges, "--engine", str(out)]) == 0
    io = json.loads((out / "io.json").read_text())
    assert (out / "model.engine").stat().st_size > 0
    assert [value["name"] for value in io["inputs"]] == ["input"]
    assert [io["inputs"][0][key] for key in ("min", "opt", "max")] == [[2, 8], [5, 8], [7, 8]]
    assert _run(["export", model, "--ranges", ranges, "--onnx", str(tmp_path / "model.onnx")]) == 2
