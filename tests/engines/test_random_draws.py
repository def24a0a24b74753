"""Random numbers: programs that are compared draw the same, and the caller's generators stay as they were."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib import calibrate
from calibcast.calib.host_kernels import call_anywhere
from calibcast.calib.random_draws import JUDGED, Draws, drawing_nodes
from calibcast.engines import build, verify
from calibcast.engines.tensorrt.trial_run import judged
from calibcast.passes import classify, compare, insert_casts, tune
from torch import Tensor, nn
from torch.export import ExportedProgram

_DROPS_CHANNELS = torch.ops.aten.feature_dropout.default


class _Noise(nn.Module):
    """Adds noise, so that no two calls give the same."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x) * torch.rand_like(x) + torch.randn(x.shape))


class _Drops(nn.Module):
    """Attention and layers in train mode, with numbers written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(self.inner(x).relu(), 0.5, True)[None]
        hidden = nn.functional.scaled_dot_product_attention(hidden, hidden, hidden, dropout_p=0.3)[0]
        kept = torch.bernoulli(torch.full_like(hidden, 0.5)) + torch.empty_like(hidden).normal_()
        return self.outer(nn.functional.dropout1d(hidden * kept, 0.5, True))


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 32, generator=generator) for _ in range(3)]


def _program(model: nn.Module) -> ExportedProgram:
    torch.manual_seed(3)
    return torch.export.export(model, (_batches()[0],))


def _cast(model: nn.Module) -> tuple[ExportedProgram, ExportedProgram]:
    program = _program(model)
    return program, insert_casts(program, classify(program, None))


@pytest.mark.parametrize("model", [_Noise, _Drops])
def test_both_sides_of_a_comparison_draw_the_same(model: type[nn.Module]) -> None:
    program, mixed = _cast(model())
    assert mixed.graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default)
    frame = compare(program, mixed, _batches(), progress=False).frame
    assert frame.filter(pl.col("sqnr_db").is_finite())["sqnr_db"].min() > 50  # type: ignore[operator]
    report = verify(build(mixed, backend="eager"), program, _batches(), progress=False)
    assert report.frame["sqnr_db"][0] > 50


@pytest.mark.parametrize("model", [_Noise, _Drops])
def test_a_module_that_draws_is_verified_against_its_own_program(model: type[nn.Module]) -> None:
    module = model()
    assert verify(module, _program(module), _batches(), progress=False).frame["max_abs"].to_list() == [0.0]


def test_each_batch_draws_other_numbers() -> None:
    outputs: list[Tensor] = []
    module = _Noise()
    same = [_batches()[0]] * 2
    verify(module, _program(module), same, progress=False, metrics={"kept": lambda a, _: outputs.append(a) or 0.0})
    assert not torch.equal(*outputs)


def _calibrate(program: ExportedProgram, _: ExportedProgram) -> Any:
    return calibrate(program, _batches(), progress=False)


def _tune(program: ExportedProgram, _: ExportedProgram) -> Any:
    return tune(program, calibrate(program, _batches(), progress=False), _batches())


def _trial(program: ExportedProgram, mixed: ExportedProgram) -> Any:
    return judged(mixed.module(), mixed, [[batch] for batch in _batches()], program)


@pytest.mark.parametrize(
    "call",
    [
        _calibrate,
        _tune,
        _trial,
        lambda program, mixed: compare(program, mixed, _batches(), progress=False),
        lambda program, mixed: verify(build(mixed, backend="eager"), program, _batches(), progress=False),
    ],
    ids=["calibrate", "tune", "trial", "compare", "verify"],
)
def test_the_callers_generator_is_left_as_found(call: Callable[..., Any]) -> None:
    program, mixed = _cast(_Noise())
    torch.manual_seed(17)
    before = torch.get_rng_state()
    call(program, mixed)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_leaves_the_generator_as_found_too() -> None:
    program, mixed = _cast(_Noise())

    def failing(ours: Tensor, theirs: Tensor) -> float:
        raise KeyError("a user's metric")

    before = torch.get_rng_state()
    with pytest.raises(Exception, match="a user's metric"):
        verify(build(mixed, backend="eager"), program, _batches(), progress=False, metrics={"failing": failing})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plan_for_a_program_that_draws_is_proven_as_it_is_predicted() -> None:
    program = _program(_Noise())
    plan = tune(program, calibrate(program, _batches(), progress=False), _batches(), min_sqnr_db=40)
    assert plan.proof is not None
    assert plan.rounding is not None
    assert plan.proof.sqnr_db == pytest.approx(plan.rounding.predicted_sqnr_db, abs=6)


def test_a_trial_of_an_engine_that_draws_others_asks_for_no_decibels() -> None:
    program, mixed = _cast(_Noise())

    def engine(x: Tensor) -> Tensor:
        torch.manual_seed(99)
        result: Tensor = mixed.module()(x)
        return result

    assert judged(engine, mixed, [[_batches()[0]]], program).problem is None
    broken = judged(lambda x: engine(x) * torch.nan, mixed, [[_batches()[0]]], program)
    assert "NaN" in str(broken.problem)


@pytest.mark.parametrize(
    "call",
    [
        lambda kind: call_anywhere(torch.ops.aten.randn.default, ([40],), {"dtype": kind}),
        lambda kind: call_anywhere(torch.ops.aten.rand_like.default, (torch.ones(40, dtype=kind),), {}),
        lambda kind: call_anywhere(torch.ops.aten.normal_.default, (torch.ones(40, dtype=kind),), {}),
        lambda kind: call_anywhere(_DROPS_CHANNELS, (torch.ones(1, 40, dtype=kind), 0.5, True), {}),
    ],
    ids=["states its type", "like", "in place", "channels"],
)  # fmt: skip
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_half_precision_draws_are_rounded_fp32_draws(call: Callable[[torch.dtype], Tensor], low: torch.dtype) -> None:
    torch.manual_seed(5)
    wide = call(torch.float32)
    torch.manual_seed(5)
    narrow = call(low)
    assert narrow.dtype == low
    assert torch.equal(narrow, wide.to(low))


def test_numbers_written_in_place_are_in_the_callers_tensor() -> None:
    tensor = torch.ones(40, dtype=torch.float16)
    returned = call_anywhere(torch.ops.aten.uniform_.default, (tensor,), {})
    assert returned is tensor
    assert not torch.equal(tensor, torch.ones(40, dtype=torch.float16))


def test_dropout_in_evaluation_draws_nothing() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Dropout1d(0.5), nn.RReLU()).eval()
    assert drawing_nodes(_program(model)) == []
    assert drawing_nodes(_program(_Noise())) == ["rand_like", "randn"]
    assert drawing_nodes(_program(_Drops())) == [
        "dropout", "scaled_dot_product_attention", "bernoulli", "normal_", "feature_dropout",
    ]  # fmt: skip


def test_threads_that_draw_at_the_same_time_do_not_disturb_each_other() -> None:
    module = _Noise()
    program, torn = _program(module), []
    torch.manual_seed(4)
    before = torch.get_rng_state()

    def judge() -> None:
        torn.extend(verify(module, program, _batches() * 4, progress=False).frame["max_abs"].to_list())

    threads = [threading.Thread(target=judge) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torn == [0.0] * 4
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_depend_on_the_batch_alone() -> None:
    def drawn(draws: Draws, index: int) -> Tensor:
        with draws.of_batch(index):
            return torch.rand(3)

    assert torch.equal(drawn(Draws(), 7), drawn(Draws(), 7))
    assert not torch.equal(drawn(Draws(), 7), drawn(Draws(), 8))
    assert not torch.equal(drawn(Draws(), 7), drawn(Draws(JUDGED), 7))
