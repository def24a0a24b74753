"""Random programs, drawn as data: a list of steps, each an entry of `STEPS` with the tensors that it works on."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from calibcast.engines.lstm_states import right_lstm_states
from torch.export import Dim, ExportedProgram

from benchmarks.fuzz.masks import INTEGERS, JUMPING, MASKS
from benchmarks.fuzz.regions import REGIONS
from benchmarks.fuzz.steps import BATCH, PURE, ROWS, WIDTH, WORDS, Layers, Values, pure
from benchmarks.fuzz.steps import Step as Function
from benchmarks.fuzz.writes import WRITES

KINDS: dict[str, Mapping[str, Function]] = {
    "pure": {name: pure(function) for name, function in PURE.items()},
    "regions": REGIONS,
    "masks": MASKS,
    "integers": INTEGERS,
    "jumping": JUMPING,
    "writes": WRITES,
}
STEPS: dict[str, Function] = {name: step for steps in KINDS.values() for name, step in steps.items()}


NAMES = ("input", "y", "ids", "mask")


@dataclass(frozen=True)
class Step:
    """One step of a random program: `op` on the float tensors number `a` and `b` of those there are, modulo."""

    op: str
    a: int
    b: int


@dataclass(frozen=True)
class Recipe:
    """A random program, as data. dynamic: its batch dimension is; keywords: ids and mask come by name."""

    steps: tuple[Step, ...]
    dynamic: bool = False
    keywords: bool = False

    @property
    def smooth(self) -> bool:
        """Whether no rounding turns into another integer or branch."""
        return not any(step.op in JUMPING for step in self.steps)


class RandomModel(Layers):
    """Carries out a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self._steps = recipe.steps

    def forward(self, input: torch.Tensor, y: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        values = Values([input, y * 0.5], ids, mask)
        for step in self._steps:
            floats = values.floats
            STEPS[step.op](self, values, floats[step.a % len(floats)], floats[step.b % len(floats)])
        return {"last": values.floats[-1], "some": tuple(values.floats[2:5]), "extras": values.extras}


def inputs_of(seed: int = 0, batch: int = BATCH) -> tuple[torch.Tensor, ...]:
    """Inputs of a random model, of order 1."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, ROWS, WIDTH)
    return (
        torch.randn(shape, generator=g),
        torch.randn(shape, generator=g) + 0.5,
        torch.randint(WORDS, shape[:2], generator=g),
        torch.rand((batch, ROWS, 1), generator=g) > 0.7,
    )


def exported(recipe: Recipe) -> ExportedProgram:
    """The program of a recipe, with fixed weights."""
    with right_lstm_states():
        return _exported(recipe)


def _exported(recipe: Recipe) -> ExportedProgram:
    torch.manual_seed(0)
    model, inputs = RandomModel(recipe).eval(), inputs_of()
    batch = {0: Dim("batch", min=2, max=64)} if recipe.dynamic else None
    if not recipe.keywords:
        return torch.export.export(model, inputs, dynamic_shapes=(batch,) * 4)
    named = dict(zip(NAMES[2:], inputs[2:], strict=True))
    shapes = dict.fromkeys(NAMES, batch)
    return torch.export.export(model, inputs[:2], named, dynamic_shapes=shapes)


@dataclass(frozen=True)
class Draw:
    """A random program and a random plan of it: bit i of `coins` says whether the i-th decided node is low.

    coins: -1 makes all low; None asks calibration on the inputs and `classify`.
    """

    recipe: Recipe
    coins: int | None
    low_type: torch.dtype

    def without(self, position: int) -> Draw:
        """The same without one step."""
        steps = self.recipe.steps
        return replace(self, recipe=replace(self.recipe, steps=steps[:position] + steps[position + 1 :]))

    def __str__(self) -> str:
        steps = ", ".join(f"Step({s.op!r}, {s.a}, {s.b})" for s in self.recipe.steps)
        flags = f"dynamic={self.recipe.dynamic}, keywords={self.recipe.keywords}"
        return f"Draw(Recipe(({steps},), {flags}), {self.coins}, {self.low_type})"


def drawn(seed: int, number: int, most_steps: int = 10) -> Draw:
    """The draw with this number of this seed: kinds of steps are equally likely, then the steps of a kind."""
    rng = random.Random(f"{seed}/{number}")
    steps = []
    for _ in range(rng.randint(2, most_steps)):
        kind = rng.choice(sorted(KINDS))
        steps.append(Step(rng.choice(sorted(KINDS[kind])), rng.randrange(6), rng.randrange(6)))
    recipe = Recipe(tuple(steps), dynamic=rng.random() < 0.5, keywords=rng.random() < 0.3)
    coins = rng.choice([None, -1, rng.getrandbits(64), rng.getrandbits(64)])
    return Draw(recipe, coins, rng.choice([torch.float16, torch.bfloat16]))
