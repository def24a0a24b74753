"""Evidence of rounding where every number can be worked out: one layer alone, whose gradient is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import polars as pl
import pytest
import torch
from calibcast.calib import RangeTable, calibrate
from calibcast.calib.output_noise import channel_power
from calibcast.calib.rounding_findings import Found
from calibcast.calib.rounding_ledger import noise_energy
from calibcast.calib.rounding_runs import MeasuredGroup, Runs, take_finite
from calibcast.calib.rounding_sweep import channel_norms
from torch import nn

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(64, 8, generator=GENERATOR)
IMAGE = torch.randn(2, 3, 8, 8, generator=GENERATOR)


def random(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=GENERATOR))


class Layer(nn.Module):
    def __init__(self, function: Callable[..., Any], weight: tuple[int, ...], bias: int) -> None:
        super().__init__()
        self.w, self.b, self.function = random(*weight), random(bias), function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, self.w, self.b)


def measured(layer: nn.Module, *batches: torch.Tensor) -> RangeTable:
    return calibrate(torch.export.export(layer.eval(), batches[:1]), list(batches), progress=False)


def row(table: RangeTable, node: str, source: str) -> dict[str, Any]:
    found = table.rounding.filter(
        (pl.col("node") == node) & (pl.col("input") == source) & (pl.col("low_precision_type") == "float16")
    )
    return found.row(0, named=True)


def half(x: torch.Tensor) -> torch.Tensor:
    return x.detach().half().float()


LAYERS: dict[str, tuple[Callable[..., Any], tuple[int, ...], int, torch.Tensor]] = {
    "linear": (nn.functional.linear, (4, 8), 4, X),
    "conv2d": (nn.functional.conv2d, (4, 3, 3, 3), 4, IMAGE),
    "conv_transpose2d": (nn.functional.conv_transpose2d, (3, 4, 2, 2), 4, IMAGE),
}


@pytest.mark.parametrize("behind", ["nothing", "product"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_bias_adds_its_error_to_every_element(name: str, behind: str) -> None:
    """Also where the results of all elements are multiplied by 3 behind it: then noise and signal are."""
    function, weight, bias, x = LAYERS[name]
    times = 3.0 if behind == "product" else 1.0
    layer = Layer(lambda x, w, b: function(x, w, b) * times if times != 1 else function(x, w, b), weight, bias)
    table = measured(layer, x)
    with torch.no_grad():
        y = layer(x).double()
    node = next(one for one in table.rounding["node"].unique() if one.startswith(name[:4]))
    found = row(table, node, "p_b")
    channels = y.movedim(1, 0).flatten(1)
    error = (half(layer.b) - layer.b.detach()).double() * times
    each = channels.shape[1] * error.square()
    assert found["noise"] == pytest.approx(float((each / channel_power(y.float())).mean()), rel=1e-4)
    assert found["local_sqnr_db"] == pytest.approx(
        -10 * math.log10(float(each.sum() / channels.square().sum())), rel=1e-5
    )
    assert (found["nonfinite"], found["steps"], found["method"]) == (0, 0, "gradient")
    # The tensor itself, computed anew with it rounded.
    with torch.no_grad():
        rounded = function(half(x), layer.w, layer.b).double() * times - y
    found = row(table, node, "x")
    noise = rounded.movedim(1, 0).flatten(1).square().sum(1)
    assert found["noise"] == pytest.approx(float((noise / channel_power(y.float())).mean()), rel=1e-3)
    assert found["local_sqnr_db"] == pytest.approx(
        -10 * math.log10(float(noise.sum() / channels.square().sum())), rel=1e-4
    )


@pytest.mark.parametrize(
    ("product", "coherent", "noise"),
    [
        ([[1.0, 2.0], [3.0, -4.0]], False, 30.0),
        ([[1.0, 2.0], [3.0, -4.0]], True, 30.0),  # slices 3 and -1: 10, and 4 over all; never below the squares
        ([[1.0, 2.0], [3.0, 4.0]], True, 100.0),  # (3 + 7)^2
        ([[1.0, 2.0], [-3.0, -4.0]], True, 58.0),  # 3^2 + 7^2
        ([1.0, 2.0, 3.0], True, 36.0),
        ([1.0, 2.0, -3.0], True, 14.0),
        ([[[1.0], [2.0]], [[3.0], [4.0]]], True, 100.0),
    ],
)
def test_errors_of_one_number_add_up(product: Any, coherent: bool, noise: float) -> None:
    assert float(noise_energy(torch.tensor(product), coherent)) == noise


def test_errors_without_dimensions_or_of_complex_numbers_do_not_add_up() -> None:
    assert float(noise_energy(torch.tensor(3.0), True)) == 9.0
    assert float(noise_energy(torch.tensor([1 + 2j, 3 + 4j]), True)) == 30.0


def runs(**known: Any) -> Any:
    made = Runs.__new__(Runs)
    made._found, made._columns = {}, 1
    for name, value in known.items():
        setattr(made, f"_{name}", value)
    return made


def entry(name: str, noise: float = 0.0) -> Any:
    call, group = SimpleNamespace(name=name), SimpleNamespace(edges=(name,))
    return MeasuredGroup(cast(Any, call), cast(Any, group), torch.float16, Found([noise]))


@pytest.mark.parametrize(("seed", "first"), [(0, "a"), (1, "b"), (2, "c"), (3, "d"), (4, "a"), (6, "c")])
def test_each_batch_begins_to_run_at_another_quarter(seed: int, first: str) -> None:
    ran: list[str] = []
    made = runs(seed=seed, size=1)
    made._run_rounded = lambda one: ran.append(one.call.name) or 0
    made._run_waiting([entry(name) for name in "abcd"])
    assert ran[0] == first
    assert sorted(ran) == list("abcd")
    ran.clear()
    made._run_waiting([entry(name) for name in "abcdefgh"])
    assert ran[0] == "aceg"[seed % 4]


@pytest.mark.parametrize(("cost", "made"), [(0, 20), (10, 20), (11, 19), (15, 16), (1000, 16)])
def test_runs_may_cost_two_forward_passes_and_sixteen_are_always_made(cost: int, made: int) -> None:
    """A forward pass computes 100 elements."""
    ran: list[str] = []
    one = runs(seed=0, size=100)
    one._run_rounded = lambda one: ran.append(one.call.name) or cost
    one._run_waiting([entry(f"n{number}") for number in range(20)])
    assert ran == [f"n{number}" for number in range(made)]
    assert set(one._found.values()) <= {"it needs runs of its own, and more edges do than are run"}
    assert [edge for edge, _ in one._found] == [f"n{number}" for number in range(made, 20)]


def test_a_run_that_fails_is_told_and_the_next_is_made() -> None:
    def run(one: Any) -> int:
        if one.call.name == "b":
            raise RuntimeError("no kernel\nfor this")
        return 0

    one = runs(seed=0, size=100)
    one._run_rounded = run
    one._run_waiting([entry(name) for name in "abc"])
    assert one._found == {("b", torch.float16): "the program cannot be run with it rounded: no kernel"}


@pytest.mark.parametrize(
    ("noise", "cost", "ran"),
    [
        ([3e-6, 5e-6, 4e-6], 0, ["n1", "n2", "n0"]),  # the loudest first
        ([3e-6, 1e-6, 0.9e-6], 0, ["n0"]),
        ([3e-6, math.inf, 4e-6], 0, []),  # known to be lost, as the loudest is
        ([3e-6, 5e-6, 4e-6], 49, ["n1", "n2"]),
        ([3e-6, 5e-6, 4e-6], 50, ["n1"]),
    ],
)
def test_loud_numbers_are_run_for_half_a_forward_pass(noise: list[float], cost: int, ran: list[str]) -> None:
    done: list[str] = []
    one = runs(size=100)
    one._run_rounded = lambda one: done.append(one.call.name) or cost
    one._run_numbers([entry(f"n{i}", part) for i, part in enumerate(noise)], 1e-6)
    assert done == ran


def test_a_number_that_cannot_be_run_keeps_its_estimate() -> None:
    def run(one: Any) -> int:
        done.append(one.call.name)
        raise RuntimeError("no kernel")

    done: list[str] = []
    one = runs(size=100)
    one._run_rounded = run
    one._run_numbers([entry("a", 2e-6), entry("b", 3e-6)], 1e-6)
    assert (done, one._found) == (["b", "a"], {})


def test_integers_that_change_count_like_an_amplitude_where_outputs_are_not_told_apart() -> None:
    outputs = [SimpleNamespace(differentiable=True), None, SimpleNamespace(differentiable=False)]
    noise = [0.25, 9.0, 0.5]
    together, apart = Found([0.0]), Found([0.0, 0.0])
    runs(tape=SimpleNamespace(outputs=outputs))._note_run(together, noise)
    assert (together.noise, together.ran) == ([0.25 + 0.5**2], True)
    runs(tape=SimpleNamespace(outputs=outputs), columns=2)._note_run(apart, noise)
    assert (apart.noise, apart.ran) == ([0.25, 0.5], True)


def test_what_is_not_finite_in_float32_is_left_out() -> None:
    value: Any = SimpleNamespace(tensor=torch.tensor([1.0, math.inf, 2.0, math.nan]))
    grads = {0: torch.tensor([2.0, 1.0, 3.0, 1.0])}
    found = Found([0.5])
    take_finite(found, torch.tensor([1.5, 0.0, 2.0, 1.0]), value, grads)
    assert (found.noise, found.local, found.nonfinite) == ([0.5 + 1.0], 0.25 / 5, 0)
    take_finite(found, torch.tensor([math.nan, 0.0, math.inf, 1.0]), value, grads)
    assert (found.noise, found.local, found.nonfinite) == ([math.inf], 0.25 / 5, 2)
    quiet = Found([0.0])
    take_finite(quiet, torch.tensor([1.5, 0.0, 2.0, 1.0]), value, {}, counts=False)
    assert (quiet.noise, quiet.local) == ([0.0], 0.0)
    zero: Any = SimpleNamespace(tensor=torch.tensor([0.0, math.nan]))
    for made, local in ((0.0, 0.0), (1.0, math.inf)):
        none = Found([0.0])
        take_finite(none, torch.tensor([made, 1.0]), zero, cast(Any, {}))
        assert none.local == local


def test_what_is_not_finite_is_no_signal() -> None:
    """A mask of -inf leaves the signal of the scores that it is added to."""
    mask = torch.full((8, 8), -math.inf).triu(1)
    layer = Layer(lambda x, w, b: torch.softmax(x @ w + b + mask, -1), (8, 8), 8)
    found = row(measured(layer, X[:8]), "add_1", "add")
    with torch.no_grad():
        scores = X[:8] @ layer.w + layer.b
    seen = torch.isfinite(mask)
    noise, signal = (half(scores) - scores)[seen].square().sum(), scores[seen].square().sum()
    assert found["local_sqnr_db"] == pytest.approx(-10 * math.log10(float(noise / signal)), rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "along"), [((5,), 0), ((3, 5), 1), ((3, 5), 0), ((2, 5, 4), 1), ((2, 3, 4, 4), 1), ((1, 3, 4, 4), 1)]
)
@pytest.mark.parametrize("permuted", [False, True])
def test_the_norms_of_channels(shape: tuple[int, ...], along: int, permuted: bool) -> None:
    tensor = torch.randn(shape, generator=GENERATOR)
    if permuted:
        tensor = tensor.movedim(along, -1).contiguous().movedim(-1, along)
    wanted = tensor.movedim(along, 0).reshape(shape[along], -1).norm(dim=1)
    torch.testing.assert_close(channel_norms(tensor, along), wanted)
