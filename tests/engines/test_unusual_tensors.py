"""Programs with tensors that hold no plain numbers, or none at all: they pass through every stage untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib import calibrate
from calibcast.calib.artifacts import load_program, save_program
from calibcast.calib.errors import ArtifactError, BuildError, MismatchError, ProgramError
from calibcast.calib.plain_tensors import is_plain, plain_parts, readable, storage_of
from calibcast.calib.program_digests import node_digests, weights_hash
from calibcast.engines import Engine, build, export_onnx, verify
from calibcast.passes import PrecisionPlan, classify, compare, insert_casts, rescale, tune
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree


class _Scaled(Tensor):
    """A weight stored as two tensors, as libraries for quantisation store theirs."""

    inner: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, scale: Tensor) -> _Scaled:
        made: _Scaled = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        return made

    def __init__(self, inner: Tensor, scale: Tensor) -> None:
        self.inner, self.scale = inner, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> _Scaled:
        return _Scaled(parts["inner"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten.detach.default:
            return _Scaled(args[0].inner, args[0].scale)
        plain = pytree.tree_map_only(_Scaled, lambda t: t.inner * t.scale, (args, kwargs or {}))
        return operator(*plain[0], **plain[1])


class _Holds(nn.Module):
    """A linear layer, and a function of its result and of a buffer."""

    def __init__(self, held: Tensor, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(8, 8), function
        self.register_buffer("held", held)
        self.held: Tensor

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.function(self.linear(x), self.held)) * 2


def _nibbles(dtype: torch.dtype) -> Tensor:
    return torch.arange(32, dtype=torch.uint8).reshape(8, 4).view(dtype)


def _unpacked(x: Tensor, held: Tensor) -> Tensor:
    packed = held.view(torch.uint8)
    return x * torch.stack([packed & 15, packed >> 4], -1).reshape(8, 8).float()[: x.shape[0]]


def _quantised(x: Tensor, _: Tensor) -> Tensor:
    made: Tensor = torch.dequantize(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8))
    return made


_MODELS: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "sparse constant": (lambda: torch.eye(4), lambda x, held: torch.sparse.mm(held.to_sparse(), x)),
    "compressed buffer": (lambda: torch.eye(8).to_sparse_csr(), lambda x, held: (held @ x.t()).t()),
    "quantised": (lambda: torch.ones(1), _quantised),
    "uint4": (lambda: _nibbles(torch.uint4), _unpacked),
    "int4": (lambda: _nibbles(torch.int4), _unpacked),
    "float4": (lambda: _nibbles(torch.float4_e2m1fn_x2), _unpacked),
    "wrapper": (lambda: _Scaled(torch.eye(8), torch.full((8, 8), 2.0)), lambda x, held: x @ held),
    "without data": (lambda: torch.empty(8, 8, device="meta"), lambda x, held: x + held.shape[0]),
}


def _program(name: str) -> ExportedProgram:
    made, function = _MODELS[name]
    torch.manual_seed(0)
    return torch.export.export(_Holds(made(), function).eval(), (torch.randn(4, 8),))


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator) for _ in range(2)]


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", _MODELS)
def test_unusual_tensors_pass_through_every_stage(name: str) -> None:
    program, batches = _program(name), _batches()
    before = program.module()(batches[0])
    ranges = calibrate(program, batches, progress=False)
    assert ranges.frame.filter(pl.col("node") == "linear")["batches"].to_list() == [2]
    for plan in (classify(program, ranges), tune(program, ranges, batches, min_sqnr_db=30), classify(program, None)):
        mixed = insert_casts(program, plan)
        assert plan.low_precision_nodes
        compared = compare(program, mixed, batches, progress=False).frame
        assert compared.filter(pl.col("node") == "mul")["sqnr_db"][0] > 30
        assert verify(build(mixed, plan, backend="eager"), program, batches, progress=False).frame["sqnr_db"][0] > 30
        # Half a step of the quantiser is the most by which a value on its edge can move.
        assert torch.allclose(mixed.module()(batches[0]), before, atol=0.2 if name == "quantised" else 0.05)
    rescale(program, ranges)
    assert len(insert_casts(program, PrecisionPlan.from_types(program)).graph.nodes) == len(program.graph.nodes)
    assert torch.equal(program.module()(batches[0]), before)


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", ["compressed buffer", "quantised", "uint4", "int4", "float4"])
def test_what_torch_cannot_write_is_one_error_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    engine = build(_program(name), None, backend="eager")
    with pytest.raises(ArtifactError, match="the program cannot be saved: torch raises") as caught:
        engine.save(tmp_path / "engine")
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wrapper", "without data", "a key of two lines"])
def test_what_will_be_refused_when_it_is_read_is_told_when_it_is_written(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"two\nlines": x * 2}

    program = _program(name) if name in _MODELS else torch.export.export(Named(), (torch.ones(2),))
    save_program(program, tmp_path / "net.pt2")
    assert "calibcast will refuse to load it" in caplog.text
    with pytest.raises(ArtifactError, match="is not loaded, since"):
        load_program(tmp_path / "net.pt2")


def test_example_inputs_of_a_class_of_their_own_are_left_out_of_the_file(tmp_path: Path) -> None:
    class Labelled(Tensor):
        pass

    program = torch.export.export(nn.Linear(8, 8), (torch.randn(4, 8).as_subclass(Labelled),))
    save_program(program, tmp_path / "net.pt2")
    assert program.example_inputs is not None
    assert torch.equal(
        load_program(tmp_path / "net.pt2").module()(torch.ones(4, 8)), program.module()(torch.ones(4, 8))
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.vmap(lambda a: a.sin() * 2)(x).relu(),
        lambda x: torch.func.jvp(lambda y: (y * 3).sin(), (x,), (torch.ones_like(x),))[1] * 2,
    ],
    ids=["vmap", "jvp"],
)
def test_markers_of_regions_keep_their_names_in_a_file(function: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    class Marked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    program = torch.export.export(Marked(), (torch.randn(4, 8),))
    plan = classify(program, None)
    engine = build(insert_casts(program, plan), plan, backend="eager")
    engine.save(tmp_path / "engine")
    x = torch.randn(4, 8)
    assert torch.equal(Engine.load(tmp_path / "engine")(x), engine(x))
    save_program(program, tmp_path / "net.pt2")
    loaded = load_program(tmp_path / "net.pt2")
    assert list(node_digests(loaded).items()) == list(node_digests(program).items())
    insert_casts(loaded, plan)


def test_fake_weights_are_one_clear_error() -> None:
    with FakeTensorMode():
        program = torch.export.export(nn.Linear(8, 8), (torch.randn(4, 8),))
    with pytest.raises(ProgramError, match=r"weight is a fake tensor.*weights loaded"):
        calibrate(program, _batches(), progress=False)


def test_an_output_without_data_has_no_verdict() -> None:
    program = _program("without data")
    with pytest.raises(MismatchError, match="meta device: it has no values"):
        verify(lambda x: torch.empty(4, 8, device="meta"), program, _batches(), progress=False)


def test_sparse_and_quantised_outputs_are_compared_by_what_they_stand_for() -> None:
    class Sparse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).to_sparse()

    program = torch.export.export(Sparse(), (torch.randn(4, 8),))
    report = verify(lambda x: (x * 2.002).to_sparse(), program, _batches(), progress=False)
    assert report.frame["sqnr_db"][0] == pytest.approx(60, abs=0.1)


def test_onnx_says_what_it_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="ONNX cannot have this program: RuntimeError: Sparse"):
        export_onnx(_program("compressed buffer"), None, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in _MODELS if name != "without data"])
def test_other_weights_have_another_hash(name: str) -> None:
    program = _program(name)
    changed = copy.copy(program)
    held = program.state_dict["held"]
    [*_, part] = plain_parts(held)
    before = weights_hash(program)
    part.add_(1)
    assert weights_hash(changed) != before
    part.sub_(1)
    assert weights_hash(program) == before


def test_plain_numbers_are_recognised() -> None:
    types = (torch.float32, torch.uint16, torch.complex64, torch.float8_e4m3fn, torch.bool)
    assert all(is_plain(torch.ones(3).to(dtype)) for dtype in types)
    assert is_plain(nn.Parameter(torch.ones(2)))
    assert is_plain(torch.ones(0))
    quantised = torch.quantize_per_tensor(torch.tensor([1.0, 2.0]), 0.5, 0, torch.qint8)
    odd = [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), quantised, _nibbles(torch.uint4)]
    odd += [torch.ones(2, device="meta"), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])]
    assert not any(map(is_plain, odd))
    assert readable(quantised).tolist() == [1.0, 2.0]
    assert readable(torch.eye(3).to_sparse_csr()).tolist() == torch.eye(3).tolist()
    assert readable(_nibbles(torch.uint4)).dtype == torch.uint8
    both = torch.ones(8)
    assert storage_of(both[2:]) == storage_of(both)
    assert len({storage_of(tensor) for tensor in odd}) == len(odd)
