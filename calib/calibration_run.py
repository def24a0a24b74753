"""One running calibration: what it works with, and what it has measured so far."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from calibcast.calib.batches import Signature, signature_of
from calibcast.calib.captured_execution import captured_or_plain
from calibcast.calib.checkpoint import Checkpoint, copy_into
from calibcast.calib.device_observer import observer_for, on
from calibcast.calib.errors import BatchError, CalibcastError, MismatchError, ProgramError
from calibcast.calib.execution import ProgramRunner, require_program
from calibcast.calib.graph import TensorSpec, input_targets, state_tensor, tensor_specs
from calibcast.calib.input_sizes import count_size
from calibcast.calib.masks import mask_tensors
from calibcast.calib.measured import Measured
from calibcast.calib.observer import Observer
from calibcast.calib.program_digests import begin_inputs_hash, node_digests, weights_hash
from calibcast.calib.random_draws import Draws
from calibcast.calib.range_schema import MAX_HASHES, Calibration
from calibcast.calib.ranges import RangeTable
from calibcast.calib.rounding_evidence import RoundingObserver
from calibcast.calib.training_mode import refuse_training
from calibcast.calib.uninitialised import undefined_tensors
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

_log = logging.getLogger("calibcast")
ON_NONFINITE = ("warn", "skip", "stop")


@dataclass
class Run:
    """What a calibration works with, and what it has recorded so far besides the observer's statistics."""

    program: ExportedProgram
    runner: ProgramRunner
    specs: list[TensorSpec]
    observer: Observer
    signature: Signature
    on_nonfinite: str
    evidence: RoundingObserver
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
    def _draws(self) -> Draws:
        return Draws.of(self.program)

    @cached_property
    def _step(self) -> Any:
        return captured_or_plain(self.runner, self.observer)

    def measure(self, index: int, flat: list[Any]) -> bool:
        """Run batch `index` and add its measurements. False: the batch was left out because of NaN or Inf.

        Raises BatchError when a node raises; then nothing of the batch is added.
        """
        hashed = begin_inputs_hash(flat) if self.batches < MAX_HASHES else None
        if getattr(flat, "begins", False):
            self.runner.reset()
        before = self.runner.state
        with on(self.runner.device), self._draws.of_batch(index):
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
        """Measure the result of a node. Weights are measured once, before the first batch."""
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
            is_size = leaf.dtype is None and bool(leaf.sizes)  # a number that the export left open, such as a length
            if isinstance(value, torch.Tensor) or is_size:
                shape = (value,) if is_size else value.shape
                counts = self.sizes.setdefault(leaf.name, [{} for _ in shape])
                for dimension, size in zip(counts, shape, strict=True):
                    count_size(dimension, str(int(size)))

    def calibration(self) -> Calibration:
        """The record of the program and of the batches measured so far."""
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
        """What was measured so far, on the host. If the program runs on the host, the next batch changes it."""
        total = self.observer.total.to("cpu")
        return Measured(tuple(self.specs), total, self.calibration(), self.evidence.record)

    def table(self) -> RangeTable:
        """What was measured so far, as a table on the host."""
        return RangeTable(**vars(self.measured().data()))

    def checkpoint(self, position: int, made_of: Mapping[str, str], last: str = "", **more: Any) -> Checkpoint:
        """What was measured after `position` batches. Write or copy it before the next batch, which changes it."""
        return Checkpoint(**vars(self.measured()), position=position, made_of=made_of, last=last, **more)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, instead of measuring the weights and the checkpoint's batches again.

        Raises MismatchError when the checkpoint is of another program or of other weights.
        """
        if tuple(self.specs) != checkpoint.specs or self._identity != (
            checkpoint.calibration.digests,
            checkpoint.calibration.weights,
        ):
            raise MismatchError("the checkpoint is of another program, or of other weights")
        copy_into(self.observer.total, checkpoint.statistics)
        self.evidence.restore(checkpoint.rounding)
        seen = checkpoint.calibration
        self.batches, self.skipped = seen.batches, list(seen.skipped)
        self.sizes, self.hashes = copy.deepcopy(seen.input_sizes), list(seen.input_hashes)


def prepare(
    program: ExportedProgram,
    device: torch.device | str | None,
    histogram: bool,
    on_nonfinite: str,
    carry_state: bool = False,
    rounding_batches: int = 4,
) -> Run:
    """A calibration before its first batch. Raises as `calibrate` does."""
    if on_nonfinite not in ON_NONFINITE:
        raise CalibcastError(f"on_nonfinite={on_nonfinite!r}: known are {', '.join(map(repr, ON_NONFINITE))}")
    require_program(program)
    refuse_training(program)
    specs = tensor_specs(program)
    if not specs:
        raise ProgramError("the program has no floating-point tensor, so no range to measure, no type to choose")
    try:
        runner = ProgramRunner(program, device, carry_state=carry_state)
        observer = observer_for(specs, runner.device, histogram, mask_tensors(program))
    except (RuntimeError, AssertionError) as error:  # no such device, or torch built without it
        raise CalibcastError(f"the program cannot be moved to device={device!r}: {error}") from error
    evidence = RoundingObserver(runner, rounding_batches)
    return Run(program, runner, specs, observer, signature_of(program), on_nonfinite, evidence)


def measure_weights(run: Run) -> None:
    """Measure parameters, buffers and constants: once, in chunks, on the device that holds them."""
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
