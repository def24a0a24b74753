"""A builder that fails and names nothing: the operators that it fails at are found by building again."""

import json
from dataclasses import replace

import pytest
import torch
from calibcast.calib import BuildError
from calibcast.calib import calibrate as measure
from calibcast.calib.batches import signature_of
from calibcast.engines import build, handover
from calibcast.engines.runtimes import BuildRequest
from calibcast.engines.tensorrt import attempts as build_attempts
from calibcast.engines.tensorrt import backend as tensorrt
from calibcast.engines.tensorrt import trial_run
from calibcast.engines.tensorrt.builder.isolation import (
    BUILDING,
    CONVERTING,
    RUNNING,
    BuilderError,
    build_isolated,
    failure_of,
)
from calibcast.engines.tensorrt.profiles import profiles
from calibcast.engines.tensorrt.region_search import smallest_region
from calibcast.engines.tensorrt.remedy_search import MOST_BUILDS, can_search, operator_groups, smallest_choice
from calibcast.engines.tensorrt.trial_run import Judgement, judged, trial_inputs, trial_problem
from calibcast.engines.tensorrt.widening import widened
from calibcast.passes import classify, insert_casts, tune
from calibcast.passes.proof import Proof
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from benchmarks.rtx_builder import has_builder
from tests.unmeasured import calibrate


class Gated(nn.Module):
    """Convolutions, two of them grouped, gates, pools and halves of a tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.depth = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(2))

    def forward(self, x):
        x = torch.relu(self.first(x))
        for depth in self.depth:
            y = depth(x)
            x = y * torch.sigmoid(y.mean((2, 3), keepdim=True))
        first, second = x.chunk(2, 1)
        return self.last(first * second)


@pytest.fixture(scope="module")
def planned():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    program = torch.export.export(Gated().eval(), (x,))
    ranges = calibrate(program, [x], progress=False)
    plan = classify(program, ranges, low_precision_type=torch.bfloat16)
    return insert_casts(program, plan), plan


def computed_in(program, name):
    """The type in which a node computes: that of its first floating-point argument."""
    node = next(node for node in program.graph.nodes if node.name == name)
    return node.args[0].meta["val"].dtype


def failing_at(monkeypatch, *names):
    """Let the builder fail at an execution context as long as one of `names` is in bf16. How often it was asked."""
    asked = []

    def attempt(job, program, folder, timeout, progress=True, *rest):
        asked.append([name for name in names if computed_in(program, name) == torch.bfloat16])
        (folder / "left over").write_text("of a build that failed")
        if asked[-1]:
            raise BuilderError("context", "Unable to create an execution context", BUILDING)
        (folder / "left over").unlink()
        return build_isolated(job, program, folder, timeout, progress)

    monkeypatch.setattr(build_attempts, "build_isolated", attempt)
    return asked


class Said:
    """A trial that says what a function says. No engine can run here."""

    possible, basis, last = False, "", None

    def __init__(self, said):
        self._said, self.judgement = said, Judgement()

    def prepare(self, program):
        pass

    def __call__(self, folder, program):
        return self._said(folder, program)


def wrong_until_sigmoids_are_wide(monkeypatch):
    """Let every trial find NaN as long as the sigmoids are in bf16. What it saw them in."""
    tried = []

    def trial(folder, program):
        tried.append(computed_in(program, "sigmoid"))
        return None if tried[-1] == torch.float32 else "the engine gives NaN"

    monkeypatch.setattr(tensorrt, "_trial", lambda request, shapes: Said(trial))
    return tried


def ahead(planned, **arguments):
    mixed, plan = planned
    arguments = {"cache": False, **arguments}
    return build(mixed, plan, backend="tensorrt", ahead_of_time=True, progress=False, **arguments)


def test_operators_are_told_apart_and_grouped_convolutions_from_others(planned):
    groups = operator_groups(planned[0])
    assert ("conv2d", "conv2d_3") in groups
    assert ("conv2d_1", "conv2d_2") in groups
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names))
    assert [len(group) for group in groups] == sorted(len(group) for group in groups), "the rarest first"
    assert ("chunk",) in groups, "what gives several tensors, too"


@pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")
@pytest.mark.parametrize("culprits", [("conv2d_1", "conv2d_2"), ("sigmoid", "conv2d_3")])
def test_the_operators_are_found_and_kept_in_fp32(planned, monkeypatch, tmp_path, culprits):
    asked = failing_at(monkeypatch, *culprits)
    engine = ahead(planned, on_failure="fallback")
    kept = set(engine.record["widened"])
    wanted = {name for group in operator_groups(planned[0]) if set(group) & set(culprits) for name in group}
    assert kept == wanted
    (remedy,) = engine.record["remedies"]
    assert f"keep {len(kept)} nodes like" in remedy
    assert "execution context" in remedy
    assert f"found in {len(asked) - 1} builds" in remedy
    assert len(asked) <= MOST_BUILDS + 1
    assert {row["node"] for row in engine.ledger.iter_rows(named=True) if row["planned"] == "high"} >= kept
    engine.save(tmp_path / "engine")
    assert not list((tmp_path / "engine").rglob("left over"))


@pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")
def test_an_engine_that_is_wrong_is_no_remedy(planned, monkeypatch):
    """The grouped convolutions in fp32 give an engine, but one that gives NaN until the sigmoids are in fp32, too."""
    failing_at(monkeypatch, "conv2d_1", "conv2d_2")
    tried = wrong_until_sigmoids_are_wide(monkeypatch)
    engine = ahead(planned, on_failure="fallback")
    assert set(engine.record["widened"]) == {"conv2d_1", "conv2d_2", "sigmoid", "sigmoid_1"}
    assert torch.bfloat16 in tried
    monkeypatch.setattr(tensorrt, "_trial", lambda request, shapes: Said(lambda *_: "the engine gives NaN"))
    with pytest.raises(BuildError, match="with all of those that can be: the engine gives NaN"):
        ahead(planned, on_failure="fallback")


@pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")
def test_an_engine_that_builds_and_is_wrong_is_remedied_where_that_is_allowed(planned, monkeypatch):
    """Nothing fails: it gives NaN, until what makes it so is in fp32. Without leave that is an error."""
    tried = wrong_until_sigmoids_are_wide(monkeypatch)
    engine = ahead(planned, on_failure="fallback")
    assert {"sigmoid", "sigmoid_1"} == set(engine.record["widened"])
    assert "as the engine gives NaN" in engine.record["remedies"][-1]
    assert engine.record["trial_problem"] is None
    tried.clear()
    with pytest.raises(
        BuildError,
        match=r"the engine gives NaN while running the engine, somewhere in the \d+ nodes from \w+ to \w+, in .*"
        r"Remedy: .*smallest part of the program",
    ):
        ahead(planned)
    assert len(tried) == 1


@pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")
def test_an_engine_that_stays_wrong_is_given_and_said_to_be(planned, monkeypatch, caplog, tmp_path):
    """A trial is of made-up inputs: what it finds is for `verify` to judge, and no reason to have no engine."""
    monkeypatch.setattr(build_attempts, "smallest_choice", lambda groups, helps: helps(groups[0]) or None)
    monkeypatch.setattr(tensorrt, "_trial", lambda request, shapes: Said(lambda *_: "the engine gives NaN"))
    engine = ahead(planned, on_failure="fallback")
    assert (engine.record["trial_problem"], engine.record["widened"]) == ("the engine gives NaN", [])
    assert "the engine gives NaN, and no remedy was found" in caplog.text
    assert "verify it" in caplog.text
    engine.save(tmp_path / "engine")
    arguments = {"on_failure": "fallback", "cache": tmp_path / "cache"}
    assert ahead(planned, **arguments).record["cache"]["hit"] is False
    caplog.clear()
    assert ahead(planned, **arguments).record["cache"]["hit"] is True
    assert "the engine gives NaN, and no remedy was found: verify it" in caplog.text, "a cached one, too"


def test_a_trial_tells_what_is_not_finite_and_what_does_not_run(planned):
    mixed, _ = planned
    shapes = profiles(signature_of(mixed), None)
    (x,) = flat = trial_inputs(mixed, shapes, None, torch.device("cpu"))
    assert x.shape == (2, 3, 16, 16)
    assert -1 <= float(x.min()) < -0.9
    assert 0.9 < float(x.max()) <= 1
    program = mixed.module()
    assert trial_problem(program, mixed, flat) is None
    wrong = "the engine gives NaN or Inf for 3 of 1536 values that its program gives"
    assert trial_problem(lambda x: broken(program(x)), mixed, flat) == wrong
    assert "does not run: ZeroDivisionError" in str(trial_problem(lambda x: 1 / 0, mixed, flat))


def test_where_the_program_does_not_run_no_engine_is_blamed(planned, caplog):
    assert trial_problem(lambda x: 1 / 0, planned[0], [torch.ones(2, 5, 16, 16)]) is None
    assert "was not tried out" in caplog.text


def broken(result):
    result.view(-1)[:3] = torch.nan
    return result


@pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")
def test_an_error_half_way_loses_no_engine(planned, monkeypatch):
    """The first engine is wrong, and what is built next is refused: the first is given, with its files."""
    builds = []

    def attempt(*arguments):
        builds.append(arguments)
        if len(builds) > 1:
            raise BuildError("require_full_compilation=True, and a node runs in PyTorch")
        return build_isolated(*arguments)

    monkeypatch.setattr(build_attempts, "build_isolated", attempt)
    monkeypatch.setattr(tensorrt, "_trial", lambda request, shapes: Said(lambda *_: "the engine gives NaN"))
    engine = ahead(planned, on_failure="fallback")
    assert len(builds) == 2
    assert engine.record["trial_problem"] == "the engine gives NaN"
    assert engine.ledger.height


class Attending(nn.Module):
    """Attention with a mask."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)

    def forward(self, x, mask):
        x = self.first(x)
        return torch.relu(nn.functional.scaled_dot_product_attention(x, x, x, mask))


@pytest.mark.parametrize("said", [{}, {"decompose_attention": False}])
def test_masked_attention_that_a_remedy_puts_in_fp32_is_decomposed(monkeypatch, said):
    """As it is where the plan keeps it there, and unless the user says otherwise. The folder stays private."""
    inputs = (torch.randn(2, 4, 8, 16), torch.ones(8, 8, dtype=torch.bool))
    program = torch.export.export(Attending().eval(), inputs)
    plan = classify(program, None)
    asked = []

    def attempt(job, program, folder, timeout, progress=True, *rest):
        low = computed_in(program, "scaled_dot_product_attention") == torch.float16
        asked.append((low, job.settings.get("decompose_attention"), folder.stat().st_mode & 0o777))
        raise BuilderError("context", "Unable to create an execution context", RUNNING)

    monkeypatch.setattr(build_attempts, "build_isolated", attempt)
    monkeypatch.setattr(build_attempts, "is_rtx", lambda: True)
    with pytest.raises(BuildError, match="tried: keep operators in fp32"):
        ahead((insert_casts(program, plan), plan), on_failure="fallback", **said)
    assert asked[:2] == [(True, said.get("decompose_attention"), 0o700), (False, not said, 0o700)]


class Nested(nn.Module):
    def forward(self, batch, *, places):
        return torch.where(batch["mask"], batch["x"], 0.0) + batch["table"][places]


def test_a_trial_takes_values_that_calibration_saw():
    """Nested inputs, too; masks mask nothing out, and places are places in a table, if no example says which."""
    x = torch.rand(2, 16) * 5 + 10
    batch = {"x": x, "mask": torch.rand(2, 16) < 0.5, "table": torch.randn(3, 16)}
    inputs = {"batch": batch, "places": torch.tensor([2, 1])}
    program = torch.export.export(Nested().eval(), (), inputs)
    ranges = calibrate(program, [inputs], progress=False)
    shapes = profiles(signature_of(program), ranges)
    made = dict(
        zip(inputs["batch"] | {"places": 0}, trial_inputs(program, shapes, ranges, torch.device("cpu")), strict=True)
    )
    assert float(x.min()) <= float(made["x"].min()) <= float(made["x"].max()) <= float(x.max())
    assert made["mask"].all()
    assert made["places"].tolist() == [0, 0]


def test_a_trial_takes_masks_and_places_of_the_example_that_was_exported():
    """Zeros for a mask of ones would mask out everything: of TensorRT's softmax that is NaN, and says nothing."""
    keep = (torch.arange(4)[None] < torch.tensor([2, 4])[:, None]).long()
    inputs = {"batch": {"x": torch.rand(2, 4), "mask": keep.bool(), "table": torch.randn(3, 4)}}
    inputs["places"] = torch.tensor([2, 1])
    program = torch.export.export(Nested().eval(), (), inputs)
    flat = pytree.tree_leaves(program.example_inputs)
    shapes = [((2, 4),) * 3, ((3, 5),) * 3, ((3, 4),) * 3, ((1,),) * 3]
    _, mask, _, places = trial_inputs(program, shapes, None, torch.device("cpu"), flat)
    assert mask.tolist() == [[True, True, False, False, True], [True] * 5, [True, True, False, False, True]]
    assert places.tolist() == [2]


def test_a_trial_that_fails_ends_no_search(planned, monkeypatch):
    class Refused:
        def __init__(self, *arguments):
            raise BuildError("TensorRT refuses the engine")

    monkeypatch.setattr(tensorrt, "TensorrtRuntime", Refused)
    for question in ("absent", "missing"):
        monkeypatch.setattr(tensorrt.adapter, question, lambda: None)
    monkeypatch.setattr(handover, "trial_inputs", lambda *arguments: [])
    trial = tensorrt._trial(BuildRequest(planned[0]), [])
    assert trial(None, planned[0]) == "TensorRT refuses the engine"


def test_what_engines_are_held_against_is_made_while_the_builder_works(planned, monkeypatch):
    made, wide, mixed = [], trial_run.in_fp32, planned[0]
    monkeypatch.setattr(handover, "in_fp32", lambda program: made.append(program) or wide(program))
    monkeypatch.setattr(trial_run, "in_fp32", lambda program: pytest.fail("it is made once more"))

    def load(folder, program):
        return program.module()

    request = BuildRequest(mixed, batches=[[torch.randn(2, 3, 16, 16)]])
    trial = handover.EngineTrial(request, [], torch.device("cpu"), load)
    trial.prepare(mixed)
    trial.prepare(mixed)  # of a second build with other settings
    assert made == [mixed]
    assert trial(None, mixed) is None
    monkeypatch.setattr(trial_run, "in_fp32", wide)
    assert trial(None, widened(mixed, ["sigmoid"])) is None, "of another program it makes its own"
    handover.EngineTrial(request, [], torch.device("cpu"), load, "there is no GPU").prepare(mixed)
    assert made == [mixed]


def test_what_cannot_be_made_meanwhile_ends_no_build(planned, monkeypatch):
    """The trial, which makes it then, says why it cannot."""

    def refuse(program):
        raise RuntimeError("no memory")

    for module in (handover, trial_run):
        monkeypatch.setattr(module, "in_fp32", refuse)
    request = BuildRequest(planned[0], batches=[[torch.randn(2, 3, 16, 16)]])
    trial = handover.EngineTrial(request, [], torch.device("cpu"), lambda folder, program: program.module())
    trial.prepare(planned[0])
    assert trial(None, planned[0]) is None
    assert "no memory" in trial.judgement.why_not


REFUSED = "TensorRT does not take _run_on_acc_0.engine: RuntimeError: Expected (exec_ctx.get() != nullptr)"


def set_up_once_sigmoids_are_wide(monkeypatch, refused=REFUSED):
    """Let no engine be set up as long as the sigmoids are in bf16."""

    def load(folder, program):
        if computed_in(program, "sigmoid") == torch.bfloat16:
            raise BuildError(refused)
        return program.module()

    def trial(request, shapes):
        return handover.EngineTrial(request, shapes, torch.device("cpu"), load)

    monkeypatch.setattr(tensorrt, "_trial", trial)


@pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")
def test_an_engine_that_cannot_be_set_up_is_mended_as_one_that_cannot_be_built(planned, monkeypatch):
    """The builder does not set engines up, as that takes as long as the build: it is done once, where they run."""
    set_up_once_sigmoids_are_wide(monkeypatch)
    with pytest.raises(
        BuildError, match=r"exec_ctx.* while building the engine. Remedy: .*on_failure='fallback' looks"
    ):
        ahead(planned)
    engine = ahead(planned, on_failure="fallback")
    assert "sigmoid" in engine.record["widened"]
    assert engine.record["trial"]["set_up"]
    assert "exec_ctx" in engine.record["remedies"][0]


@pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")
def test_an_engine_that_cannot_be_set_up_is_never_handed_over(planned, monkeypatch, tmp_path):
    """For lack of memory there is no remedy, and no first engine to fall back on."""
    set_up_once_sigmoids_are_wide(monkeypatch, "TensorRT does not take a.engine: CUDA out of memory")
    for _ in range(2):
        with pytest.raises(BuildError, match=r"out of memory.* smaller sizes"):
            ahead(planned, on_failure="fallback", cache=tmp_path)


def test_where_not_even_fp32_helps_the_error_says_so(planned, monkeypatch):
    def attempt(*arguments):
        raise BuilderError("context", "Unable to create an execution context", BUILDING)

    monkeypatch.setattr(build_attempts, "build_isolated", attempt)
    with pytest.raises(
        BuildError, match=r"tried: keep operators in fp32, as Unable .*; with all of those that can be: Unable"
    ):
        ahead(planned, on_failure="fallback")
    with pytest.raises(BuildError, match=rf"looks for the operators that it fails at, in at most {MOST_BUILDS} more"):
        ahead(planned)


@pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")
def test_what_a_converter_fails_at_stays_in_pytorch(planned, monkeypatch, caplog):
    """The node alone first; where another of its kind fails, too, all of them."""
    mixed, _ = planned
    culprits = [node.name for node in mixed.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    asked = []

    def attempt(job, program, folder, timeout, progress=True, *rest):
        asked.append(job.in_pytorch)
        failing = [name for name in culprits if name not in job.in_pytorch]
        if failing:
            raise BuilderError("refused", "ValueError: Cannot broadcast", CONVERTING, failing[0])
        return build_isolated(job, program, folder, timeout, progress)

    monkeypatch.setattr(build_attempts, "build_isolated", attempt)
    with pytest.raises(BuildError, match=r"Cannot broadcast at node conv2d \(conv2d.*on_failure='fallback'"):
        build(mixed, None, backend="tensorrt", ahead_of_time=True, progress=False, cache=False)
    asked.clear()
    engine = build(
        mixed, None, backend="tensorrt", ahead_of_time=True, progress=False, cache=False, on_failure="fallback"
    )
    lone = next(names for names in asked if names)
    assert lone == ("conv2d",)
    assert set(asked[-1]) == set(culprits)
    assert "keep node conv2d (" in engine.record["remedies"][-2]
    assert f"4 nodes run in PyTorch, beside the engine: {', '.join(culprits)}" in caplog.text


def test_an_error_of_a_converter_is_one_line():
    told = failure_of("ValueError", "Cannot broadcast\n\nWhile executing %index_put : ...", CONVERTING, "index_copy")
    assert str(told) == "ValueError: Cannot broadcast"


@pytest.mark.parametrize(
    ("kind", "stage", "searched"),
    [("context", "", True), ("crash", BUILDING, True), ("memory", BUILDING, False), ("hang", BUILDING, False),
     ("unsupported", BUILDING, False), ("refused", "loading the program", False)],
)  # fmt: skip
def test_only_what_may_be_an_operators_fault_is_searched(kind, stage, searched):
    assert can_search(BuilderError(kind, "", stage)) is searched


@given(st.integers(1, 20), st.data())
def test_the_smallest_choice_is_the_culprits(count, data):
    culprits = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=3))
    groups = [(f"{i}a", f"{i}b") for i in range(count)]
    asked = []

    def helps(names):
        asked.append(names)
        return {f"{i}a" for i in culprits} <= set(names)

    found = smallest_choice(groups, helps, most=100)
    assert found == tuple(name for i in sorted(culprits) for name in groups[i])
    assert len(asked) == len(set(asked)), "nothing is built twice"
    assert len(asked) <= 1 + len(culprits) * (1 + count.bit_length())


def test_a_search_that_is_cut_short_gives_the_best_that_it_found():
    groups = [(str(i),) for i in range(16)]
    asked = []

    def helps(names):
        asked.append(names)
        return {"3", "11"} <= set(names)

    found = smallest_choice(groups, helps, most=3)
    assert len(asked) == 3
    assert found is not None
    assert {"3", "11"} <= set(found)
    assert len(found) < 16
    assert smallest_choice(groups, lambda names: False) is None
    assert smallest_choice([], lambda names: True) is None


@pytest.mark.parametrize(
    ("count", "bad", "most"), [(10, {3}, 12), (300, {120, 121, 122}, 12), (64, {0}, 12), (64, {63}, 12), (1, {0}, 12)]
)
def test_the_smallest_stretch_that_has_to_stay_in_pytorch_is_found(count, bad, most):
    asked = []

    def helps(start, end):
        asked.append((start, end))
        return bad <= set(range(start, end))

    found, builds = smallest_region(count, helps)
    assert builds == len(asked) <= most
    start, end = found or (0, count)
    assert bad <= set(range(start, end))
    assert end - start <= len(bad) + 2 * -(-count // 64)


def test_a_search_for_a_stretch_stops_when_it_may_build_no_more():
    found, builds = smallest_region(300, lambda start, end: end >= 200 and start <= 150, most=4)
    assert builds == 4
    assert found is None or (found[0] <= 150 and found[1] >= 200)


@pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")
def test_what_no_precision_mends_stays_in_pytorch_and_the_rest_becomes_an_engine(planned, monkeypatch):
    """A context that cannot be made as long as the second convolution is in an engine, whatever its type."""

    def attempt(job, program, folder, timeout, progress=True, *rest):
        if "conv2d_1" not in job.in_pytorch:
            raise BuilderError("context", "Expected (exec_ctx.get() != nullptr)", BUILDING)
        return build_isolated(job, program, folder, timeout, progress)

    monkeypatch.setattr(build_attempts, "build_isolated", attempt)
    with pytest.raises(BuildError, match=r"smallest part of the program that has to stay in PyTorch, in at most 12"):
        ahead(planned)
    engine = ahead(planned, on_failure="fallback")
    assert "conv2d_1" in engine.record["fallback_to_pytorch"]
    assert len(engine.record["fallback_to_pytorch"]) <= 3
    assert "only without it (found by bisecting)" in engine.record["fallback_to_pytorch"]["conv2d_1"]
    assert "conv2d_1" in engine.record["remedies"][-1]
    assert "in PyTorch, found in" in engine.record["remedies"][-1]
    assert engine.record["half_layers"] > 0


class Noisy:
    """An engine with its own noise, so many dB below the program."""

    def __init__(self, program, decibels):
        self.program, self.scale, self.resets = program, 10 ** (-decibels / 20), 0

    def __call__(self, *args):
        generator = torch.Generator().manual_seed(3)
        y = self.program(*args)
        return y + torch.randn(y.shape, generator=generator).to(y.dtype) * y.float().square().mean().sqrt() * self.scale

    def reset(self):
        self.resets += 1


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("low", "decibels", "right"),
    [(None, 60, True), (None, 13, False), (torch.float16, 60, True), (torch.float16, 30, False),
     (torch.bfloat16, 45, True), (torch.bfloat16, 13, False)],
)  # fmt: skip
def test_an_engine_that_is_silently_wrong_is_noticed(low, decibels, right):
    """Without a proof: an engine may be 6 dB below what its cast graph has in PyTorch."""
    torch.manual_seed(0)
    program = torch.export.export(Plain().eval(), (torch.randn(16, 32),))
    mixed = program if low is None else insert_casts(program, classify(program, None, low_precision_type=low))
    batches = [[torch.randn(16, 32)] for _ in range(2)]
    engine = Noisy(mixed.module(), decibels)
    for reference in (None, program):
        found = judged(engine, mixed, batches, reference)
        assert (found.problem is None) is right, found
        assert found.batches == 2
    assert engine.resets == 4
    if not right:
        assert "of the engine has" in found.problem
        assert "its cast graph has" in found.problem


def _proof(sqnr_db):
    return Proof(40.0, sqnr_db, 0, 0, None, sqnr_db, outputs=(sqnr_db,), batches=1)


def test_the_proof_is_what_an_engine_is_held_to_and_what_a_plan_misses_is_the_plans():
    torch.manual_seed(0)
    program = torch.export.export(Plain().eval(), (torch.randn(16, 32),))
    mixed = insert_casts(program, classify(program, None))
    batches = [[torch.randn(16, 32)]]
    engine = Noisy(mixed.module(), 50)
    assert judged(engine, mixed, batches, program).problem is None
    found = judged(engine, mixed, batches, program, proven=_proof(58.0))
    assert "at least 52.0 dB were asked" in found.problem
    found = judged(Noisy(mixed.module(), 200), mixed, batches, program, proven=_proof(90.0))
    assert found.problem is None
    assert "was proven to have 90.0 dB" in found.plan_problem
    assert json.loads(json.dumps(found.record()))["outputs"][0]["output"] == "output"


class Mixed(nn.Module):
    """An index, which has no place in a proof, before two outputs that have."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        hidden = self.one(x)
        return hidden.argmax(-1), hidden, self.other(hidden).tanh()


def test_each_output_is_held_to_its_own_proof_where_some_are_integers():
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    program = torch.export.export(Mixed().eval(), (x,))
    module, plan = program.module(), tune(program, measure(program, [x], progress=False), [x])
    mixed = insert_casts(program, plan)

    def wrong(x):
        index, hidden, last = module(x)
        return index, hidden, last + last.std() * torch.randn_like(last) * 10 ** (-45 / 20)

    found = judged(wrong, mixed, [[x]], program, plan.proof)
    assert "output[2] of the engine has 4" in found.problem
    assert found.plan_problem is None
    assert judged(mixed.module(), mixed, [[x]], program, plan.proof).problem is None
    assert plan.proof.places == (1, 2)
    before = replace(plan.proof, places=())  # as earlier versions saved it
    assert before.sqnr_by_place([1, 2]) == plan.proof.sqnr_by_place([])
    assert "output[2] of the engine has 4" in judged(wrong, mixed, [[x]], program, before).problem


def test_a_converters_failure_in_this_process_names_its_stage(planned, monkeypatch):
    """Without it, what fails is not left out where `isolate=False`."""

    def failing(job, program, folder, event):
        event({"stage": "convert", "node": "sigmoid"})
        raise ValueError("Cannot broadcast")

    monkeypatch.setattr(build_attempts, "compile_job", failing)
    with pytest.raises(BuilderError) as caught:
        build_attempts._build_here(None, planned[0], None)
    assert (caught.value.stage, caught.value.node) == (CONVERTING, "sigmoid")


def test_an_engine_that_gives_another_shape_is_wrong():
    """Lowering by torch 2.11 gives the last states of an LSTM one dimension more."""
    x = torch.randn(4, 32)
    program = torch.export.export(Plain().eval(), (x,))
    module = program.module()
    found = judged(lambda x: module(x)[None], program, [[x]])
    assert found.problem == "the engine gives output the shape [1, 4, 32], and its program [4, 32]"
