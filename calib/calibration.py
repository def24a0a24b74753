"""`calibrate`: run the user's data through an exported program and keep the range of every tensor."""

from __future__ import annotations

import copy
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import polars as pl
import torch
from calibcast.calib.batches import Signature, numbered, signature_of
from calibcast.calib.captured_execution import captured_or_plain
from calibcast.calib.checkpoint import Checkpoint, Pace, copy_into
from calibcast.calib.device_observer import observer_for, on
from calibcast.calib.errors import BatchError, CalibcastError, MismatchError, ProgramError
from calibcast.calib.execution import ProgramRunner, require_program
from calibcast.calib.fingerprint import begin_inputs_hash, node_digests, weights_hash
from calibcast.calib.graph import TensorSpec, input_targets, state_tensor, tensor_specs
from calibcast.calib.input_sizes import count_size
from calibcast.calib.loader_order import batch_hash, refuse_unseeded, resumed, rewind
from calibcast.calib.masks import mask_tensors
from calibcast.calib.measured import Measured
from calibcast.calib.observer import Observer
from calibcast.calib.range_schema import MAX_HASHES, Calibration
from calibcast.calib.ranges import RangeTable
from calibcast.calib.rounding_evidence import RoundingEvidence
from calibcast.calib.sequences import FlatInputs
from calibcast.calib.training_mode import refuse_training
from calibcast.calib.uninitialised import undefined_tensors
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

_log = logging.getLogger("calibcast")
HALF_MAX = 65504.0  # largest finite fp16 value, IEEE 754 binary16
# Counting what has passed fp16's limit waits for the device, which should have the next batch by then.
_TELL_SECONDS = 0.5
ON_NONFINITE = ("warn", "skip", "stop")


@dataclass
class Run:
    """What a calibration works with, and has seen so far beside the observer's statistics."""

    program: ExportedProgram
    runner: ProgramRunner
    specs: list[TensorSpec]
    observer: Observer
    signature: Signature
    on_nonfinite: str
    evidence: RoundingEvidence
    batches: int = 0
    skipped: list[int] = field(default_factory=list)
    sizes: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)

    @cached_property
    def _identity(self) -> tuple[dict[str, str], str]:
        return node_digests(self.program), weights_hash(self.program)

    @cached_property
    def _weight_names(self) -> frozenset[str]:
        return frozenset(input_targets(self.program))

    @cached_property
    def _step(self) -> Any:
        return captured_or_plain(self.runner, self.observer)

    def measure(self, index: int, flat: list[Any]) -> bool:
        """Run batch `index` and take in what it gave. False: it was left out as non-finite.

        Raises BatchError when a node raises; nothing of the batch is taken in then.
        """
        hashed = begin_inputs_hash(flat) if self.batches < MAX_HASHES else None
        if getattr(flat, "begins", False):
            self.runner.reset()
        before = self.runner.state
        with on(self.runner.device):
            self._step(flat, index, self.watch)
            if self.on_nonfinite != "warn" and (row := self.observer.first_nonfinite()) is not None:
                _leave_out(self, index, self.specs[row])
                self.runner.restore(before)
                return False
            self.observer.finish()
            self.evidence.measure(flat, index, before)
        self._note_inputs(flat, hashed)
        return True

    @cached_property
    def _undefined(self) -> frozenset[str]:
        return undefined_tensors(self.program)

    def watch(self, name: str, node: fx.Node, result: Any, arguments: dict[fx.Node, Any]) -> None:
        """Measure what a node gave. Weights are measured once, before the first batch."""
        if name in self._weight_names:
            return
        if name in self._undefined:
            result = pytree.tree_map_only(torch.Tensor, torch.zeros_like, result)
        self.observer.watch(name, node, result, arguments)

    def _note_inputs(self, flat: list[Any], hashed: Callable[[], str] | None) -> None:
        """Count a batch, its sizes and its hash."""
        self.batches += 1
        if hashed is not None:
            self.hashes.append(hashed())
        for leaf, value in zip(self.signature.leaves, flat, strict=True):
            if isinstance(value, torch.Tensor):
                counts = self.sizes.setdefault(leaf.name, [{} for _ in value.shape])
                for dimension, size in zip(counts, value.shape, strict=True):
                    count_size(dimension, str(int(size)))

    def calibration(self) -> Calibration:
        """What was measured on so far."""
        digests, weights = self._identity
        return Calibration(
            digests=digests,
            weights=weights,
            batches=self.batches,
            skipped=tuple(self.skipped),
            input_sizes=self.sizes,
            input_hashes=tuple(dict.fromkeys(self.hashes)),
        )

    def measured(self) -> Measured:
        """What was measured, on the host; where it runs on the host, the next batch changes it."""
        total = self.observer.total.to("cpu")
        return Measured(tuple(self.specs), total, self.calibration(), self.evidence.record)

    def table(self) -> RangeTable:
        """What was measured, brought to the host."""
        return RangeTable(**vars(self.measured().data()))

    def checkpoint(self, position: int, made_of: Mapping[str, str], last: str = "", **more: Any) -> Checkpoint:
        """What was measured after `position` batches; write or copy it before the next one, which changes it."""
        return Checkpoint(**vars(self.measured()), position=position, made_of=made_of, last=last, **more)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, in place of the weights' measurement and of its batches.

        Raises MismatchError when it is of another program.
        """
        if tuple(self.specs) != checkpoint.specs or self._identity != (
            checkpoint.calibration.digests,
            checkpoint.calibration.weights,
        ):
            raise MismatchError("the checkpoint is of another program, or of other weights: delete it to begin anew")
        copy_into(self.observer.total, checkpoint.statistics)
        self.evidence.restore(checkpoint.rounding)
        seen = checkpoint.calibration
        self.batches, self.skipped = seen.batches, list(seen.skipped)
        self.sizes, self.hashes = copy.deepcopy(seen.input_sizes), list(seen.input_hashes)


def calibrate(  # noqa: PLR0913 - the public contract
    program: ExportedProgram,
    dataloader: Iterable[Any],
    transform: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    histogram: bool = True,
    device: torch.device | str | None = None,
    on_nonfinite: str = "warn",
    progress: bool = True,
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_batches: int = 100,
    checkpoint_seconds: float = 60.0,
    carry_state: bool = False,
    rounding_batches: int = 4,
) -> RangeTable:
    """Run `dataloader` through `program` and record the range of every floating-point tensor.

    Memory is a fixed number of bytes per tensor, whatever the number of batches; the program and its buffers are
    left as they were, and every batch starts from the program's saved state.

    Args:
        program: from `torch.export.export`, of a model in eval mode.
        dataloader: any iterable of batches: a tensor, a tuple or list of positional inputs, a dict by input name,
            a pair `(args, kwargs)`, or anything that `transform` turns into one of these.
        transform: from a batch to the model's inputs.
        max_batches: stop after so many.
        histogram: also count fp32 exponents (256 bins a tensor).
        device: where to run; None is where the program is. A copy of the program is moved, not the program.
        on_nonfinite: NaN or Inf in a batch: "warn" records and warns, "skip" leaves the batch out, "stop" raises.
        progress: show a bar on a terminal.
        checkpoint: a file that keeps what was measured, written every `checkpoint_batches` batches or
            `checkpoint_seconds`, whichever comes first. Where it exists, calibration goes on from it: the batches
            before are read, not run, and the table is the one of an uninterrupted run, bit for bit (on the CPU, with
            as many threads). The loader's order must repeat; a DataLoader's generators are set back to their seeds.
            Removed at the end.
        carry_state: let each batch go on from what the one before left in the buffers that the program writes to (a KV
            cache, a counter), instead of from the program's saved state. A batch that is a `NewSequence` begins anew.
        rounding_batches: on the first so many batches, also measure what rounding each tensor to float16 and bfloat16
            does to the outputs (`RangeTable.rounding`); each costs about ten forward passes. 0 measures ranges only.

    Raises:
        ProgramError: the program is in train mode, or has no floating-point tensor.
        BatchError: a batch does not match, the dataloader raised, or gave nothing. `error.ranges` has what was
            measured before. With a checkpoint also: the loader shuffles without a seed, or its order did not repeat.
        MismatchError: the checkpoint is of another program, or of other settings.
    """
    if on_nonfinite not in ON_NONFINITE:
        raise CalibcastError(f"on_nonfinite={on_nonfinite!r}: known are {', '.join(map(repr, ON_NONFINITE))}")
    if carry_state and checkpoint is not None:
        raise CalibcastError("carry_state=True with a checkpoint: the state that batches left cannot be resumed")
    run = prepare(program, device, histogram, on_nonfinite, carry_state, rounding_batches)
    if checkpoint is None:
        keeper, batches = None, numbered(dataloader, run.signature, transform, max_batches)
        measure_weights(run)
    else:
        refuse_unseeded(dataloader)
        rewind(dataloader)
        made_of = {"histogram": str(histogram), "on_nonfinite": on_nonfinite, "max_batches": str(max_batches)}
        made_of["rounding_batches"] = str(rounding_batches)
        keeper = _Keeper(Path(checkpoint), Pace(checkpoint_batches, checkpoint_seconds), made_of)
        position, last = keeper.resume(run)
        rest = resumed(dataloader, position, last)
        batches = numbered(rest, run.signature, transform, max_batches, position)
    total = _length(dataloader, max_batches)
    try:
        # disable=None: tqdm stays silent where stderr is no terminal.
        with tqdm(batches, "calibrate", total, unit="batch", disable=None if progress else True) as bar:
            _measure(run, bar, keeper)
    except BatchError as error:
        error.ranges = run.table() if run.batches else None
        raise
    if not run.batches:
        raise BatchError(f"all {len(run.skipped)} batches had NaN or Inf and were skipped: nothing was measured")
    table = run.table()
    _warn_nonfinite(run, table)
    _tell_gaps(table)
    if keeper is not None:
        keeper.path.unlink(missing_ok=True)
    _log.info("%s", table)
    return table


@dataclass
class _Keeper:
    """Keeps the checkpoint of one calibration."""

    path: Path
    pace: Pace
    made_of: dict[str, str]

    def resume(self, run: Run) -> tuple[int, str]:
        """Bring `run` to where the checkpoint was written: how many batches, and the hash of the last one."""
        if not self.path.exists():
            measure_weights(run)
            return 0, ""
        found = Checkpoint.load(self.path)
        if (difference := found.difference(self.made_of)) is not None:
            raise MismatchError(f"{self.path} was written with another {difference}: delete it to begin anew")
        run.restore(found)
        _log.info("%s: going on after %d batches", self.path, found.position)
        return found.position, found.last

    def keep(self, run: Run, position: int, batch: Any) -> None:
        if self.pace.tick():
            run.checkpoint(position, self.made_of, batch_hash(batch)).save(self.path)
            self.pace.reset()


def prepare(
    program: ExportedProgram,
    device: torch.device | str | None,
    histogram: bool,
    on_nonfinite: str,
    carry_state: bool = False,
    rounding_batches: int = 4,
) -> Run:
    """A calibration that has seen nothing yet. Raises as `calibrate` does."""
    if on_nonfinite not in ON_NONFINITE:
        raise CalibcastError(f"on_nonfinite={on_nonfinite!r}: known are {', '.join(map(repr, ON_NONFINITE))}")
    require_program(program)
    refuse_training(program)
    specs = tensor_specs(program)
    if not specs:
        raise ProgramError("the program has no floating-point tensor, so there is no range to measure and no type")
    try:
        runner = ProgramRunner(program, device, carry_state=carry_state)
        observer = observer_for(specs, runner.device, histogram, mask_tensors(program))
    except (RuntimeError, AssertionError) as error:  # no such device, or torch built without it
        raise CalibcastError(f"the program cannot be moved to device={device!r}: {error}") from error
    evidence = RoundingEvidence(runner, rounding_batches)
    return Run(program, runner, specs, observer, signature_of(program), on_nonfinite, evidence)


def _measure(run: Run, bar: tqdm[tuple[int, Any, FlatInputs]], keeper: _Keeper | None) -> None:
    told = -math.inf
    for index, batch, flat in bar:
        run.measure(index, flat)
        if keeper is not None:
            keeper.keep(run, index + 1, batch)
        last = index + 1 == bar.total
        if not bar.disable and (last or time.monotonic() - told > _TELL_SECONDS):
            bar.set_postfix_str(f"{run.observer.above(HALF_MAX)} tensors above {HALF_MAX:g}")
            told = time.monotonic()


def measure_weights(run: Run) -> None:
    """Parameters, buffers and constants: once, in chunks, where they are."""
    targets = input_targets(run.program)
    with on(run.runner.device):
        run.observer.start(0)
        for spec in run.specs:
            tensor = state_tensor(run.program, targets[spec.node]) if spec.node in targets else None
            if tensor is not None:
                run.observer.measure(spec.node, tensor.detach())
        run.observer.finish()


def _leave_out(run: Run, index: int, spec: TensorSpec) -> None:
    place = (
        f"batch {index}: NaN or Inf first at node {spec.node} ({spec.module or 'root'}, {spec.source or 'no source'})"
    )
    if run.on_nonfinite == "stop":
        raise BatchError(f"{place}. Mend the data or the model, or pass on_nonfinite='skip' or 'warn'.")
    _log.warning("%s: the batch is skipped", place)
    run.skipped.append(index)


def _warn_nonfinite(run: Run, table: RangeTable) -> None:
    bad = table.frame.filter(pl.col("nonfinite_batch").is_not_null())
    # Weights carry their own story; what data did is told by the earliest batch, and in it by the first node.
    if bad.height:
        first = bad.sort("nonfinite_batch", maintain_order=True).row(0, named=True)
        seen = ", ".join(f"{first[name]} {name}" for name in ("nan", "posinf", "neginf") if first[name])
        place = f"{first['node']} ({first['module'] or 'root'}, {first['source'] or 'no source'})"
        warnings.warn(
            f"NaN or Inf in fp32 itself: first in batch {first['nonfinite_batch']} at node {place}: {seen} over all "
            f"batches; {bad.height} tensors in all. They stay in fp32. If only some batches do this, pass "
            "on_nonfinite='skip'.",
            stacklevel=3,
        )


def _tell_gaps(table: RangeTable) -> None:
    gaps = table.rounding_gaps
    if gaps.height:
        first = gaps.row(0, named=True)
        _log.warning(
            "no evidence of rounding in %d of %d rows (see ranges.rounding_gaps); the first, %s as %s reads it: %s",
            gaps.height, table.rounding.height, first["input"], first["node"], first["why_missing"],
        )  # fmt: skip


def _length(dataloader: Any, max_batches: int | None) -> int | None:
    try:
        length = len(dataloader)
    except (TypeError, NotImplementedError):  # an iterator, or an iterable-style dataset
        return max_batches
    return length if max_batches is None else min(length, max_batches)
