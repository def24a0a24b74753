"""What rounding does to the outputs: right where it can be computed by hand, and never at the program's expense."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib import RangeTable, calibrate
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.gc_pause import paused
from calibcast.calib.masks import mask_tensors
from calibcast.calib.output_noise import channel_noise
from calibcast.calib.range_diff import range_diff
from calibcast.calib.rounded_runner import RoundedRunner
from calibcast.calib.rounding import rounded, rounded_otherwise
from calibcast.calib.rounding_evidence import RoundingObserver
from calibcast.calib.rounding_table import ROUNDING_KEY, ROUNDING_SCHEMA, rounding_gaps
from calibcast.calib.rounding_tape import Call
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F  # noqa: N812 - torch's own idiom


class Net(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


def exported(function: Callable[..., Any], *inputs: torch.Tensor) -> ExportedProgram:
    with torch.no_grad():
        return export(Net(function).eval(), inputs)


def measured(program: ExportedProgram, *inputs: torch.Tensor, **more: Any) -> RangeTable:
    return calibrate(program, [inputs], progress=False, **more)


def noise(table: RangeTable, node: str, source: str, low: str = "float16") -> dict[str, Any]:
    rows = table.rounding.filter(
        (pl.col("node") == node) & (pl.col("input") == source) & (pl.col("low_precision_type") == low)
    )
    assert rows.height == 1, table.rounding.select("node", "input")
    return rows.row(0, named=True)


def decibels(ratio: float) -> float:
    return -10 * math.log10(ratio)


def assert_predicts(program: ExportedProgram, *inputs: torch.Tensor, within: float = 3.0) -> RangeTable:
    """The sum over all edges is what a run with all nodes low gives, within so many dB."""
    table = measured(program, *inputs)
    assert rounding_gaps(table.rounding).height == 0, rounding_gaps(table.rounding)["why_missing"].to_list()
    reference = ProgramRunner(program).run(list(inputs))
    names = [n.name for n in program.graph.nodes if n.op == "call_function"]
    for low_type in (torch.float16, torch.bfloat16):
        ours = RoundedRunner(program, names, low_type, mask_tensors(program)).run(list(inputs))
        real = sum(float(channel_noise(a, b).mean()) for a, b in zip(ours, reference, strict=True))
        rows = table.rounding.filter(pl.col("low_precision_type") == str(low_type).removeprefix("torch."))
        assert abs(decibels(rows["noise"].sum()) - decibels(real)) < within
    return table


def test_one_row_per_edge_and_type() -> None:
    """The frame has its schema, and one row for each edge in each type."""
    x = torch.randn(64, 8)
    table = measured(exported(lambda x: (x * 3).exp().sin(), x), x)
    assert dict(table.rounding.schema) == ROUNDING_SCHEMA
    assert not table.rounding.select(ROUNDING_KEY).is_duplicated().any()
    assert set(table.rounding["low_precision_type"]) == {"float16", "bfloat16"}
    assert set(table.rounding["method"]) == {"gradient"}


def test_the_noise_is_that_of_rounding_alone() -> None:
    """Of the only edge that matters, the noise is the error of rounding it, held to each output channel."""
    x = 300 + torch.randn(256, 8)
    table = measured(exported(lambda x: x.sin(), x), x)
    real = channel_noise(x.half().float().sin(), x.sin()).mean()
    assert noise(table, "sin", "x" if "x" in table.frame["node"] else "inputs_0")["noise"] == pytest.approx(
        float(real), rel=1e-3
    )


def test_a_network_is_predicted() -> None:
    """Convolution, norms, attention, residual: predicted noise and a whole-half run agree."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
            self.query, self.out = nn.Linear(16, 48), nn.Linear(16, 5)
            self.layer = nn.LayerNorm(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.relu(self.norm(self.conv(x)), inplace=True).flatten(2).transpose(1, 2)
            q, k, v = self.query(self.layer(y)).chunk(3, -1)
            return self.out(y + F.scaled_dot_product_attention(q, k, v))

    x = torch.randn(2, 3, 10, 10)
    assert_predicts(export(Block().eval(), (x,)), x)


def test_weights_share_out_what_they_do_together() -> None:
    """All inputs of a batch norm have rows, and the bias of a convolution its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].running_mean.normal_()  # type: ignore[union-attr, operator]
    x = torch.randn(2, 3, 8, 8)
    table = assert_predicts(export(model, (x,)), x)
    assert noise(table, "conv2d", "p_0_bias")["noise"] > 0
    assert noise(table, "batch_norm", "b_1_running_mean")["noise"] > 0


def test_writes_in_place_leave_program_and_inputs_alone() -> None:
    """Writes through views are followed; buffers and inputs are what they were."""

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 3
        y[0].add_(x[1])
        y.mul_(1.5)
        return y.sin()

    x = torch.randn(4, 64)
    before = x.clone()
    table = assert_predicts(exported(function, x), x)
    assert torch.equal(x, before)
    assert noise(table, "sin", "mul_")["noise"] > 0


def test_a_mutated_buffer_is_left_alone() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.add_(x.mean(0))
            return x * self.total

    x = torch.rand(8, 3)
    program = export(Counter(), (x,))
    table = measured(program, x)
    assert torch.equal(program.state_dict["total"], torch.ones(3))
    assert rounding_gaps(table.rounding).height == 0


def test_steps_are_run_alone() -> None:
    """An index that rounding moves is seen in its effect, which no gradient shows."""
    positions = torch.rand(256) * 500
    table_of_values = torch.randn(512)
    program = exported(lambda p, t: t[(p * 1.0).floor().long()], positions, table_of_values)
    table = measured(program, positions, table_of_values)
    row = noise(table, "floor", "mul", "bfloat16")
    assert row["method"] == "run"
    assert row["steps"] > 0
    assert row["noise"] > 0.01


def test_what_becomes_infinite_says_so() -> None:
    x = torch.tensor([[1.0, 2.0], [70000.0, 3.0]])
    row = noise(measured(exported(lambda x: (x * 1.5).sqrt(), x), x), "sqrt", "mul")
    assert row["noise"] == math.inf
    assert row["nonfinite"] == 1


def test_a_slope_that_is_infinite_spoils_nothing() -> None:
    """sqrt at 0: the other elements' noise is known all the same."""
    x = torch.cat([torch.zeros(4), torch.rand(60) + 1])
    table = assert_predicts(exported(lambda x: (x.relu() * 2).sqrt().sum().reshape(1), x), x, within=25)
    assert table.rounding["noise"].is_finite().all()


def test_several_outputs_are_told_apart() -> None:
    """Each output has its own noise; they add up. An integer output counts the elements that changed."""
    x = torch.randn(64, 16)

    def function(x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x * 1.1
        return {"a": y.exp(), "b": (y * 100).sin(), "best": y.argmax(-1)}

    table = measured(exported(function, x), x)
    parts = table.rounding["noise_by_output"]
    assert (parts.list.len() == 3).all()
    assert parts.list.sum().to_list() == pytest.approx(table.rounding["noise"].to_list())
    assert noise(table, "mul_1", "mul")["noise_by_output"][0] == 0.0


def test_sizes_integers_and_autocast_regions() -> None:
    """Token ids, sizes that change, a region in bfloat16: edges outside are measured, those inside left alone."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.linear = nn.Embedding(50, 8), nn.Linear(8, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.words(ids) * 2.5
            with torch.autocast("cpu", torch.bfloat16):
                y = self.linear(x)
            return y.float().exp() + x

    ids = torch.randint(0, 50, (2, 6))
    program = export(Model().eval(), (ids,), dynamic_shapes=({1: Dim("length", min=2, max=64)},))
    batches = [torch.randint(0, 50, (2, length)) for length in (6, 9)]
    table = calibrate(program, batches, progress=False)
    assert table.rounding["batches"].max() == 2
    assert {row["input"] for row in table.rounding.filter(pl.col("node") == "linear").to_dicts()} == {"mul"}
    assert rounding_gaps(table.rounding).height == 0


def test_an_operator_of_the_users_own_is_run(custom_operator: Callable[..., torch.Tensor]) -> None:
    """Without a gradient, what comes before it is measured by runs of single edges."""
    x = torch.randn(64, 4)
    table = assert_predicts(exported(lambda x: custom_operator((x * 0.3).exp()).sin(), x), x)
    assert noise(table, "exp", "mul")["method"] == "run"


@pytest.fixture
def custom_operator() -> Callable[..., torch.Tensor]:
    @torch.library.custom_op("calibcast_tests::halved", mutates_args=())
    def halved(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    @halved.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    return halved


def test_a_norm_without_a_gradient_of_its_statistics() -> None:
    """batch_norm refuses one where its statistics are computed; what comes before is known by that of its input."""
    x = torch.randn(256, 8) * 3 + 1
    program = exported(lambda x: F.batch_norm(x.sin(), x.mean(0) * 0.9, x.var(0) * 1.1), x)
    assert_predicts(program, x)


def test_a_recurrent_layer_and_a_cache() -> None:
    """What several outputs of one call do; a write at an index that is data."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(4, 8, batch_first=True)
            self.register_buffer("held", torch.zeros(2, 6, 8))

        def forward(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
            self.held[:, place] = self.layer(x)[0]
            return (self.held * 3).exp()

    x, place = torch.randn(2, 1, 4), torch.tensor([2])
    assert_predicts(export(Model().eval(), (x, place)), x, place, within=6.0)


def test_evidence_that_cannot_be_had_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges come all the same, each row says why, and random numbers and grad mode are put back."""
    from calibcast.calib import rounding_evidence

    def fail(*_: Any) -> None:
        torch.rand(5)
        raise MemoryError("no room")

    monkeypatch.setattr(rounding_evidence, "record", fail)
    x = torch.rand(4)
    program = exported(lambda x: x.exp(), x)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    table = measured(program, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert table.frame["absmax"].is_not_null().all()
    assert "no room" in rounding_gaps(table.rounding)["why_missing"][0]


def test_none_is_asked_for() -> None:
    x = torch.rand(4)
    table = measured(exported(lambda x: x.exp(), x), x, rounding_batches=0)
    assert table.rounding.height == 0
    assert dict(table.rounding.schema) == ROUNDING_SCHEMA


def test_tables_with_it_are_saved_merged_and_compared(tmp_path: Path) -> None:
    """Pooled means and the worst batch come out alike for shards and for the whole; old files load without."""
    batches = [torch.randn(32, 8, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(4)]
    program = exported(lambda x: (x * 30).sin(), batches[0])
    whole = calibrate(program, batches, progress=False)
    parts = [calibrate(program, part, progress=False) for part in (batches[:2], batches[2:])]
    merged = RangeTable.merge(parts)
    assert merged.rounding["batches"].to_list() == [4] * merged.rounding.height
    # New signs are drawn for each batch number, so the sums differ by the draw.
    assert merged.rounding["noise"].to_list() == pytest.approx(whole.rounding["noise"].to_list(), rel=0.5)
    assert merged.rounding["worst_batch"].max() == 3
    whole.save(tmp_path / "r.parquet")
    assert RangeTable.load(tmp_path / "r.parquet") == whole
    without = calibrate(program, batches[:1], progress=False, rounding_batches=0)
    without.save(tmp_path / "w.parquet")
    assert RangeTable.load(tmp_path / "w.parquet").rounding.height == 0
    assert RangeTable.merge([without, parts[0]]).rounding.height == whole.rounding.height
    difference = range_diff(whole, merged).rounding
    assert difference.height == whole.rounding.height
    assert difference["change_db"].abs().max() < 3


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    batches = [torch.randn(16, 4, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    program = exported(lambda x: (x * 30).sin(), batches[0])
    whole = calibrate(program, batches, progress=False)
    path = tmp_path / "c.npz"

    def killed() -> Any:
        yield from batches[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(program, killed(), progress=False, checkpoint=path, checkpoint_batches=1)
    assert calibrate(program, batches, progress=False, checkpoint=path).rounding.equals(whole.rounding)


def test_what_is_one_rounding_from_a_pole_makes_nan() -> None:
    """An angle that goes to 0 where a cosine is rounded to 1, and 0 / 0: no edge alone does it on these data."""
    cosines = torch.tensor([0.9, 0.5, 1 - 2.6e-4, 0.99])  # 1 and 0.99951 are next to each other in float16

    def ratio(x: torch.Tensor) -> torch.Tensor:
        angle = (x * 2).clamp(-1, 1).acos()
        return (0.3 * angle).sin() / angle.sin()

    table = measured(exported(ratio, cosines), cosines / 2)
    for node, source in (("mul", "inputs_0"), ("acos", "mul")):
        row = noise(table, node, source)
        assert (row["noise"], row["method"]) == (math.inf, "run")
    assert noise(table, "sin_1", "acos")["noise"] < 1e-6


def test_a_pole_that_nothing_reads_is_none() -> None:
    """What `where` throws away does no harm."""
    x = torch.tensor([0.9, 1 - 2.6e-4, 0.5, 0.7])

    def guarded(x: torch.Tensor) -> torch.Tensor:
        rest = 1 - x
        return torch.where(rest > 0.01, rest.log(), 0.0)

    table = measured(exported(guarded, x), x)
    assert table.rounding["noise"].is_finite().all()
    assert not measured(exported(lambda x: (1 - x).log(), x), x).rounding["noise"].is_finite().all()


@pytest.mark.parametrize("low_type", [torch.float16, torch.bfloat16])
def test_rounding_to_the_other_side(low_type: torch.dtype) -> None:
    """The value lies between the two; what the type holds stays."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=generator) * 10 ** (10 * torch.rand(4096, generator=generator) - 8)
    near, far = rounded(x, low_type), rounded_otherwise(x, low_type)
    assert ((near - x) * (far - x) <= 0).all()
    assert (near != far)[near != x].all()
    assert torch.equal(rounded_otherwise(near, low_type), near)


def test_a_tensor_and_its_own_largest_are_rounded_alike() -> None:
    """Which are below the third largest does not change; with one side rounded alone, the third itself would."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))

    def top(x: torch.Tensor) -> torch.Tensor:
        scores = x * 3
        return torch.where(scores < scores.topk(3)[0][:, -1:], -math.inf, scores).softmax(-1)

    table = measured(exported(top, x), x)
    assert table.rounding["noise"].max() < 1e-4
    assert table.rounding.filter(pl.col("node") == "topk")["method"].to_list() == ["gradient"] * 2


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (1, 3, 8, 8)])
def test_every_element_that_an_overflowing_bias_is_added_to_counts(shape: tuple[int, ...]) -> None:
    """Two of five channels have a bias that float16 does not hold: all their elements become Inf."""
    net = nn.Conv2d(3, 5, 3).eval()
    with torch.no_grad():
        net.bias.copy_(torch.tensor([0.1, 1e6, 0.2, -1e6, 0.3]))  # type: ignore[union-attr]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    table = measured(export(net, (x,)), x)
    row = noise(table, "conv2d", "p_bias")
    assert (row["nonfinite"], row["noise"]) == (2 * shape[0] * 6 * 6, math.inf)
    assert noise(table, "conv2d", "p_bias", "bfloat16")["nonfinite"] == 0


def test_a_weight_that_overflows_does_not_blame_the_other_weights() -> None:
    """The scale of one channel is beyond float16. The shift beside it is rounded harmlessly, as it is in bfloat16."""
    net = nn.LayerNorm(8).eval()
    with torch.no_grad():
        net.weight[3] = 1e5
        net.bias.copy_(torch.linspace(0.1, 0.9, 8))
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    table = measured(export(net, (x,)), x)
    scale, shift = noise(table, "layer_norm", "p_weight"), noise(table, "layer_norm", "p_bias")
    assert (scale["nonfinite"], scale["noise"]) == (64, math.inf)
    assert (shift["nonfinite"], shift["steps"], shift["method"]) == (0, 0, "run")
    alone = RoundedRunner(export(_with(net, "bias"), (x,)), [], torch.float16).run([x])[0]
    assert shift["noise"] == pytest.approx(float(channel_noise(alone, net(x)).mean()), rel=1e-3)


def _with(net: nn.LayerNorm, name: str) -> nn.LayerNorm:
    """A copy with one parameter rounded to float16."""
    made = nn.LayerNorm(net.normalized_shape).eval()
    made.load_state_dict(net.state_dict() | {name: getattr(net, name).detach().half().float()})
    return made


def test_a_part_that_overflows_does_not_blame_what_it_is_joined_with() -> None:
    """Six parts are joined, too many to round each apart; one is beyond float16."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))

    def joined(x: torch.Tensor) -> torch.Tensor:
        parts = [x.sin() * factor for factor in (1.0, 2.0, 3e5, 4.0, 5.0, 6.0)]
        return torch.cat(parts, -1) * 0.5

    table = measured(exported(joined, x), x)
    rows = table.rounding.filter(pl.col("node") == "mul_6", pl.col("low_precision_type") == "float16")
    beyond = int(((x.sin() * 3e5).abs() >= 65520).sum())
    assert rows["nonfinite"].to_list() == [0, 0, beyond, 0, 0, 0]
    assert rows["noise"].is_finite().to_list() == [True, True, False, True, True, True]


def test_a_number_that_a_norm_takes_out_makes_no_noise() -> None:
    """0.99^200 is 6% off and scales all elements alike, and the norm removes it: a run says that."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    program = exported(lambda x: F.layer_norm(x * 0.99 ** x.new_full((64, 32), 200.0), (32,)), x)
    row = noise(measured(program, x), "pow_1", "literal:self")
    assert row["method"] == "run"
    assert row["noise"] < 1e-6


def test_a_threshold_that_is_picked_counts_once() -> None:
    """Two scores become equal: that is an error of the comparison, which rounds both sides, and not of the choice."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    x[0, :4] = torch.tensor([3.001, 3.0011, 9.0, 8.0])

    def top(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x < x.topk(3)[0][:, -1:], -math.inf, x).softmax(-1)

    table = measured(exported(top, x), x)
    assert noise(table, "topk", "inputs_0")["noise"] == 0.0
    both = table.rounding.filter(pl.col("node") == "lt", pl.col("low_precision_type") == "float16")
    assert set(both["method"]) == {"run"}
    assert both["noise"].sum() > 1e-7


def test_the_error_of_one_number_adds_up() -> None:
    """0.99 becomes 0.9897 in float16. In a sum of 200 of its powers all errors have one sign: 31 dB, and not 49."""
    x = torch.rand(4, 200, generator=torch.Generator().manual_seed(0))

    def returns(x: torch.Tensor) -> torch.Tensor:
        return (x * 0.99 ** torch.arange(200.0)).flip(-1).cumsum(-1).flip(-1)

    program = exported(returns, x)
    row = noise(measured(program, x), "pow_1", "literal:self")
    number = float(torch.tensor(0.99).half())
    off = (x * number ** torch.arange(200.0)).flip(-1).cumsum(-1).flip(-1)
    assert row["noise"] == pytest.approx(float(channel_noise(off, returns(x)).mean()), rel=1e-3)
    assert row["method"] == "run"


def test_a_step_from_zero_leaves_the_local_error_a_number() -> None:
    """The exact floor is 0 everywhere and the rounded one is 1: the local SQNR was 0 times inf, which is NaN."""

    class Floor(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.floor(x * 3.0) + x

    program = torch.export.export(Floor(), (torch.full((8,), 0.3333),))
    rows = calibrate(program, [torch.full((8,), 0.33332)], progress=False).rounding
    assert not rows["local_sqnr_db"].is_nan().any()


def test_the_watch_on_poles_follows_paths_that_meet_again_once() -> None:
    """Without that, sixteen diamonds are 65,536 paths. Calls are counted, as seconds depend on the machine."""

    class Diamonds(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            d = x * 1.01
            for _ in range(16):
                d = torch.cat([d[:2], d.flip(0)[:2]])
            return 1 / d

    program = torch.export.export(Diamonds(), (torch.rand(4),))
    calls = 0
    perform = Call.perform

    def counted(self: Call, changed: Any) -> Any:
        nonlocal calls
        calls += 1
        return perform(self, changed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Call, "perform", counted)
        calibrate(program, [torch.rand(4) + 1], progress=False, rounding_batches=1)
    assert calls < 20_000


@pytest.mark.parametrize("scores", [1.0, math.nan])
def test_a_batch_leaves_nothing_in_memory(scores: float) -> None:
    """Without Python's collection of cycles: the activations of several batches would pile up until it runs."""

    def function(x: torch.Tensor) -> torch.Tensor:
        y = torch.softmax(x @ x.mT * scores, -1)
        return torch.round(y * 4) + y / x.sum(-1, keepdim=True).exp()

    program = exported(function, torch.randn(2, 41, 41))
    observer = RoundingObserver(ProgramRunner(program), 3)
    before = tensors_of(41)
    with paused():
        for index in range(3):
            observer.measure([torch.randn(2, 41, 41)], index, {})
        assert tensors_of(41) == before


def test_a_batch_that_fails_leaves_nothing_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    program = exported(lambda x: (x @ x.mT).exp().sum(-1), torch.randn(2, 43, 43))
    observer = RoundingObserver(ProgramRunner(program), 1)
    perform, calls = Call.perform, []

    def failing(self: Call, *given: Any) -> Any:
        calls.append(self)
        if len(calls) > 2:
            raise RuntimeError("no memory")
        return perform(self, *given)

    monkeypatch.setattr(Call, "perform", failing)
    before = tensors_of(43)
    with paused():
        observer.measure([torch.randn(2, 43, 43)], 0, {})
        calls.clear()
        assert tensors_of(43) == before
    assert rounding_gaps(observer.record.frame()).height


def tensors_of(size: int) -> int:
    """How many tensors there are whose last dimension has this size. Collects cycles unless that is switched off."""
    if gc.isenabled():
        gc.collect()
    plain = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.layout == torch.strided and not t.is_nested]
    return sum(t.shape[-1:] == (size,) for t in plain)
