"""Run plans on batches, compare each with the program's own results, and find where it goes wrong."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from calibcast.calib.batches import numbered, signature_of
from calibcast.calib.errors import BatchError, first_line
from calibcast.calib.execution import ProgramRunner, Watch
from calibcast.calib.operators.operator import Operator
from calibcast.calib.output_noise import channel_noise
from calibcast.calib.plain_tensors import readable
from calibcast.calib.random_draws import Draws
from calibcast.calib.replayed_runner import ReplayedRunner
from calibcast.calib.rounding_edges import Edge
from calibcast.calib.rounding_evidence import RoundingObserver
from calibcast.passes.emulation import emulated
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.proof import Proof
from calibcast.passes.rounding_plan import decibels
from calibcast.passes.tensor_errors import most_changed
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

_log = logging.getLogger("calibcast")
# Batches that are also run with doubled inputs: enough to see what grows, for at most two forward passes a batch.
MOST_DOUBLED = 2
# Smaller relative differences are none of steps: bfloat16 moves a number by up to 2^-9; of the largest element, where
# there are slopes.
_A_STEP, _A_JUMP = 2.0**-7, 0.25
# Steps are to blame where a run has less than this share of its noise once they are held.
_BLAMED = 0.5


@dataclass(frozen=True)
class Worst:
    """The worst that one kind of run has shown. noise: of one channel of an output, as `channel_noise` gives it. mean:
    of all channels of that output in that batch.
    """

    noise: float = 0.0
    batch: int | None = None
    output: int | None = None
    channel: int | None = None
    mean: float = 0.0


@dataclass
class _Seen:
    """What has been seen of a plan so far."""

    worst: Worst = Worst()
    outputs: dict[int, float] = field(default_factory=dict)
    integers: dict[int, tuple[int, int]] = field(default_factory=dict)  # by output: elements changed, elements in all
    nonfinite: int = 0
    bad: Batch | None = None  # the first batch with an element that is newly non-finite
    runs: int = 0

    @property
    def changed(self) -> float:
        """The largest share of an integer output that differed. All batches count together: in few elements one
        difference is chance."""
        return max((changed / total for changed, total in self.integers.values()), default=0.0)

    def take(self, ours: Sequence[Any], theirs: Sequence[Any], batch: Batch) -> None:
        self.runs += 1
        for output, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if isinstance(other, torch.Tensor) and other.numel():
                self._take(output, readable(mine), readable(other), batch)

    def _take(self, output: int, ours: torch.Tensor, theirs: torch.Tensor, batch: Batch) -> None:
        if not (theirs.is_floating_point() or theirs.is_complex()):
            changed, total = self.integers.get(output, (0, 0))
            self.integers[output] = changed + int((ours != theirs).sum()), total + theirs.numel()
            return
        lost = int((~ours.isfinite() & theirs.isfinite()).sum())
        self.nonfinite += lost
        if lost and self.bad is None:
            self.bad = batch
        noises = channel_noise(ours, theirs)
        channel = int(noises.argmax())
        noise = float(noises[channel])
        self.outputs[output] = max(self.outputs.get(output, 0.0), noise)
        if noise > self.worst.noise or self.worst.batch is None:
            self.worst = Worst(noise, batch.index, output, channel if len(noises) > 1 else None, float(noises.mean()))


@dataclass(frozen=True)
class Batch:
    """Flat inputs, and what the program gives for them. begins: whether a new sequence begins here."""

    index: int
    flat: list[Any] = field(repr=False)
    results: list[Any] = field(repr=False)
    doubled: bool = False
    begins: bool = False


@dataclass(frozen=True)
class Outcome:
    """What running one plan has shown.

    outputs: the least SQNR by place of an output. bad: the first batch in which something is newly non-finite.
    carry_state: whether each batch went on from what the one before left in the buffers.
    """

    plan: PrecisionPlan = field(repr=False)
    worst: Worst
    doubled: Worst
    outputs: dict[int, float]
    changed: float
    nonfinite: int
    bad: Batch | None = field(repr=False)
    batches: int
    carry_state: bool = False

    @property
    def sqnr_db(self) -> float:
        """The least SQNR, dB, also with inputs times two."""
        return decibels(max(self.worst.noise, self.doubled.noise))

    @property
    def worst_place(self) -> Worst:
        """Where that is."""
        return self.doubled if self.doubled.noise > self.worst.noise else self.worst

    def meets(self, min_sqnr_db: float) -> bool:
        """Whether it is within the budget: SQNR, nothing newly non-finite, and few enough integers changed."""
        return self.sqnr_db >= min_sqnr_db and not self.nonfinite and self.changed <= most_changed(min_sqnr_db)

    def proof(self, min_sqnr_db: float, runs: int, relaxing_runs: int = 0) -> Proof:
        """The proof that the plan stores."""
        return Proof(
            min_sqnr_db, decibels(self.worst.noise), self.worst.batch, self.worst.output, self.worst.channel,
            decibels(self.doubled.noise), tuple(self.outputs.values()), self.changed, self.nonfinite, self.batches,
            runs, self.carry_state, tuple(self.outputs), relaxing_runs,
        )  # fmt: skip


class Proving:
    """Batches and the program's results for them, with which runs of plans are compared. All stay in memory.

    carry_state: program and plan each run the batches as a sequence, so that a plan's errors add up, until a batch is a
    `NewSequence`. The batches with inputs times two are a sequence of their own.
    """

    def __init__(
        self,
        program: ExportedProgram,
        dataloader: Iterable[Any],
        transform: Callable[[Any], Any] | None = None,
        max_batches: int | None = 8,
        device: torch.device | str | None = None,
        carry_state: bool = False,
    ) -> None:
        """Raises BatchError as `calibrate` does."""
        self.program, self._device, self._carry_state = program, device, carry_state
        self.runner = ProgramRunner(program, device, carry_state=carry_state)
        self._draws = Draws.of(program)
        self.batches: list[Batch] = []
        for index, _, flat in numbered(dataloader, signature_of(program), transform, max_batches):
            self.batches.append(self._batch(index, flat, flat.begins or not index))
        self.doubled = [double for batch in self.batches[:MOST_DOUBLED] if (double := self._double(batch)) is not None]
        self._worst = Counter[tuple[int | None, bool]]()  # how often a batch was the worst of a run

    def run(self, plan: PrecisionPlan, least_db: float | None = None) -> Outcome:
        """One emulated run of every batch, and of some with inputs times two.

        least_db: end with the first batch that has less. What was the worst before is run first.
        """
        seen, twice = _Seen(), _Seen()
        runner = ReplayedRunner(self._emulated(plan))
        for batch in [*self.batches, *self.doubled] if least_db is None else self._worst_first():
            into = twice if batch.doubled else seen
            into.take(self._ran(runner, batch), batch.results, batch)
            if least_db is not None and (into.nonfinite or decibels(into.worst.noise) < least_db):
                break
        most = max(seen.worst, twice.worst, key=lambda worst: worst.noise)
        self._worst[most.batch, most is twice.worst] += 1
        outputs = {place: decibels(noise) for place, noise in sorted(seen.outputs.items())}
        changed, lost = max(seen.changed, twice.changed), seen.nonfinite + twice.nonfinite
        bad = seen.bad or twice.bad
        return Outcome(plan, seen.worst, twice.worst, outputs, changed, lost, bad, seen.runs, self._carry_state)

    def _worst_first(self) -> list[Batch]:
        """All batches; where they are a sequence, in its order."""
        batches = [*self.batches, *self.doubled]
        return batches if self._carry_state else sorted(batches, key=lambda b: -self._worst[b.index, b.doubled])

    def worst_batch(self, outcome: Outcome) -> Batch:
        """The batch with the worst result of a run."""
        twice = outcome.doubled.noise > outcome.worst.noise
        index, among = (outcome.doubled.batch, self.doubled) if twice else (outcome.worst.batch, self.batches)
        return next((batch for batch in among if batch.index == index), among[0])

    def noise_at_worst(self, outcome: Outcome) -> dict[torch.dtype, dict[Edge, float]] | None:
        """What each edge does to the worst channel of a run, in its batch, by low type. None where that cannot be
        measured, or would say nothing new: where the output counts as one channel, or state is carried.
        """
        worst, batch = outcome.worst_place, self.worst_batch(outcome)
        if worst.output is None or worst.channel is None or self._carry_state:
            return None
        observer = RoundingObserver(self.runner, 1)
        try:
            with self._draws.of_batch(batch.index):
                return observer.of_channel(
                    _copies(batch.flat), {}, worst.output, worst.channel, batch.results[worst.output]
                )
        except Exception as error:
            _log.warning("the worst channel was not measured: %s", first_line(error))
            return None

    def nonfinite_nodes(self, plan: PrecisionPlan, batch: Batch) -> list[str]:
        """The nodes that have more non-finite elements under the plan than in the program itself, in graph order."""
        expected = self._counted(_nonfinite, self.runner, batch)
        found = self._counted(_nonfinite, self._emulated(plan), batch)
        return [name for name, lost in found.items() if lost > expected.get(name, 0)]

    def steps_to_blame(self, outcome: Outcome, steps: Mapping[str, Operator]) -> list[str]:
        """The nodes among `steps` whose results are on another step under the plan, although all before them are held
        where the program has them. None where the worst result of the run is about as bad with all of them held. In
        graph order.
        """
        batch = self.worst_batch(outcome)
        expected: dict[str, list[torch.Tensor]] = {}
        found: list[str] = []

        def keep(name: str, _: Any, result: Any, *__: Any) -> None:
            if name in steps:
                expected[name] = _copies(_tensors(result))

        def hold(name: str, _: Any, result: Any, *__: Any) -> None:
            pairs = zip(_tensors(result), expected.get(name, ()), strict=False)
            if any([_held(steps[name], *pair) for pair in pairs]):
                found.append(name)

        self._watched(self.runner, batch, keep)
        held = _Seen()
        held.take(self._watched(self._emulated(outcome.plan), batch, hold), batch.results, batch)
        return found if held.worst.noise < _BLAMED * outcome.worst_place.noise else []

    def nodes_beyond(self, limit: float, batch: Batch) -> list[str]:
        """The nodes that give finite elements above `limit` in magnitude, in the program itself and in graph order."""
        return list(self._counted(lambda t: (t.abs() > limit) & t.isfinite(), self.runner, batch))

    def _emulated(self, plan: PrecisionPlan) -> ProgramRunner:
        return emulated(self.program, plan, self._device, self._carry_state)

    def _batch(self, index: int, flat: list[Any], begins: bool, doubled: bool = False) -> Batch:
        """Inputs, and the results of a run of the program that goes on from the batch before, or begins anew."""
        given = Batch(index, flat, [], doubled, begins)
        return replace(given, results=_copies(self._ran(self.runner, given)))

    def _leading_to(self, batch: Batch) -> list[Batch]:
        """The batches of the same sequence before this one: they make the state that it is run with."""
        if not self._carry_state:
            return []
        before = [b for b in (self.doubled if batch.doubled else self.batches) if b.index < batch.index]
        begins = max((place for place, b in enumerate(before) if b.begins), default=0)
        return [] if batch.begins else before[begins:]

    def _counted(
        self, what: Callable[[torch.Tensor], torch.Tensor], runner: ProgramRunner, batch: Batch
    ) -> dict[str, int]:
        """How many elements of each node's results are so, where any is, in the order in which they run."""
        counts: dict[str, int] = {}

        def watch(name: str, _: Any, result: Any, *__: Any) -> None:
            count = sum(int(what(t).sum()) for t in _tensors(result) if t.is_floating_point())
            if count:
                counts[name] = count

        self._watched(runner, batch, watch)
        return counts

    def _watched(self, runner: ProgramRunner, batch: Batch, watch: Watch) -> list[Any]:
        """The results of a batch, run with the state that the batches before it leave."""
        for earlier in self._leading_to(batch):
            self._ran(runner, earlier)
        return self._ran(runner, batch, watch)

    def _ran(self, runner: ProgramRunner | ReplayedRunner, batch: Batch, watch: Watch | None = None) -> list[Any]:
        """The results of a batch."""
        if batch.begins:
            runner.reset()
        with self._draws.of_batch(batch.index):
            return runner.run_batch(_copies(batch.flat), batch.index, watch)

    def _double(self, batch: Batch) -> Batch | None:
        """The batch with its floating-point inputs times two; None where it has none, or the program refuses them."""
        flat = [2 * v if _can_double(v) else v for v in _copies(batch.flat)]
        if not any(map(_can_double, flat)):
            return None
        try:
            return self._batch(batch.index, flat, batch.begins, doubled=True)
        except BatchError:  # an index outside its table, or a check in the program itself
            return None


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _held(operator: Operator, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Put the elements of `ours` that are on another step where `theirs` are. False where none is."""
    floating = theirs.is_floating_point()
    if ours.shape != theirs.shape or not theirs.numel() or (floating and not operator.steps):
        return False
    elsewhere = _is_elsewhere(operator, ours, theirs) if floating else ours != theirs
    if not elsewhere.any():
        return False
    ours.copy_(torch.where(elsewhere, theirs, ours))
    return True


def _is_elsewhere(operator: Operator, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Which floating-point elements are on another step: a step that is rounded itself stays where it is. Where there
    is a slope between the steps, such as those of a remainder, a step is as high as the largest element.
    """
    size = theirs.abs().max() * _A_JUMP if operator.slopes else _A_STEP * torch.maximum(ours.abs(), theirs.abs())
    return (ours - theirs).abs() > size


def _nonfinite(tensor: torch.Tensor) -> torch.Tensor:
    return ~tensor.isfinite()


def _can_double(value: Any) -> bool:
    """Types of one byte, such as float8, have no arithmetic, and mostly no room for twice their values."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.element_size() > 1


def _copies(values: Sequence[Any]) -> list[Any]:
    """Copies, as programs may write into their inputs, and give them back."""
    return [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in values]


def spare_db(outcome: Outcome, min_sqnr_db: float) -> float:
    """How far the outcome is above the budget, dB: negative below it, -inf where something became non-finite."""
    return -math.inf if outcome.nonfinite else outcome.sqnr_db - min_sqnr_db
