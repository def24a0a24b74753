"""The backend `inductor`: who gets it, what it refuses, and, slowly, a package that it really compiles."""

from __future__ import annotations

import zipfile

import pytest
import torch
from calibcast import Engine, build, calibrate, classify, insert_casts, tune, verify
from calibcast.calib.artifacts import save_json
from calibcast.calib.errors import ArtifactError, BuildError, MismatchError
from calibcast.calib.tensor_files import load_tensors, save_tensors
from calibcast.engines import backends, handover
from calibcast.engines.inductor import backend as inductor
from calibcast.engines.inductor.backend import InductorRuntime, check_same_machine
from calibcast.engines.inductor.compiling import FACTS, FACTS_KIND, PACKAGE, STATE, kernel_types
from calibcast.engines.runtimes import BuildRequest
from calibcast.engines.tensorrt.builder.isolation import RUNNING, BuilderError
from calibcast.engines.tensorrt.builder.job import INDUCTOR, BuilderJob, BuilderResult
from calibcast.engines.tensorrt.trial_run import GRACE_DB, MOST_ASKED_DB, Judgement
from torch import nn
from torch.export import Dim
from transformers.modeling_outputs import BaseModelOutput


class Counting(nn.Module):
    """Keeps a sum over its calls, and gives it as it is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 4)
        self.register_buffer("total", torch.zeros(4))

    def forward(self, image, more):
        hidden = torch.relu(self.linear(image)) * more["scale"][0]
        before = self.total.clone()
        self.total.add_(hidden.mean(0))
        return {"hidden": hidden, "total": before + hidden}


def inputs(rows):
    return torch.randn(rows, 8), {"scale": [torch.rand(rows, 1)]}


@pytest.fixture(scope="module")
def cast():
    rows = {0: Dim("batch", min=1, max=16)}
    shapes = {"image": rows, "more": {"scale": [rows]}}
    program = torch.export.export(Counting().eval(), inputs(3), dynamic_shapes=shapes)
    ranges = calibrate(program, [inputs(2), inputs(4)], progress=False)
    plan = classify(program, ranges)
    return program, insert_casts(program, plan), plan, ranges


class Builders:
    """Stands in for the builder process: the package crashes as it runs, with so many compilers."""

    def __init__(self, crashes, stage=RUNNING):
        self.crashes, self.stage, self.settings = crashes, stage, []

    def __call__(self, job, program, folder, timeout, progress):
        job.save(folder)  # as it goes to another process
        self.settings.append(dict(BuilderJob.load(folder).settings))
        if len(self.settings) <= self.crashes:
            raise BuilderError("crash", "the builder crashed with SIGSEGV", stage=self.stage)
        return BuilderResult(seconds=1.0)


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    """CXX names a compiler of its own; the path has another."""
    for place in ("own", "system"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "g++").write_text(f"#!/bin/sh\necho {place}\n")
        (tmp_path / place / "g++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "own" / "g++"))
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    return tmp_path / "system" / "g++"


def compiled_by(builders, monkeypatch, tmp_path, settings):
    monkeypatch.setattr(inductor, "build_isolated", builders)
    request = BuildRequest(None, progress=False)
    return inductor._compiled(BuilderJob((), settings, device="cpu", compiler=INDUCTOR), request, tmp_path)


def test_a_package_that_crashes_is_compiled_by_another_compiler(compilers, monkeypatch, tmp_path, caplog):
    """CXX may link a C++ library of its own: what it compiles then crashes as it is loaded."""
    builders = Builders(crashes=1)
    assert compiled_by(builders, monkeypatch, tmp_path, {"max_autotune": True}).seconds == 1.0
    first, second = builders.settings
    assert first == {"max_autotune": True}
    assert (second.pop(inductor.COMPILER)[1], second) == (str(compilers), first)
    assert (
        f"own/g++ compiled crashes (the builder crashed with SIGSEGV); compiled again with {compilers}" in caplog.text
    )


def test_where_no_compiler_helps_the_error_names_those_that_were_tried(compilers, monkeypatch, tmp_path):
    with pytest.raises(
        BuildError, match=rf"\(crash, running the engine\).*own/g\+\+ and {compilers.parent}/g\+\+ were tried"
    ):
        compiled_by(Builders(crashes=2), monkeypatch, tmp_path, {})


@pytest.mark.parametrize(("settings", "stage"), [({"cpp.cxx": [None, "g++"]}, RUNNING), ({}, "building the engine")])
def test_a_compiler_of_the_users_and_other_crashes_are_left_alone(compilers, monkeypatch, tmp_path, settings, stage):
    builders = Builders(1, stage)
    with pytest.raises(BuildError, match="compiled no engine"):
        compiled_by(builders, monkeypatch, tmp_path, settings)
    assert len(builders.settings) == 1


def test_the_only_compiler_is_not_tried_twice(compilers, monkeypatch):
    monkeypatch.setenv("CXX", str(compilers))
    assert inductor.other_compiler() is None


@pytest.mark.parametrize(
    "case",  # is there a GPU; what is wrong with TensorRT, the GPU for it, Inductor; which backend, and why
    [
        (True, None, None, None, "tensorrt", "a GPU and Torch-TensorRT are present"),
        (True, None, "H100 has compute capability 9.0", None, "inductor", "H100 has"),
        (True, "Torch-TensorRT is not installed", None, None, "inductor", "not installed"),
        (True, None, "H100 has compute capability 9.0", "no compiler", "eager", "9.0; no compiler"),
        (False, "torch sees no CUDA GPU", None, None, "eager", "no CUDA GPU"),
    ],
)
def test_auto_takes_what_supports_the_gpu_and_says_why(monkeypatch, case):
    gpu, tensorrt, outside, inductor, found, says = case
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(backends.BACKENDS["tensorrt"], "unavailable", lambda: tensorrt, raising=False)
    monkeypatch.setattr(backends.BACKENDS["inductor"], "unavailable", lambda: inductor, raising=False)
    monkeypatch.setattr(backends, "gpu_warning", lambda: outside)
    backend, why = backends.chosen("auto")
    assert backend.name == found
    assert says in why


def test_another_torch_gpu_or_host_is_refused():
    here = {"torch": "2.14.1", "gpu": "NVIDIA H100", "cpu": "x86_64 AVX512"}
    check_same_machine(here, here, "cuda")
    with pytest.raises(MismatchError, match=r"for torch 2\.11\.0, and here is 2\.14\.1.*Build it again here"):
        check_same_machine({**here, "torch": "2.11.0"}, here, "cuda")
    with pytest.raises(MismatchError, match="for gpu A100, and here is NVIDIA H100"):
        check_same_machine({**here, "gpu": "A100"}, here, "cuda")
    with pytest.raises(BuildError, match="compiled for a GPU, and torch sees none"):
        check_same_machine(here, {"torch": "2.14.1"}, "cuda")
    with pytest.raises(MismatchError, match="for cpu x86_64 AVX512, and here is x86_64 AVX2"):
        check_same_machine(here, {**here, "cpu": "x86_64 AVX2"}, "cpu")


def test_a_gpu_outside_of_support_imports_no_torch_tensorrt(monkeypatch):
    """Its import takes seconds, and loads libraries beside those of Inductor."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "gpu_warning", lambda: "H100 has compute capability 9.0")
    monkeypatch.setattr(backends.BACKENDS["inductor"], "unavailable", lambda: None, raising=False)
    monkeypatch.setattr(
        backends.BACKENDS["tensorrt"], "unavailable", lambda: pytest.fail("it was imported"), raising=False
    )
    assert backends.chosen("auto")[0].name == "inductor"


def test_settings_are_those_of_inductor(cast):
    with pytest.raises(BuildError, match=r"no setting 'max_autotunee'; near names: max_autotune"):
        build(cast[1], backend="inductor", max_autotunee=True)
    with pytest.raises(BuildError, match="without ahead_of_time"):
        build(cast[1], backend="inductor", ahead_of_time=True)


def test_types_are_read_from_the_generated_kernels(tmp_path):
    """As torch 2.14 writes them for a host."""
    source = """
    extern "C"  void  cpp_fused_relu_0(const half* in_ptr0, const int64_t* in_ptr1, half* out_ptr0, const int64_t ks0)
    {}
    extern "C" void cpp_fused_div_1(const half* in_ptr0,
                       float* out_ptr0) {}
    """
    with zipfile.ZipFile(tmp_path / PACKAGE, "w") as archive:
        archive.writestr("model/data/aotinductor/model/abc.kernel.cpp", source)
        archive.writestr("model/data/aotinductor/model/abc.wrapper.cpp", source.replace("relu", "wrapper"))
    found = kernel_types(tmp_path / PACKAGE)
    assert found == {"cpp_fused_relu_0": ["float16"], "cpp_fused_div_1": ["float16", "float32"]}


def test_state_moves_is_reset_and_is_saved(cast, tmp_path, monkeypatch):
    """The runtime keeps what the package, a pure function, takes and gives."""
    folder = tmp_path / "files"
    folder.mkdir()
    save_json(folder / FACTS, FACTS_KIND, {"held": ["b_total"], "updated": ["b_total"], "kernels": {}})
    save_tensors(folder / STATE, {"b_total": torch.zeros(4)})
    with pytest.raises(ArtifactError, match=r"model\.pt2 is missing"):
        InductorRuntime(folder, cast[1], torch.device("cpu"))
    (folder / PACKAGE).touch()

    def package(image, more, total):
        return {"hidden": image[:, :4] * more["scale"][0], "total": total}, [total + 1]

    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: package)
    runtime = InductorRuntime(folder, cast[1], torch.device("cpu"))
    first = runtime(*inputs(2))["total"]
    assert runtime(*inputs(3))["total"].tolist() == [1.0] * 4
    assert first.tolist() == [0.0] * 4  # what was given does not change with the next call
    runtime.save(tmp_path)
    assert load_tensors(tmp_path / "inductor" / "state_now.safetensors")["b_total"].tolist() == [2.0] * 4
    again = InductorRuntime(tmp_path / "inductor", cast[1], torch.device("cpu"))
    assert again(*inputs(2))["total"].tolist() == [2.0] * 4
    again.reset()
    assert again(*inputs(2))["total"].tolist() == [0.0] * 4


@pytest.mark.slow
def test_a_package_is_compiled_run_saved_and_loaded(cast, tmp_path):
    """In the builder's process: two sizes, state, the caller's structure; saved and loaded; verified."""
    program, mixed, plan, ranges = cast
    engine = build(mixed, plan, ranges, backend="inductor", progress=False)
    assert set(engine.ledger["match"]) == {"unknown"}
    on_gpu = engine.device.type == "cuda"
    types = engine.record["kernel_types"].values()
    assert not types if on_gpu else any("float16" in names for names in types)  # a GPU's kernels do not tell
    module = mixed.module()
    for rows in (2, 4):
        given, wanted = inputs(rows), None
        wanted = module(*given)
        answer = engine(*given)
        for name in wanted:
            torch.testing.assert_close(answer[name].cpu(), wanted[name], atol=2e-3, rtol=2e-3)
    engine.save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine")
    given = inputs(3)
    torch.testing.assert_close(loaded(*given)["total"], engine(*given)["total"])
    loaded.runtime.reset()
    assert verify(loaded, program, [inputs(2), inputs(5)], progress=False).require(min_sqnr_db=40).passed


class Given(nn.Module):
    """Takes a dict, and gives a class of a library, with state among what it gives."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x, more):
        self.calls.add_(1)
        return BaseModelOutput(last_hidden_state=self.linear(x) + more["y"], hidden_states=(x * 2, self.calls.clone()))


@pytest.mark.slow
@pytest.mark.parametrize("isolate", [True, False])
def test_outputs_come_in_the_classes_of_the_model(isolate, tmp_path):
    """The builder's process has not imported the library that they are of."""
    torch.manual_seed(0)
    x, more = torch.randn(2, 8), {"y": torch.randn(2, 8)}
    program = torch.export.export(Given().eval(), (x, more))
    engine = build(program, backend="inductor", isolate=isolate, cache=False, progress=False)
    expected = program.module()
    engine.save(tmp_path / "engine")
    for made in (engine, Engine.load(tmp_path / "engine")):
        found, wanted = made(x, more), expected(x, more)
        assert type(found) is BaseModelOutput
        torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state)
        torch.testing.assert_close(found.hidden_states[0], 2 * x)
    assert float(engine(x, more).hidden_states[1]) == 2.0
    assert float(made(x, more).hidden_states[1]) == 2.0, "each engine has a state of its own"


@pytest.fixture
def compiled(monkeypatch):
    """A compiler that takes no time: its package gives what the program gives, `wrong` times."""
    made = {"builds": 0, "wrong": 1.0}

    def compile_job(job, program, folder, event):
        made["builds"] += 1
        save_json(folder / FACTS, FACTS_KIND, {"held": [], "updated": [], "kernels": {}})
        (folder / PACKAGE).touch()
        module = program.module()
        monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: lambda x: module(x) * made["wrong"])
        return BuilderResult(seconds=1.0)

    monkeypatch.setattr(inductor, "compile_inductor", compile_job)
    return made


class Half(nn.Module):
    def forward(self, x):
        return torch.relu(x * 1.5)


@pytest.fixture(scope="module")
def proven():
    batches = [torch.randn(4, 8) for _ in range(3)]
    program = torch.export.export(Half().eval(), (batches[0],))
    ranges = calibrate(program, batches, progress=False)
    plan = tune(program, ranges, batches)
    return program, insert_casts(program, plan), plan, ranges, batches


def engine_of(proven, tmp_path, **more):
    program, mixed, plan, ranges, batches = proven
    made = {"backend": "inductor", "isolate": False, "cache": tmp_path / "cache", "device": "cpu"}
    return build(mixed, plan, ranges, reference=program, **{"batches": batches, **made, **more})


def test_an_engine_comes_from_the_cache_and_another_graph_does_not(proven, compiled, tmp_path):
    first, second = engine_of(proven, tmp_path), engine_of(proven, tmp_path)
    assert compiled["builds"] == 1
    assert (first.record["cache"]["hit"], second.record["cache"]["hit"]) == (False, True)
    assert second.record["trial"]["outputs"] == list(first.record["trial"]["outputs"])
    assert second.record["build_seconds"] == 1.0
    torch.testing.assert_close(second(proven[4][0]), first(proven[4][0]))
    engine_of(proven, tmp_path, max_autotune=True)
    assert compiled["builds"] == 2


def test_its_trial_asks_for_what_the_plan_was_proven_to_have(proven, compiled, tmp_path):
    """The engine of a proven plan is held to the proof; one that is wrong is refused, and not kept."""
    trial = engine_of(proven, tmp_path).record["trial"]
    seen = trial["outputs"][0]
    assert proven[2].proof.outputs[0] > MOST_ASKED_DB
    assert seen["asked_db"] == pytest.approx(min(proven[2].proof.outputs[0], seen["cast_db"]) - GRACE_DB, abs=0.01)
    compiled["wrong"] = 1.01
    with pytest.raises(BuildError, match="the engine that Inductor compiled is wrong"):
        engine_of(proven, tmp_path, max_autotune=True)
    compiled["wrong"] = 1.0
    assert not engine_of(proven, tmp_path, max_autotune=True).record["cache"]["hit"]


def test_an_engine_without_batches_is_tried_on_inputs_made_up(proven, compiled, tmp_path):
    """Nothing is handed over unjudged, and what fails is not kept in the cache."""
    assert engine_of(proven, tmp_path, batches=()).record["trial"]["made_up"]
    compiled["wrong"] = 1.01
    with pytest.raises(BuildError, match="the engine that Inductor compiled is wrong"):
        engine_of(proven, tmp_path, batches=(), max_autotune=True)


def test_an_engine_in_the_cache_is_judged_by_what_this_build_brings(proven, compiled, tmp_path):
    """The same data: what was measured stands. Other data or another reference: the engine is run again, and built
    again only where it fails."""
    first = engine_of(proven, tmp_path, batches=())
    again = engine_of(proven, tmp_path)
    assert again.record["cache"]["hit"]
    assert (first.record["trial"]["made_up"], again.record["trial"]["made_up"]) == (True, False)
    assert again.record["trial"]["basis"] != first.record["trial"]["basis"]
    compiled["wrong"] = 1.01  # an engine that gives something else now shows whether it was run
    assert engine_of(proven, tmp_path).record["trial"] == again.record["trial"]
    with pytest.raises(BuildError, match="the engine that Inductor compiled is wrong"):
        engine_of(proven, tmp_path, batches=proven[4][1:])
    assert compiled["builds"] == 2
    compiled["wrong"] = 1.0
    assert engine_of(proven, tmp_path, batches=proven[4][1:]).record["cache"]["hit"]
    assert compiled["builds"] == 2


def test_what_could_not_be_tried_is_tried_the_next_time(proven, compiled, tmp_path, monkeypatch):
    """Memory may be there then."""
    with monkeypatch.context() as short:
        short.setattr(handover, "judged", lambda *_: Judgement(why_not="memory ran out"))
        assert engine_of(proven, tmp_path).record["trial"]["why_not"] == "memory ran out"
    again = engine_of(proven, tmp_path).record
    assert (again["cache"]["hit"], again["trial"]["why_not"], again["trial"]["batches"]) == (True, None, 2)
