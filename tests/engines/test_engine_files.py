"""A compiled program as files: parts and their wiring, read back into something that computes the same."""

import io
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from operator import getitem
from pathlib import Path

import pytest
import torch
from calibcast.calib import ArtifactError, BatchError, BuildError
from calibcast.calib.artifacts import save_json, save_program
from calibcast.engines import Engine, build
from calibcast.engines.tensorrt import backend as tensorrt
from calibcast.engines.tensorrt import engine_files
from calibcast.engines.tensorrt.builder import compiling
from calibcast.engines.tensorrt.builder import torch_tensorrt_internals as internals
from calibcast.engines.tensorrt.engine_files import Made, WiringError, engine_paths, read_parts, write_parts
from calibcast.engines.tensorrt.program_device import copied
from torch import fx, nn


class Pair(nn.Module):
    def forward(self, x):
        return x + 1, x * 2


class Serialised(nn.Module):
    """Like a TensorRT module of Torch-TensorRT, as far as files are concerned."""

    serialized_engine = b"engine bytes"
    input_binding_names, output_binding_names = ["x"], ["a", "b"]
    requires_output_allocator = False
    aliased_io = None


def compiled(engine=None):
    """x -> engine gives (a, b) -> a PyTorch part takes a and b -> outputs (part, b)."""
    root = nn.Module()
    root.add_module("_run_on_acc_0", engine or Serialised())
    part = fx.symbolic_trace(lambda a, b: torch.sin(a) - b)
    for node in part.graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = torch.empty(2, 3)
    root.add_module("_run_on_gpu_1", part)
    graph = fx.Graph()
    x = graph.placeholder("x")
    both = graph.call_module("_run_on_acc_0", (x,))
    a, b = (graph.call_function(getitem, (both, index)) for index in range(2))
    graph.output((graph.call_module("_run_on_gpu_1", (a, b)), b))
    return fx.GraphModule(root, graph)


def test_parts_are_read_back_and_wired_as_they_were(tmp_path, monkeypatch):
    write_parts(compiled(), tmp_path)
    assert (tmp_path / "_run_on_acc_0.engine").read_bytes() == b"engine bytes"
    assert engine_paths(tmp_path) == [("_run_on_acc_0", tmp_path / "_run_on_acc_0.engine")]
    real = engine_files._loaded
    monkeypatch.setattr(
        engine_files,
        "_loaded",
        lambda name, part, *more: Pair() if part["kind"] == "engine" else real(name, part, *more),
    )
    module = read_parts(tmp_path, torch.device("cpu"))
    x = torch.randn(2, 3)
    ours, theirs = module(x), (torch.sin(x + 1) - x * 2, x * 2)
    torch.testing.assert_close(ours, theirs)


def test_a_missing_engine_file_is_told(tmp_path):
    write_parts(compiled(), tmp_path)
    (tmp_path / "_run_on_acc_0.engine").unlink()
    with pytest.raises(ArtifactError, match="is missing: the engine was not saved whole"):
        read_parts(tmp_path, torch.device("cpu"))


def test_what_has_no_such_files_is_said_so(tmp_path):
    graph = fx.Graph()
    graph.output(graph.call_function(torch.sin, (graph.placeholder("x"),)))
    with pytest.raises(WiringError, match="stands between the engines"):
        write_parts(fx.GraphModule(nn.Module(), graph), tmp_path)


def test_an_engine_that_torch_tensorrt_saves_itself_is_set_up_first(tmp_path, monkeypatch):
    """Builders set no engine up, and Torch-TensorRT writes only those that are."""

    class Engine(Serialised):
        def setup_engine(self):
            self.engine = self.engine or "ready"

    engine, saved = Engine(), []
    internals._set_up_nothing(engine)
    assert engine.engine.are_output_tensors_unowned() is False
    graph = fx.Graph()
    graph.output(graph.call_function(torch.sin, (graph.placeholder("x"),)))
    whole = fx.GraphModule(nn.Module(), graph)
    whole.add_module("engine", engine)
    monkeypatch.setattr(compiling.adapter, "save_module", lambda module, path: saved.append((engine.engine, path)))
    compiling._write(whole, tmp_path, False, Made({}, {}))
    assert saved == [("ready", str(tmp_path / compiling.WHOLE))]


def test_an_output_that_an_engine_does_not_give_is_refused(tmp_path):
    class Single(Serialised):
        output_binding_names = ("a",)

    class Updating(Serialised):
        aliased_io = {"b": ("x", "kv_cache_update")}  # noqa: RUF012

    for engine in (Single(), Updating()):
        with pytest.raises(BuildError, match="takes output 1 of _run_on_acc_0, which gives 1: a"):
            write_parts(compiled(engine), tmp_path)
    write_parts(compiled(Single()), tmp_path, Made({"_run_on_acc_0": [0, 0]}))
    steps = json.loads((tmp_path / "wiring.json").read_text())["steps"]
    assert not [step for step in steps if "item" in step]
    assert steps[-1]["outputs"][1] == {"value": "_run_on_acc_0"}


def test_programs_are_saved_from_several_threads_at_once(tmp_path):
    """torch.export.save alone refuses: "Refusing to stomp on existing FakeTensor reducer"."""
    program = torch.export.export(nn.Sequential(*(nn.Linear(4, 4) for _ in range(20))), (torch.randn(2, 4),))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: save_program(copied(program), tmp_path / f"{i}.pt2"), range(12)))
    assert len(list(tmp_path.glob("*.pt2"))) == 12


def test_a_call_checks_new_sizes_and_remembers_those_it_knows(tmp_path, monkeypatch):
    """On a GPU, where the tensors are; here the memory of sizes is let to take host tensors, too."""
    program = torch.export.export(Pair(), (torch.randn(2, 3),))
    write_parts(compiled(), tmp_path)
    monkeypatch.setattr(tensorrt.adapter, "missing", lambda: None)
    monkeypatch.setattr(tensorrt, "_loaded", lambda folder, device: Pair())
    monkeypatch.setattr(tensorrt, "_sizes", lambda values: tuple((v.shape, v.dtype) for v in values))
    runtime = tensorrt.TensorrtRuntime(tmp_path, program, [((2, 3), (2, 3), (2, 3))])
    runtime.device = torch.device("cpu")
    x = torch.randn(2, 3)
    for _ in range(3):
        torch.testing.assert_close(runtime(x), (x + 1, x * 2))
    torch.testing.assert_close(runtime(x=x), (x + 1, x * 2))
    for wrong in (torch.randn(4, 3), torch.randn(2, 3).double()):
        with pytest.raises(BatchError, match="argument x"):
            runtime(wrong)


def test_an_engine_that_is_saved_over_is_never_half_there(tmp_path, monkeypatch):
    """Cut off at any step of replacing it, the engine of before is still whole, in its place or beside it."""
    program = torch.export.export(torch.nn.Linear(4, 2).eval(), (torch.ones(1, 4),))
    build(program, backend="eager").save(tmp_path / "engine")
    renamed = Path.rename

    def cut_off(self, target):
        renamed(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", cut_off)
    with pytest.raises(KeyboardInterrupt):
        build(program, backend="eager").save(tmp_path / "engine")
    monkeypatch.undo()
    (left,) = [folder for folder in tmp_path.iterdir() if (folder / "manifest.json").is_file()]
    assert Engine.load(left)(torch.ones(1, 4)).shape == (1, 2)


@pytest.mark.parametrize("name", ["../outside/x", "/outside/x", "a/b", "..", "a\\b"])
@pytest.mark.parametrize("kind", ["torch", "engine"])
def test_wiring_names_only_files_of_its_folder(tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr("calibcast.engines.tensorrt.engine_files.load_program", lambda path: pytest.fail(str(path)))
    save_json(tmp_path / "wiring.json", "wiring", {"steps": [], "parts": {name: {"kind": kind}}})
    with pytest.raises(ArtifactError, match="only plain names inside its folder"):
        read_parts(tmp_path, torch.device("cpu"))
    if kind == "engine":
        with pytest.raises(ArtifactError, match="only plain names inside its folder"):
            engine_paths(tmp_path)


def test_an_engine_with_pickled_objects_is_allowed_by_name_only(tmp_path, monkeypatch):
    stream = io.BytesIO()
    torch.save((Evil(),), stream)
    save_program(torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),)), tmp_path / "engine.pt2")
    tensorrt.check_whole(tmp_path)
    with zipfile.ZipFile(tmp_path / "engine.pt2", "a") as archive:
        archive.writestr("archive/data/constants/custom_obj_0", stream.getvalue())
    with pytest.raises(ArtifactError, match=r"could run code.*CALIBCAST_ALLOW=torch_tensorrt\.runtime"):
        tensorrt.check_whole(tmp_path)
    monkeypatch.setenv("CALIBCAST_ALLOW", "torch_tensorrt.runtime.TorchTensorRTModule")
    tensorrt.check_whole(tmp_path)


class Evil:
    def __reduce__(self):
        return print, ("it ran",)
