"""What goes wrong in a builder is an error here, with nodes and a remedy; TensorRT-RTX's real crash included."""

import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from calibcast.calib import BuildError
from calibcast.engines import build
from calibcast.engines.tensorrt.builder import isolation as builder_isolation
from calibcast.engines.tensorrt.builder import torch_tensorrt_adapter as adapter
from calibcast.engines.tensorrt.builder.isolation import BUILDING, CONVERTING, BuilderError, build_isolated, failure_of
from calibcast.engines.tensorrt.builder.job import BuilderJob, custom_modules, decoded, encoded
from calibcast.engines.tensorrt.remedies import advice, region_of, remedies, settings_for
from calibcast.passes import classify, insert_casts
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from benchmarks.rtx_builder import has_builder
from tests.unmeasured import calibrate


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        heads = [layer(x).view(2, 16, 4, 16).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        return x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, 16, 64))


@pytest.fixture(scope="module")
def planned():
    """Attention in fp32 between fp16 linears: what TensorRT-RTX 1.6 crashes on."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 64)
    program = torch.export.export(Attention().eval(), (x,))
    ranges = calibrate(program, [x], progress=False)
    plan = classify(program, ranges, nodes_to_exclude=["^scaled_dot"])
    return insert_casts(program, plan), plan, ranges


needs_builder = pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")


def ahead(mixed, plan=None, **arguments):
    return build(mixed, plan, backend="tensorrt", ahead_of_time=True, cache=False, progress=False, **arguments)


@needs_builder
def test_a_crash_of_the_builder_names_the_node_and_the_remedy(planned):
    mixed, plan, _ = planned
    with pytest.raises(
        BuildError, match=r"crashed with SIGSEGV at node scaled_dot_product_attention.*decompose_attention=True"
    ):
        ahead(mixed, plan, decompose_attention=False)


@needs_builder
def test_fallback_applies_the_remedy_and_says_so(planned, tmp_path):
    mixed, plan, _ = planned
    engine = ahead(mixed, plan, decompose_attention=False, on_failure="fallback")
    (remedy,) = engine.record["remedies"]
    assert "decompose attention" in remedy
    assert "SIGSEGV" in remedy
    assert engine.record["applied_settings"]["decompose_attention"] is True
    engine.save(tmp_path / "engine")
    assert "decompose attention" in (tmp_path / "engine" / "manifest.json").read_text()


@needs_builder
def test_a_plan_that_keeps_attention_high_has_it_decomposed(planned):
    mixed, plan, _ = planned
    engine = ahead(mixed, plan)
    assert "scaled_dot_product_attention stays in fp32" in engine.record["set_by_plan"]
    assert engine.record["remedies"] == []


def test_settings_that_a_plan_asks_for(planned):
    """A node forced low although it may overflow inside gets fp32 accumulation."""
    mixed, plan, _ = planned
    assert settings_for(None, mixed, True) == ({}, "")
    assert settings_for(plan, mixed, True)[0] == {"decompose_attention": True}
    assert settings_for(plan, mixed, False)[0] == {}
    program = torch.export.export(Attention().eval(), (torch.randn(2, 16, 64),))
    loud = calibrate(program, [torch.randn(2, 16, 64) * 3000], progress=False)
    forced = classify(program, loud, data_max=float("inf"), nodes_to_include=["^scaled_dot"])
    assert any(v.rule == "interior" for v in forced["scaled_dot_product_attention"].verdicts)
    found, why = settings_for(forced, program, False)
    assert found == {"use_fp32_acc": True, "decompose_attention": True}
    assert "scaled_dot_product_attention may overflow inside" in why


class Masked(nn.Module):
    """Attention with whichever mask."""

    def __init__(self, is_causal=False):
        super().__init__()
        self.is_causal = is_causal

    def forward(self, x, mask=None):
        return F.scaled_dot_product_attention(x, x, x, mask, is_causal=self.is_causal)


@pytest.mark.parametrize(
    ("mask", "is_causal", "wrong"),
    [(None, False, False), (None, True, False), (torch.ones(8, 8, dtype=torch.bool), False, True),
     (torch.zeros(8, 8), False, True)],
)  # fmt: skip
def test_masked_attention_in_fp32_is_decomposed_as_rtx_fuses_it_wrongly(mask, is_causal, wrong):
    x = torch.randn(1, 2, 8, 16)
    inputs = (x,) if mask is None else (x, mask)
    program = torch.export.export(Masked(is_causal), inputs)
    settings, why = settings_for(None, program, True)
    assert settings == ({"decompose_attention": True} if wrong else {})
    assert ("scaled_dot_product_attention is masked and in fp32" in why) is wrong
    assert settings_for(None, program, False) == ({}, "")
    plan = classify(program, None)
    assert settings_for(plan, insert_casts(program, plan), True) == ({}, ""), "in fp16 it is right"


def fake_builder(monkeypatch, tmp_path, body):
    """Let `body` be what a builder process runs."""
    folder = tmp_path / "fake" / "calibcast" / "engines" / "tensorrt" / "builder"
    folder.mkdir(parents=True)
    for package in (folder, *list(folder.parents)[:3]):
        (package / "__init__.py").write_text("")
    (folder / "process.py").write_text(
        "import json, os, signal, sys, time\n"
        "def event(**content): print(json.dumps(content), flush=True)\n" + textwrap.dedent(body)
    )
    monkeypatch.setattr(builder_isolation, "_ROOT", tmp_path / "fake")
    monkeypatch.chdir(tmp_path)


def failure(mixed, tmp_path, timeout=60.0):
    with pytest.raises(BuilderError) as caught:
        build_isolated(BuilderJob((), {}), mixed, tmp_path / "out", timeout, progress=False)
    return caught.value


LAYERS = '[{"name": "[CONV]-[linear_2]", "node": "linear_2"}]'


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crash", "crashed with SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGABRT)", "crash", "crashed with SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "memory", "memory ran out"),
        ("sys.exit('libnvinfer.so: not found')", "crash", "status 1; it last said: libnvinfer.so: not found"),
        ("event(stage='build', engine=0); time.sleep(60)", "hang", "did not end within 2 s"),
    ],
)
def test_however_a_builder_ends_the_caller_lives(planned, tmp_path, monkeypatch, body, kind, message):
    fake_builder(monkeypatch, tmp_path, body)
    found = failure(planned[0], tmp_path, timeout=2.0 if kind == "hang" else 60.0)
    assert found.kind == kind
    assert message in str(found)


@pytest.mark.parametrize(("ahead_of_time", "gpu", "imports"), [(False, True, 1), (True, True, 0), (False, False, 0)])
def test_the_asking_process_imports_torch_tensorrt_while_the_builder_works(
    planned, tmp_path, monkeypatch, ahead_of_time, gpu, imports
):
    """It takes as long as the build of a small engine; only a process in which the engine runs needs it."""
    asked, seen = tmp_path / "asked", []
    monkeypatch.setattr(adapter, "absent", lambda: None if gpu else "no GPU")
    monkeypatch.setattr(adapter, "load_package", lambda: seen.append(wait_for(asked)))
    told = "sys.stdin.readline(); sys.stdin.readline()"  # to get ready, and of the job
    fake_builder(monkeypatch, tmp_path, f"{told}; open({str(asked)!r}, 'w').close(); os._exit(3)")
    job = BuilderJob(profiles=(), settings={}, device="cuda", ahead_of_time=ahead_of_time)
    with pytest.raises(BuilderError):
        build_isolated(job, planned[0], tmp_path / "out", 60.0, progress=False)
    assert seen == [True] * imports


def wait_for(path):
    """Whether a file is there before a minute has passed."""
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.exists()


def test_progress_tells_phase_and_node():
    class Bar:
        description = postfix = ""

        def set_description_str(self, text, refresh):
            self.description = text

        def set_postfix_str(self, text, refresh):
            self.postfix = text

        def update(self):
            pass

    heard = builder_isolation._Progress(Bar())
    for event in (
        {"stage": "convert", "engine": 0, "node": "conv2d_3", "op": "aten.convolution.default"},
        {"stage": "build", "engine": 0, "layers": [{"name": "[CONV]", "node": "conv2d_3"}]},
        {"stage": "phase", "engine": 0, "phase": "Timing tactics", "parent": None, "steps": 12},
        {"stage": "step", "phase": "Timing tactics", "step": 5},
        {"stage": "step", "phase": "never announced", "step": 1},
    ):
        heard.hear(event)
        if event["stage"] == "convert":
            assert heard.bar.description == "convert conv2d_3"
    assert (heard.bar.description, heard.bar.postfix) == ("Timing tactics", "5/12")
    assert (heard.stage, heard.node) == (BUILDING, "conv2d_3")
    assert heard.layers == [{"name": "[CONV]", "node": "conv2d_3"}]


def test_what_a_hung_builder_started_ends_with_it(planned, tmp_path, monkeypatch):
    fake_builder(
        monkeypatch, tmp_path,
        "import subprocess; child = subprocess.Popen(['sleep', '60']); open('pid', 'w').write(str(child.pid))\n"
        "time.sleep(60)",
    )  # fmt: skip
    failure(planned[0], tmp_path, timeout=3.0)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 120  # nobody waits for it, so it may be seen for a moment after it was killed
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(pid)


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_nodes_are_read_from_the_layers_that_the_builder_names(planned, tmp_path, monkeypatch):
    body = (
        f"event(stage='build', engine=0, layers={LAYERS})\n"
        "print('[E] Error Code 10: no implementation for node [CONV]-[linear_2]', file=sys.stderr); os.abort()"
    )
    fake_builder(monkeypatch, tmp_path, body)
    mixed = planned[0]
    found = failure(mixed, tmp_path)
    assert region_of(found, mixed, {}) == ("linear_2",)
    # First what was named, then all of its kind: a builder that has no way for one has none for the others.
    every = tuple(node.name for node in mixed.graph.nodes if node.name.startswith("linear") and "_as_" not in node.name)
    assert [r.widen for r in remedies(found, mixed, {})] == [("linear_2",), every]
    assert "at node linear_2 (linear, value). Remedy: keep linear_2 in fp32" in advice(found, mixed, {})


@pytest.mark.parametrize(
    ("kind", "message", "found", "words"),
    [
        ("RuntimeError", "CUDA out of memory. Tried to allocate 2 GiB", "memory", "smaller sizes"),
        ("MemoryError", "std::bad_alloc", "memory", "workspace_size"),
        ("UnsupportedOperatorException", "Conversion of function aten.foo not currently supported!", "unsupported",
         "torch_executed_ops"),
        ("RuntimeError", "Unable to create TensorRT execution context", "context", "decompose_attention=True"),
        ("AssertionError", "", "refused", "decompose_attention=True"),
    ],
)  # fmt: skip
def test_each_kind_of_failure_has_its_advice(planned, kind, message, found, words):
    caught = failure_of(kind, message, stage=BUILDING)
    assert caught.kind == found
    assert words in advice(caught, planned[0], {})


@pytest.mark.parametrize(
    ("kind", "message"),
    [("TypeError", "a bytes-like object is required, not 'NoneType'"), ("AssertionError", ""),
     ("AssertionError", "AssertionError()"),
     ("RuntimeError", "TensorRT build_serialized_network returned None; engine build failed.")],
)  # fmt: skip
def test_what_tensorrt_said_is_told_where_torch_tensorrt_only_stumbles(planned, kind, message):
    """As TensorRT-RTX 1.4 said it of a linear layer over 96 rows. The attention is decomposed, and not to blame."""
    log = (
        "WARNING:torch_tensorrt:In JIT build, strongly typed is enabled by default.\n"
        "Internal Error: MyelinCheckException: operand.cpp:156: CHECK(logical_mem_size == data_->size()) failed.\n"
        "ERROR:torch_tensorrt [TensorRT Conversion Context]:IBuilder::buildSerializedNetwork: Error Code 1: Myelin "
        "(logical memory size (768) should be equal to non-opaque payload size (73728))\n"
    )
    caught = failure_of(kind, message, stage=BUILDING, log=log)
    text = advice(caught, planned[0], {"decompose_attention": True})
    assert text.startswith("TensorRT gave no engine: Error Code 1: Myelin (logical memory size (768) should be equal")
    assert "while building the engine. Remedy: keep operators out" in text
    assert failure_of(kind, message, stage=BUILDING).message.startswith(f"{kind}: {message}")
    assert failure_of("ValueError", "bad", log=log).message == "ValueError: bad"


def test_a_node_that_cannot_be_converted_is_named(planned):
    caught = failure_of("ValueError", "bad shape", stage=CONVERTING, node="linear_3")
    assert "ValueError: bad shape at node linear_3 (linear, out)" in advice(caught, planned[0], {})


def test_unknown_ways_of_failing_are_refused(planned):
    with pytest.raises(BuildError, match=r"on_failure='retry': known are 'error' and 'fallback'"):
        ahead(planned[0], on_failure="retry")


def test_settings_survive_the_way_to_the_builder_and_back():
    values = {
        "a": 1.5, "b": None, "c": {torch.ops.aten.relu.default, "aten.add.Tensor"}, "d": [torch.float16, (1, 2)],
        "e": torch.device("cuda:1"), "f": frozenset({"x"}),
    }  # fmt: skip
    for name, value in values.items():
        assert decoded(encoded(name, value)) == value
        assert type(decoded(encoded(name, value))) is type(value)
    with pytest.raises(BuildError, match=r"the setting engine=.*cannot be told"):
        encoded("engine", object())


def test_a_builder_imports_the_modules_of_custom_operators(tmp_path, monkeypatch):
    (tmp_path / "my_operators.py").write_text(
        "import torch\n"
        "@torch.library.custom_op('builder_test::double', mutates_args=())\n"
        "def double(x: torch.Tensor) -> torch.Tensor:\n    return x * 2\n"
        "@double.register_fake\ndef _(x):\n    return torch.empty_like(x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_operators  # noqa: F401

    class Doubled(nn.Module):
        def forward(self, x):
            return torch.ops.builder_test.double(x) + 1

    program = torch.export.export(Doubled(), (torch.randn(2),))
    assert custom_modules(program) == ("my_operators",)
    assert str(tmp_path) in sys.path
    if has_builder():
        engine = ahead(program)
        assert set(engine.record["fallback_to_pytorch"]) == {"double"}


def test_a_warning_of_a_tactic_left_out_is_no_want_of_memory():
    """TensorRT leaves a tactic out and goes on; only where it had to leave out all of them is memory the reason."""
    skipped = "[W] [TRT] Skipping tactic 0x3 due to insufficient memory: Cuda failure: out of memory"
    others = ["WARNING: [Torch-TensorRT] - out of memory in tactic 7", "[TensorRT] INFO: OutOfMemory avoided"]
    for warning in (skipped, *others):
        log = f"{warning}\n[E] Internal Error: Could not infer output types for operation: deconv"
        assert failure_of("RuntimeError", "no types of node deconv", log=log).kind == "refused"
    assert failure_of("RuntimeError", "Cuda failure: out of memory", log=skipped).kind == "memory"
    assert failure_of("RuntimeError", "failed", log="[E] Error Code 2: OutOfMemory (cudaMalloc)").kind == "memory"
    none_left = f"{skipped}\n[E] Error Code 10: Could not find any implementation for node conv"
    assert failure_of("AssertionError", "", log=none_left).kind == "memory"
