"""Running an engine once and comparing it with its program: an engine that builds may still be wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl
import torch
from calibcast.calib.batches import signature_of
from calibcast.calib.execution import NodeError, ProgramRunner, input_structure, output_names
from calibcast.calib.input_checks import Leaf
from calibcast.calib.random_draws import JUDGED, Draws, drawing_nodes
from calibcast.calib.ranges import RangeTable
from calibcast.calib.sequences import begins_anew
from calibcast.engines.judging.metrics import OutputError
from calibcast.engines.judging.shapes import may_be, sizes_by_data
from calibcast.engines.tensorrt.builder.job import Profile
from calibcast.engines.tensorrt.widening import widenable, widened
from calibcast.passes.proof import Proof
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

_log = logging.getLogger("calibcast")
# An engine's SQNR may be this many dB below its cast graph's, or the plan's proof: its kernels round in other places.
GRACE_DB = 6.0
# No engine has to be better than this: fp32 layers may run in TF32, whose mantissa has 10 bits like fp16's.
MOST_ASKED_DB = 46.0


@dataclass(frozen=True)
class SeenOutput:
    """One output of an engine as measured against fp32. asked_db: the least SQNR that it must have. cast_db: SQNR of
    the cast graph in PyTorch. engine_db: SQNR of the engine. nonfinite: how many values are NaN or Inf only in the
    engine."""

    output: str
    asked_db: float
    cast_db: float
    engine_db: float
    nonfinite: int


@dataclass(frozen=True)
class Judgement:
    """The result of running an engine.

    problem: what is wrong with the engine; None when it is right, or could not be tried (`why_not`). plan_problem: what
    is wrong with the plan; another engine would not mend it. batches: how many were run. made_up: whether the batches
    were made up here rather than the user's. basis: a digest of what the engine was judged by. set_up: whether the
    engine could be made ready to run; `problem` says why not.
    """

    outputs: tuple[SeenOutput, ...] = ()
    problem: str | None = None
    plan_problem: str | None = None
    why_not: str | None = None
    batches: int = 0
    made_up: bool = False
    basis: str = ""
    set_up: bool = True

    def record(self) -> dict[str, Any]:
        """As plain data, for a manifest."""
        return {**asdict(self), "outputs": [asdict(output) for output in self.outputs]}


def trial_inputs(
    program: ExportedProgram,
    shapes: Sequence[Profile],
    ranges: RangeTable | None,
    device: torch.device,
    examples: Sequence[Any] = (),
) -> list[Any]:
    """Flat inputs of the most frequent sizes: uniform over the range that calibration saw, else between -1 and 1.

    Integers and booleans come from `examples`, the flat inputs that the program was exported with, repeated to the
    size. Random ones could mask out everything, or index outside a table, and would say nothing about the engine.
    Without an example, integers are 0, which is a valid index of every table, and booleans are true, which masks
    nothing out.
    """
    generator = torch.Generator().manual_seed(0)
    leaves, nodes = signature_of(program).leaves, program.graph_signature.user_inputs
    examples = examples if len(examples) == len(leaves) else [None] * len(leaves)

    def made(leaf: Leaf, node: str, shape: tuple[int, ...], example: Any) -> Any:
        if leaf.dtype is None:
            return shape[0] if leaf.sizes else leaf.constant
        if not leaf.dtype.is_floating_point:
            return _repeated(example, leaf.dtype, shape).to(device)
        low, high = _seen(node, ranges)
        return (low + (high - low) * torch.rand(shape, generator=generator)).to(device, leaf.dtype)

    usual = [shape for _, shape, _ in shapes]
    return [made(leaf, str(node), *rest) for leaf, node, *rest in zip(leaves, nodes, usual, examples, strict=True)]


def _repeated(example: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Integers or booleans of a shape: the example, repeated along each dimension as often as needed."""
    fits = isinstance(example, torch.Tensor) and example.dtype == dtype and example.dim() == len(shape)
    if not fits or not example.numel():
        return torch.full(shape, dtype == torch.bool, dtype=dtype)
    repeated: torch.Tensor = example
    for dimension, size in enumerate(shape):
        places = torch.arange(size, device=repeated.device) % repeated.shape[dimension]
        repeated = repeated.index_select(dimension, places)
    return repeated


def _seen(name: str, ranges: RangeTable | None) -> tuple[float, float]:
    """The least and the largest value that calibration saw in the input whose node is `name`; -1 and 1 where
    unknown."""
    rows = None if ranges is None else ranges.frame.filter((pl.col("kind") == "input") & (pl.col("node") == name))
    found = (-1.0, 1.0) if rows is None or not len(rows) else (rows["min"][0], rows["max"][0])
    return found if all(value is not None and math.isfinite(value) for value in found) else (-1.0, 1.0)


def trial_problem(run: Callable[..., Any], program: ExportedProgram, flat: Sequence[Any]) -> str | None:
    """What is wrong with an engine, judged on one batch: see `judged`."""
    return judged(run, program, [flat]).problem


def judged(
    run: Callable[..., Any],
    program: ExportedProgram,
    batches: Sequence[Sequence[Any]],
    reference: ExportedProgram | None = None,
    proven: Proof | None = None,
    carry_state: bool = False,
) -> Judgement:
    """Run an engine, and its cast graph in PyTorch, and compare both with fp32.

    An engine is wrong if it raises, if it gives NaN or Inf where its program gives numbers, or if its SQNR is more than
    6 dB below what its program has in PyTorch or what its plan was proven to have. Of a program that draws random
    numbers, SQNR is not asked for.

    run: the engine. batches: flat inputs on its device; copies of the programs are moved there. reference: the fp32
    program; None: the cast graph with every node in fp32 that can be. proven: the proof of the
    plan. carry_state: run the batches as a sequence; a batch whose `begins` is true starts from the saved state.
    """
    device = next((value.device for flat in batches for value in flat if isinstance(value, torch.Tensor)), None)
    try:
        held = _Held(program, reference, device, proven, carry_state)
        for index, flat in enumerate(batches):
            if begins_anew(flat):
                held.reset()
            held.expect(flat, index)
    except (NodeError, RuntimeError) as error:  # not the engine's fault: a lack of memory, for example
        _log.warning("the engine was not tried out, as its program does not run on such inputs: %s", error)
        return Judgement(why_not=f"its program does not run on such inputs: {error}")
    try:
        reset = getattr(run, "reset", lambda: None)
        for index, flat in enumerate(batches):
            if index and (begins_anew(flat) or not carry_state):
                reset()
            args, kwargs = input_structure(program, flat)
            with held.draws.of_batch(index):
                given = run(*args, **kwargs)
            held.take(index, pytree.tree_leaves(given))
        reset()
    except torch.OutOfMemoryError as error:  # the copy of the program may be to blame
        _log.warning("the engine was not tried out, because memory ran out: %s", error)
        return Judgement(why_not=f"memory ran out: {error}")
    except Exception as error:  # any error of the runtime
        return Judgement(problem=f"the engine does not run: {type(error).__name__}: {error}", batches=len(batches))
    return held.judgement(len(batches))


def in_fp32(program: ExportedProgram) -> ExportedProgram:
    """A cast program with every node in fp32 that can be."""
    low = [node.name for node in widenable(program)]
    return widened(program, low) if low else program


class _Held:
    """Compares an engine and its cast graph with fp32 on a few batches."""

    def __init__(
        self,
        program: ExportedProgram,
        reference: ExportedProgram | None,
        device: torch.device | None,
        proven: Proof | None,
        carry_state: bool,
    ) -> None:
        names = output_names(program)
        wide = in_fp32(program) if reference is None else reference
        runners = [ProgramRunner(p, device, carry_state=carry_state) for p in (program, wide, wide)]
        self._cast, self._wide, self._disturbed = runners
        self.draws = Draws.of(program, wide, stream=JUDGED)
        self._proven = proven
        # An engine may draw other random numbers than its program. How far the results are apart then says nothing.
        self._drawing = bool(drawing_nodes(program))
        self._errors = {kind: [OutputError(name) for name in names] for kind in ("engine", "cast", "moved")}
        self._expected: list[tuple[list[Any], list[Any]]] = []
        self._wrong = self._total = 0
        self._outputs, self._misshapen = list(zip(names, sizes_by_data(program), strict=True)), ""

    def expect(self, flat: Sequence[Any], index: int) -> None:
        """Run the programs. Inputs changed by as little as TF32's rounding show how much error the model itself
        amplifies."""
        wanted, cast, moved = (
            self._ran(runner, given, index)
            for runner, given in ((self._wide, flat), (self._cast, flat), (self._disturbed, _moved(flat)))
        )
        self._compare("cast", cast, wanted)
        self._compare("moved", moved, wanted)
        self._expected.append((wanted, cast))

    def _ran(self, runner: ProgramRunner, flat: Sequence[Any], index: int) -> list[Any]:
        with self.draws.of_batch(index):
            return runner.run(flat)

    def reset(self) -> None:
        """Begin a new sequence."""
        for runner in (self._cast, self._wide, self._disturbed):
            runner.reset()

    def take(self, index: int, given: Sequence[Any]) -> None:
        """Compare what the engine gave for batch `index`."""
        wanted, cast = self._expected[index]
        self._compare("engine", given, wanted)
        for (name, by_data), ours, theirs in zip(self._outputs, given, cast, strict=True):
            tensors = isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)
            if tensors and not may_be(ours.shape, theirs.shape, by_data):
                shapes = f"{list(ours.shape)}, and its program {list(theirs.shape)}"
                self._misshapen = self._misshapen or f"the engine gives {name} the shape {shapes}"
            elif _is_floating(theirs) and isinstance(ours, torch.Tensor):
                self._wrong += int((~torch.isfinite(ours) & torch.isfinite(theirs)).sum())
                self._total += theirs.numel()

    def _compare(self, kind: str, given: Sequence[Any], wanted: Sequence[Any]) -> None:
        for error, ours, theirs in zip(self._errors[kind], given, wanted, strict=True):
            if _is_floating(theirs) and isinstance(ours, torch.Tensor) and ours.shape == theirs.shape:
                error.update(ours, theirs, 0)

    def judgement(self, batches: int) -> Judgement:
        found = [(s, proven) for place, proven in self._proofs() if (s := self._seen(place, proven)) is not None]
        seen = [output for output, _ in found]
        low = min(seen, key=lambda output: output.engine_db - output.asked_db, default=None)
        problem = plan_problem = None
        if self._misshapen:
            problem = self._misshapen
        elif self._wrong:
            problem = f"the engine gives NaN or Inf for {self._wrong} of {self._total} values that its program gives"
        elif low is not None and low.engine_db < low.asked_db:
            problem = (
                f"{low.output} of the engine has {low.engine_db:.1f} dB against fp32, where its cast graph has "
                f"{low.cast_db:.1f} dB in PyTorch, and at least {low.asked_db:.1f} dB were asked"
            )
        for output, proven in found:
            if output.cast_db < proven - GRACE_DB:
                plan_problem = (
                    f"{output.output} was proven to have {proven:.1f} dB, and has {output.cast_db:.1f} dB here"
                )
        return Judgement(tuple(seen), problem, plan_problem, batches=batches)

    def _proofs(self) -> list[tuple[int, float]]:
        """The place of each floating-point output, and the SQNR that it was proven to have: integers have none."""
        places = [place for place, value in enumerate(self._expected[0][0]) if _is_floating(value)]
        proven = {} if self._proven is None else self._proven.sqnr_by_place(places)
        return [(place, proven.get(place, -math.inf)) for place in places]

    def _seen(self, position: int, proven: float) -> SeenOutput | None:
        engine, cast, moved = (self._errors[kind][position] for kind in ("engine", "cast", "moved"))
        if not engine.elements or not engine.powers[1]:
            return None  # nothing to compare with: no numbers, or all of them 0
        able = min(cast.sqnr_db, moved.sqnr_db, MOST_ASKED_DB)
        # Where the cast graph itself is below the proof here, the engine need not be better than the cast graph.
        asked = max(able, min(proven, cast.sqnr_db)) - GRACE_DB
        if self._drawing:
            asked = -math.inf
        return SeenOutput(engine.output, asked, cast.sqnr_db, engine.sqnr_db, engine.only_engine)


def _moved(flat: Sequence[Any]) -> list[Any]:
    generator = torch.Generator().manual_seed(1)

    def moved(value: Any) -> Any:
        if not _is_floating(value):
            return value
        noise = torch.rand(value.shape, generator=generator).to(value.device) * 2 - 1
        return (value * (1 + noise * 2.0**-11)).to(value.dtype)

    return [moved(value) for value in flat]


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
