"""`calibrate`: run the user's data through an exported program and keep the range of every tensor."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import torch
from torch.export import ExportedProgram
from tqdm.auto import tqdm

from calib.batches import Signature, numbered, signature_of
from calib.captured_execution import captured_or_plain
from calib.device_observer import observer_for
from calib.errors import BatchError, CalibcastError, ProgramError
from calib.execution import ProgramRunner, refuse_training
from calib.fingerprint import inputs_hash, node_digests, weights_hash
from calib.graph import TensorSpec, input_targets, state_tensor, tensor_specs
from calib.masks import mask_tensors
from calib.observer import Observer
from calib.ranges import MAX_HASHES, Calibration, RangeTable, count_size, table_of

_log = logging.getLogger("calibcast")
HALF_MAX = 65504.0  # largest finite fp16 value, IEEE 754 binary16
ON_NONFINITE = ("warn", "skip", "stop")


@dataclass
class _Run:
    """What a calibration works with, and has seen so far beside the observer's statistics."""

    program: ExportedProgram
    runner: ProgramRunner
    specs: list[TensorSpec]
    observer: Observer
    signature: Signature
    on_nonfinite: str
    batches: int = 0
    skipped: list[int] = field(default_factory=list)
    sizes: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)

    def note_inputs(self, flat: list[Any]) -> None:
        """Count a batch, its sizes and its hash."""
        self.batches += 1
        if len(self.hashes) < MAX_HASHES:
            self.hashes.append(inputs_hash(flat))
        for leaf, value in zip(self.signature.leaves, flat, strict=True):
            if isinstance(value, torch.Tensor):
                counts = self.sizes.setdefault(leaf.name, [{} for _ in value.shape])
                for dimension, size in zip(counts, value.shape, strict=True):
                    count_size(dimension, str(int(size)))

    def table(self) -> RangeTable:
        """What was measured, brought to the host: the one time that anything is."""
        calibration = Calibration(
            digests=node_digests(self.program),
            weights=weights_hash(self.program),
            batches=self.batches,
            skipped=tuple(self.skipped),
            input_sizes=self.sizes,
            input_hashes=tuple(dict.fromkeys(self.hashes)),
        )
        return table_of(self.specs, self.observer.total.to("cpu"), calibration)


def calibrate(  # noqa: PLR0913 - the public contract
    program: ExportedProgram,
    dataloader: Iterable[Any],
    transform: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    histogram: bool = True,
    device: torch.device | str | None = None,
    on_nonfinite: str = "warn",
    progress: bool = True,
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

    Raises:
        ProgramError: the program is in train mode, or has no floating-point tensor.
        BatchError: a batch does not match, the dataloader raised, or gave nothing. `error.ranges` has what was
            measured before.
    """
    if on_nonfinite not in ON_NONFINITE:
        raise CalibcastError(f"on_nonfinite={on_nonfinite!r}: known are {', '.join(map(repr, ON_NONFINITE))}")
    run = _prepare(program, device, histogram, on_nonfinite)
    batches = numbered(dataloader, run.signature, transform, max_batches)
    total = _length(dataloader, max_batches)
    try:
        # disable=None: tqdm stays silent where stderr is no terminal.
        with tqdm(batches, "calibrate", total, unit="batch", disable=None if progress else True) as bar:
            _measure(run, bar)
    except BatchError as error:
        error.ranges = run.table() if run.batches else None
        raise
    if not run.batches:
        raise BatchError(f"all {len(run.skipped)} batches had NaN or Inf and were skipped: nothing was measured")
    table = run.table()
    _warn_nonfinite(run, table)
    _log.info("%s", table)
    return table


def _prepare(program: ExportedProgram, device: torch.device | str | None, histogram: bool, on_nonfinite: str) -> _Run:
    if on_nonfinite not in ON_NONFINITE:
        raise CalibcastError(f"on_nonfinite={on_nonfinite!r}: known are {', '.join(map(repr, ON_NONFINITE))}")
    refuse_training(program)
    specs = tensor_specs(program)
    if not specs:
        raise ProgramError("the program has no floating-point tensor, so there is no range to measure and no type")
    try:
        runner = ProgramRunner(program, device)
        observer = observer_for(specs, runner.device, histogram, mask_tensors(program))
    except (RuntimeError, AssertionError) as error:  # no such device, or torch built without it
        raise CalibcastError(f"the program cannot be moved to device={device!r}: {error}") from error
    return _Run(program, runner, specs, observer, signature_of(program), on_nonfinite)


def _measure(run: _Run, bar: tqdm[tuple[int, Any, list[Any]]]) -> None:
    """Weights once, then every batch."""
    _measure_weights(run)
    state = set(input_targets(run.program))
    observer = run.observer
    step = captured_or_plain(run.runner, observer)

    def watch(name: str, *rest: Any) -> None:
        if name not in state:
            observer.watch(name, *rest)

    for index, _, flat in bar:
        step(flat, index, watch)
        if run.on_nonfinite != "warn" and (row := observer.first_nonfinite()) is not None:
            _leave_out(run, index, run.specs[row])
            continue
        observer.finish()
        run.note_inputs(flat)
        if not bar.disable:
            bar.set_postfix_str(f"{observer.above(HALF_MAX)} tensors above {HALF_MAX:g}")


def _measure_weights(run: _Run) -> None:
    """Parameters, buffers and constants: in chunks, where they are."""
    targets = input_targets(run.program)
    run.observer.start(0)
    for spec in run.specs:
        tensor = state_tensor(run.program, targets[spec.node]) if spec.node in targets else None
        if tensor is not None:
            run.observer.measure(spec.node, tensor.detach())
    run.observer.finish()


def _leave_out(run: _Run, index: int, spec: TensorSpec) -> None:
    place = (
        f"batch {index}: NaN or Inf first at node {spec.node} ({spec.module or 'root'}, {spec.source or 'no source'})"
    )
    if run.on_nonfinite == "stop":
        raise BatchError(f"{place}. Mend the data or the model, or pass on_nonfinite='skip' or 'warn'.")
    _log.warning("%s: the batch is skipped", place)
    run.skipped.append(index)


def _warn_nonfinite(run: _Run, table: RangeTable) -> None:
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


def _length(dataloader: Any, max_batches: int | None) -> int | None:
    try:
        length = len(dataloader)
    except (TypeError, NotImplementedError):  # an iterator, or an iterable-style dataset
        return max_batches
    return length if max_batches is None else min(length, max_batches)
