"""The laws of cast insertion (conftest.py), held on random small programs under random plans.

A program is drawn as data: a list of steps, each an entry of `STEPS` with the tensors that it works on. A plan is
drawn as an integer: bit i says whether the i-th node that a plan may decide on is low.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

BATCH, ROWS, WIDTH, WORDS = 3, 4, 8, 16


@dataclass(frozen=True)
class Step:
    """One step of a random program: `op` on the float tensors number `a` and `b` of those there are, modulo."""

    op: str
    a: int
    b: int


@dataclass
class Values:
    """What a random program has computed so far. All of `floats` are fp32 [batch, 4, 8]."""

    floats: list[torch.Tensor]
    ids: torch.Tensor  # int64 [batch, 4]
    mask: torch.Tensor  # bool [batch, 4, 1]
    extras: list[torch.Tensor]


class Layers(nn.Module):
    """Weights of all kinds for the steps to use; `tied` shares its weight with `linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.tied = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.linear.weight
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm, self.batch_norm = nn.LayerNorm(WIDTH), nn.BatchNorm1d(ROWS)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))
        self.register_buffer("running", torch.full((WIDTH,), 0.5))
        self.register_buffer("table", torch.randn(WORDS, WIDTH), persistent=False)


def _pure(function: Callable[..., torch.Tensor]) -> Callable[..., None]:
    """A step that appends what `function(layers, a, b)` gives."""

    def step(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
        values.floats.append(function(layers, a, b))

    return step


def _attention(_: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(a, b, b)


def _split_cat(_: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    first, second = a.split(WIDTH // 2, -1)
    return torch.cat([second, b[..., : WIDTH // 2], first], -1)[..., :WIDTH]


def _cpu_region(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layers.linear(a) + b
    return inside.float()


def _cuda_region(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", dtype=torch.float32):
        return layers.tied(a) * 0.5


def _no_grad_region(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        inside = layers.linear(a) - b
    return inside


def _nested_region(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        inside = torch.tanh(a)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product = layers.linear(inside)
        return product.float() + b


def _conv(layers: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return layers.conv(a.transpose(1, 2)).transpose(1, 2)


def _matmul(_: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.matmul(torch.tanh(torch.matmul(a, b.transpose(1, 2)) * 0.1), a)


def _stack(_: Layers, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.stack([row * 0.5 for row in a.unbind(1)], 1)


PURE: dict[str, Callable[[Layers, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "relu": lambda m, a, b: torch.relu(a),
    "tanh": lambda m, a, b: torch.tanh(a),
    "gelu": lambda m, a, b: F.gelu(a),
    "add": lambda m, a, b: a + b,
    "shift": lambda m, a, b: a + 1.5,
    "gate": lambda m, a, b: a * torch.sigmoid(b),
    "divide": lambda m, a, b: a / (1 + b.abs()),
    "clamp": lambda m, a, b: a.clamp(-2, 2),
    "maximum": lambda m, a, b: torch.maximum(a, b),
    "linear": lambda m, a, b: m.linear(a),
    "tied": lambda m, a, b: m.tied(a),
    "conv": _conv,
    "matmul": _matmul,
    "attention": _attention,
    "softmax": lambda m, a, b: torch.softmax(a, -1),
    "layer_norm": lambda m, a, b: m.norm(a),
    "batch_norm": lambda m, a, b: m.batch_norm(a),
    "mean": lambda m, a, b: a.mean(-1, keepdim=True) + b,
    "sum_dtype": lambda m, a, b: a.sum(-1, keepdim=True, dtype=torch.float32) * 0.1 + b,
    "softmax_dtype": lambda m, a, b: torch.softmax(a, -1, dtype=torch.float32),
    "scale": lambda m, a, b: a * m.scale,
    "view": lambda m, a, b: a.reshape(-1, ROWS * WIDTH).relu().view(-1, ROWS, WIDTH),
    "permute": lambda m, a, b: (a.permute(2, 0, 1) * 0.5).permute(1, 2, 0),
    "slice_cat": lambda m, a, b: torch.cat([a[:, :1], b[:, 1:]], 1),
    "split_cat": _split_cat,
    "stack": _stack,
    "expand": lambda m, a, b: a[:, :1].expand(-1, ROWS, -1) + b,
    "flip": lambda m, a, b: a.flip(1),
    "clone": lambda m, a, b: a.clone(),
    "zeros": lambda m, a, b: a + torch.zeros(WIDTH),
    "arange": lambda m, a, b: a * torch.arange(1.0, WIDTH + 1) * 0.2,
    "full": lambda m, a, b: a + torch.full((ROWS, 1), 0.25, dtype=torch.float32),
    "zeros_like": lambda m, a, b: torch.zeros_like(a) + b,
    "new_ones": lambda m, a, b: a.new_ones(WIDTH) + b,
    "full_like_dtype": lambda m, a, b: torch.full_like(a, 0.5, dtype=torch.float32) * b,
    "int_arange": lambda m, a, b: a + torch.arange(WIDTH) * 0.1,
    "to_half": lambda m, a, b: a.to(torch.float16).to(torch.float32),
    "half_math": lambda m, a, b: (a.half() * 2).float() + b,
    "to_float": lambda m, a, b: a.to(torch.float32) + b,
    "type_as": lambda m, a, b: a.type_as(b) * 0.5,
    "double": lambda m, a, b: a.double().mul(0.5).float(),
    "cpu_region": _cpu_region,
    "cuda_region": _cuda_region,
    "no_grad_region": _no_grad_region,
    "nested_region": _nested_region,
}


def _embedding(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(layers.embedding(values.ids) + a * 0.1)


def _table(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(layers.table[values.ids] + a * 0.1)


def _where(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(torch.where(values.mask, a, b))


def _masked_fill(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(torch.softmax(a.masked_fill(values.mask, -100.0), 1))


def _integers(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.ids = (values.ids + 3) % WORDS
    values.extras.append(values.ids)


def _both_masks(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.mask = values.mask & (values.ids < WORDS // 2).unsqueeze(-1)
    values.extras.append(values.mask)


MIXED = {
    "embedding": _embedding,
    "table": _table,
    "where": _where,
    "masked_fill": _masked_fill,
    "integers": _integers,
    "both_masks": _both_masks,
}


def _topk(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    found, positions = a.topk(WIDTH, -1)
    values.floats.append(found * 0.5)
    values.extras.append(positions)


def _max(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    most, _ = a.max(-1, keepdim=True)
    values.floats.append(most + b)


def _compare(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.mask = (a > b).any(-1, keepdim=True)


def _to_ids(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.ids = (a.sum(-1) * 4).to(torch.int64) % WORDS


# Steps that turn a rounding into another integer or branch: numbers after them are not close, types still are.
JUMPING = {"topk": _topk, "max": _max, "compare": _compare, "to_ids": _to_ids}


def _write(function: Callable[..., Any]) -> Callable[..., None]:
    """A step that writes into `a` in place and goes on with it."""

    def step(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
        function(layers, values, a, b)

    return step


def _buffer(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    layers.running.mul_(0.5).add_(a.mean((0, 1)))
    values.floats.append(b + layers.running)


def _fresh_relu(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(torch.relu_(layers.linear(a)))


def _alias(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    values.floats.append(a.view(-1, ROWS, WIDTH))


def _assign(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    a[:, 1] = b[:, 0] * 2


def _fresh_zeros(layers: Layers, values: Values, a: torch.Tensor, b: torch.Tensor) -> None:
    canvas = torch.zeros(ROWS, WIDTH)
    canvas[1] = a[0, 0]
    values.floats.append(b + canvas)


WRITES: dict[str, Callable[..., Any]] = {
    "relu_": lambda m, v, a, b: a.relu_(),
    "add_": lambda m, v, a, b: a.add_(b),
    "add_one_": lambda m, v, a, b: a.add_(1.0),
    "masked_fill_": lambda m, v, a, b: a.masked_fill_(v.mask, 0.5),
    "write_slice": lambda m, v, a, b: a[:, :2].add_(1),
    "write_transposed": lambda m, v, a, b: a.transpose(1, 2).mul_(0.5),
    "copy_": lambda m, v, a, b: a.copy_(b),
    "assign": _assign,
    "buffer": _buffer,
    "fresh_relu": _fresh_relu,
    "alias": _alias,
    "fresh_zeros": _fresh_zeros,
}

STEPS: dict[str, Callable[..., None]] = {
    **{name: _pure(function) for name, function in PURE.items()},
    **MIXED,
    **JUMPING,
    **{name: _write(function) for name, function in WRITES.items()},
}


@dataclass(frozen=True)
class Recipe:
    """A random program, as data."""

    steps: tuple[Step, ...]
    dynamic: bool = False


class RandomModel(Layers):
    """Carries out a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self._steps = recipe.steps

    def forward(self, input: torch.Tensor, y: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        values = Values([input, y * 0.5], ids, mask, [])
        for step in self._steps:
            floats = values.floats
            STEPS[step.op](self, values, floats[step.a % len(floats)], floats[step.b % len(floats)])
        return {"last": values.floats[-1], "some": tuple(values.floats[2:5]), "extras": values.extras}


def inputs_of(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Inputs of a random model, of order 1."""
    g = torch.Generator().manual_seed(seed)
    shape = (BATCH, ROWS, WIDTH)
    return (
        torch.randn(shape, generator=g),
        torch.randn(shape, generator=g) + 0.5,
        torch.randint(WORDS, shape[:2], generator=g),
        torch.rand((BATCH, ROWS, 1), generator=g) > 0.7,
    )


def exported(recipe: Recipe) -> ExportedProgram:
    """The program of a recipe, with fixed weights."""
    torch.manual_seed(0)
    batch = {0: Dim("batch", min=2, max=64)} if recipe.dynamic else None
    return torch.export.export(RandomModel(recipe).eval(), inputs_of(), dynamic_shapes=(batch,) * 4)


STEP = st.builds(Step, st.sampled_from(sorted(STEPS)), st.integers(0, 5), st.integers(0, 5))
RECIPE = st.builds(Recipe, st.lists(STEP, min_size=1, max_size=7).map(tuple), st.booleans())
COINS = st.one_of(st.integers(0, 2**48 - 1), st.just(-1))  # -1: all low
LOW_TYPE = st.sampled_from([torch.float16, torch.bfloat16])
RELAXED = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="session")
def drawn(plan_of: Callable[..., Any], case_of: Callable[..., Any]) -> Callable[..., Any]:
    """drawn(recipe, coins, low_type): the case of these draws. Kept, as every law is asked of the same cases."""

    @cache
    def drawn(recipe: Recipe, coins: int, low_type: torch.dtype) -> Any:
        program = exported(recipe)
        smooth = not any(step.op in JUMPING for step in recipe.steps)
        plan = plan_of(program, lambda i: bool(coins >> i & 1), low_type)
        return case_of(program, plan, inputs_of(), smooth)

    return drawn


@seed(0)
@settings(RELAXED, max_examples=80)
@given(recipe=RECIPE, coins=COINS, low_type=LOW_TYPE)
def test_random_programs_under_random_plans(
    drawn: Callable[..., Any], law: Callable[[Any], None], recipe: Recipe, coins: int, low_type: torch.dtype
) -> None:
    """Every law holds; hypothesis draws the same cases for each, so that they are exported once."""
    law(drawn(recipe, coins, low_type))


@pytest.mark.parametrize("op", sorted(STEPS))
def test_every_step_alone_in_fp16(drawn: Callable[..., Any], laws: tuple[Callable[[Any], None], ...], op: str) -> None:
    """Every law holds for each step between two others, all low."""
    case = drawn(Recipe((Step("scale", 0, 1), Step(op, 2, 1), Step("gate", 2, 3))), -1, torch.float16)
    for law in laws:
        law(case)


@pytest.mark.slow
@seed(1)
@settings(RELAXED, max_examples=800)
@given(recipe=RECIPE, coins=COINS, low_type=LOW_TYPE)
def test_many_random_programs(
    drawn: Callable[..., Any],
    laws: tuple[Callable[[Any], None], ...],
    recipe: Recipe,
    coins: int,
    low_type: torch.dtype,
) -> None:
    """Every law holds on many more cases than the default run has time for."""
    case = drawn.__wrapped__(recipe, coins, low_type)
    for law in laws:
        law(case)
