"""Engines of the eager backend: called like the model, saved and loaded, refused when they are not whole."""

import functools
import inspect
import json

import pytest
import torch
from calibcast import engines
from calibcast.calib import (
    ArtifactError,
    BatchError,
    BuildError,
    ChangedFileError,
    MismatchError,
    ProgramError,
    calibrate,
)
from calibcast.calib.sealed_files import check_plain_part
from calibcast.engines import Engine, build, compilation
from calibcast.engines.commands import stages
from calibcast.engines.engine import read_ledger
from calibcast.engines.job.settings import Plan
from calibcast.passes import classify, insert_casts
from torch import nn
from torch.utils import _pytree as pytree


class Net(nn.Module):
    """Two linears with a keyword input, a buffer and a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x, *, shift):
        hidden = torch.relu(self.first(x)) * self.scale
        return {"hidden": hidden, "out": (self.second(hidden) + shift,)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def program(model):
    return torch.export.export(model, (torch.randn(4, 6),), {"shift": torch.ones(2)})


@pytest.fixture
def engine(program):
    ranges = calibrate(program, [((torch.randn(4, 6),), {"shift": torch.ones(2)})], progress=False)
    plan = classify(program, ranges)
    return build(insert_casts(program, plan), plan, ranges, backend="eager")


def test_an_engine_is_called_like_the_model(engine, model):
    x, shift = torch.randn(4, 6), torch.ones(2)
    ours, theirs = engine(x, shift=shift), model(x, shift=shift)
    assert list(ours) == ["hidden", "out"]
    assert isinstance(ours["out"], tuple)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    assert ours["out"][0].dtype == torch.float32
    assert not torch.equal(ours["out"][0], theirs["out"][0])  # it does run in half


def test_wrong_inputs_are_told_by_name(engine):
    with pytest.raises(BatchError, match=r"argument x: expected float32\[4, 6\], got float32\[4, 5\]"):
        engine(torch.randn(4, 5), shift=torch.ones(2))
    with pytest.raises(BatchError, match="input 'shift' is missing"):
        engine(torch.randn(4, 6))


def test_saved_and_loaded_it_is_the_same(engine, tmp_path):
    engine.save(tmp_path / "engine")
    engine.save(tmp_path / "engine")  # replaces itself
    loaded = Engine.load(tmp_path / "engine")
    x, shift = torch.randn(4, 6), torch.ones(2)
    torch.testing.assert_close(loaded(x, shift=shift), engine(x, shift=shift), rtol=0, atol=0)
    assert loaded.plan.decisions == engine.plan.decisions
    assert loaded.ranges.frame.equals(engine.ranges.frame)
    assert (loaded.backend, loaded.why) == ("eager", "as asked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine"]


def test_a_folder_that_is_no_engine_is_not_overwritten(engine, tmp_path):
    (tmp_path / "precious.txt").write_text("data")
    with pytest.raises(ArtifactError, match="is no engine folder"):
        engine.save(tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "data"


def test_an_engine_that_is_not_whole_is_refused(engine, tmp_path):
    folder = tmp_path / "engine"
    engine.save(folder)
    whole = (folder / "program.pt2").read_bytes()
    (folder / "program.pt2").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=r"program\.pt2 is not the program"):
        Engine.load(folder)
    (folder / "program.pt2").unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        Engine.load(folder)
    with pytest.raises(ArtifactError, match="no such file or folder; an engine folder was expected"):
        Engine.load(tmp_path / "nothing")


def test_a_ledger_with_damaged_bytes_is_refused(engine, tmp_path):
    engine.save(tmp_path / "e")
    path = tmp_path / "e/ledger.parquet"
    assert read_ledger(tmp_path / "e").equals(engine.ledger)
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with pytest.raises(ArtifactError, match=r"ledger\.parquet is not a readable ledger .*checksum"):
            read_ledger(tmp_path / "e")


def test_manifests_of_other_kinds_and_versions_are_refused(engine, tmp_path):
    folder = tmp_path / "engine"
    engine.save(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, message in (
        ({"schema": 99}, "newer calibcast"),
        ({"calibcast": "plan"}, "a folder whose manifest.json is a plan; an engine folder was expected"),
        ({"backend": "onnx"}, "unknown backend 'onnx'"),
    ):
        (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises((ArtifactError, BuildError), match=message):
            Engine.load(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="truncated or foreign"):
        Engine.load(folder)


def test_a_program_that_was_swapped_is_noticed(engine, tmp_path):
    folder = tmp_path / "engine"
    engine.save(folder)
    other = torch.export.export(nn.Linear(6, 2), (torch.randn(4, 6),))
    torch.export.save(other, folder / "program.pt2")
    with pytest.raises(MismatchError, match="is not the program"):
        Engine.load(folder)


def test_unknown_backends_and_settings_list_the_known(program):
    with pytest.raises(BuildError, match=r"unknown backend 'tensort'; near names: tensorrt"):
        build(program, backend="tensort")
    with pytest.raises(BuildError, match="takes no setting but device; got optimization_level"):
        build(program, backend="eager", optimization_level=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_auto_is_eager_and_says_why(program):
    built = build(program)
    assert built.backend == "eager"
    assert "Torch-TensorRT is not installed" in built.why or "no CUDA GPU" in built.why
    with pytest.raises(BuildError, match="backend='tensorrt' cannot be used here"):
        build(program, backend="tensorrt")


def test_the_modes_of_the_proposal(model):
    inputs, shift = (torch.randn(4, 6),), {"shift": torch.ones(2)}
    loader = [((torch.randn(4, 6),), shift)]

    def compiled(**arguments):
        return engines.compile(model, inputs, kwargs=shift, backend="eager", **arguments)

    cast = compiled(calibration_dataloader=loader, progress=False)
    assert "linear" in cast.plan.low_precision_nodes
    assert cast.ranges is not None
    blind = compiled()
    assert blind.ranges is None
    assert any("no ranges were given" in note for note in blind.plan.notes)
    asis = compiled(enable_autocast=False)
    assert asis.plan.low_precision_nodes == ()
    x = torch.randn(4, 6)
    torch.testing.assert_close(asis(x, **shift), model(x, **shift), rtol=0, atol=0)
    with pytest.raises(BuildError, match=r"needs use_explicit_typing=True"):
        compiled(use_explicit_typing=False)
    with pytest.raises(BuildError, match=r"weak typing.*enable_autocast=True"):
        compiled(use_explicit_typing=False, enable_autocast=False)


def test_the_arguments_of_the_proposal_reach_their_stages(model):
    engine = engines.compile(
        model,
        (torch.randn(4, 6),),
        kwargs={"shift": torch.ones(2)},
        use_explicit_typing=True,
        enable_autocast=True,
        low_precision_type=torch.bfloat16,
        nodes_to_exclude={"^linear$"},
        targets_to_exclude={torch.ops.aten.add.Tensor},
        data_max=512,
        max_depth_of_reduction=7,
        calibration_dataloader=[torch.randn(4, 6)] * 3,
        transform=lambda batch: ((batch,), {"shift": torch.ones(2)}),
        backend="eager",
        max_batches=2,
        progress=False,
    )
    rules = {d.node: d.rule for d in engine.plan.decisions}
    assert rules["linear"] == "nodes_to_exclude"
    assert rules["add"] == "targets_to_exclude"
    assert rules["linear_1"] == "max_depth_of_reduction"
    assert engine.plan.low_precision_type == torch.bfloat16
    assert engine.ranges.calibration.batches == 2


def test_every_documented_argument_of_a_stage_goes_through_compile(model, tmp_path, monkeypatch):
    """By its name, to each stage that has it: none is listed by hand, so none can be forgotten."""
    x, shift, seen = torch.randn(4, 6), {"shift": torch.ones(2)}, {}

    @functools.wraps(calibrate)
    def watched(*args, **arguments):
        seen.update(arguments)
        return calibrate(*args, **arguments)

    monkeypatch.setattr(compilation, "calibrate", watched)
    engine = engines.compile(
        model,
        (x,),
        kwargs=shift,
        calibration_dataloader=[((x,), shift)] * 2,
        backend="eager",
        wide_accumulation=("layer_norm",),
        checkpoint=str(tmp_path / "c.npz"),
        histogram=False,
        keep_io_types=False,
        weights="ignore",
        progress=False,
        cache=False,
    )
    assert seen.keys() >= {"checkpoint", "histogram", "progress"}
    assert engine.ranges.frame["histogram"].null_count() == engine.ranges.frame.height
    assert torch.float16 in {value.dtype for value in pytree.tree_leaves(engine(x, **shift))}
    with pytest.raises(BuildError, match=r"takes no setting but device; got nonsense"):
        engines.compile(model, (x,), kwargs=shift, backend="eager", nonsense=1)


def test_what_classify_takes_the_command_line_and_the_job_take():
    """But for what they have other words for, or read from a file."""
    taken = set(inspect.signature(classify).parameters) - {"program", "ranges", "weights"}
    assert taken - {"rules"} <= set(inspect.signature(stages.plan).parameters)
    assert taken <= set(Plan.model_fields)


def test_a_model_that_cannot_be_exported_or_trains_is_a_program_error():
    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(ProgramError, match=r"torch\.export cannot export the model"):
        engines.compile(Branches(), (torch.ones(2),))
    with pytest.raises(ProgramError, match=r"training mode.*model\.eval\(\)"):
        engines.compile(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), (torch.ones(1, 2),))


def _resealed(folder, change):
    """An engine folder that was changed by someone who knows how to write a manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_changed_file_of_an_engine_is_refused_before_it_is_read(engine, tmp_path, monkeypatch):
    engine.save(tmp_path / "e")
    for file in sorted((tmp_path / "e").iterdir()):
        if file.name == "manifest.json":
            continue
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        monkeypatch.setattr("calibcast.engines.engine.load_program", lambda path: pytest.fail("it was read"))
        with pytest.raises(ChangedFileError, match=rf"{file.name} is not the .* that manifest\.json was written for"):
            Engine.load(tmp_path / "e")
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["../outside.pt2", "/etc/passwd", "a/../../b", "a\\b", "C:x", "", ".", 7])
def test_a_manifest_names_only_files_of_its_folder(engine, tmp_path, name):
    engine.save(tmp_path / "e")
    if isinstance(name, str):
        _resealed(tmp_path / "e", lambda manifest: manifest["files"].update({name: "0"}))
        with pytest.raises(ArtifactError, match="only plain names inside its folder"):
            Engine.load(tmp_path / "e")
    with pytest.raises(ArtifactError, match="only plain names inside its folder"):
        check_plain_part(name, tmp_path)


def test_files_that_are_read_must_be_listed(engine, tmp_path):
    engine.save(tmp_path / "e")
    _resealed(tmp_path / "e", lambda manifest: manifest["files"].pop("program.pt2"))
    with pytest.raises(ArtifactError, match=r"does not list program\.pt2"):
        Engine.load(tmp_path / "e")
    _resealed(tmp_path / "e", lambda manifest: manifest.pop("files"))
    with pytest.raises(ArtifactError, match="lists no hashes"):
        Engine.load(tmp_path / "e")


def test_a_link_to_a_file_elsewhere_is_none_of_the_engine(engine, tmp_path):
    engine.save(tmp_path / "e")
    (tmp_path / "e/program.pt2").rename(tmp_path / "elsewhere.pt2")
    (tmp_path / "e/program.pt2").symlink_to(tmp_path / "elsewhere.pt2")
    with pytest.raises(ArtifactError, match="symbolic link"):
        Engine.load(tmp_path / "e")


def test_saving_over_a_link_writes_what_it_points_to(engine, tmp_path):
    engine.save(tmp_path / "real")
    before = (tmp_path / "real/manifest.json").stat().st_ino
    (tmp_path / "link").symlink_to("real")
    engine.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/manifest.json").stat().st_ino != before
    Engine.load(tmp_path / "real")
