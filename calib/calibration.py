"""`calibrate`: run the user's data through an exported program and keep the range of every tensor."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import polars as pl
import torch
from calibcast.calib.batches import numbered
from calibcast.calib.calibration_run import Run, prepare
from calibcast.calib.checkpoint import Pace
from calibcast.calib.errors import BatchError, CalibcastError, MismatchError
from calibcast.calib.loader_order import refuse_unseeded, resumed, rewind
from calibcast.calib.measuring import Keeper, measure_all
from calibcast.calib.number_text import counted
from calibcast.calib.ranges import RangeTable
from calibcast.calib.sequences import FlatInputs
from calibcast.calib.text_table import listed
from torch.export import ExportedProgram
from tqdm.auto import tqdm

_log = logging.getLogger("calibcast")
HALF_MAX = 65504.0  # largest finite fp16 value, IEEE 754 binary16
# Counting the tensors above fp16's limit waits for the device and delays the next batch, so it is done only this often.
_TELL_SECONDS = 0.5


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

    Memory is a fixed number of bytes per tensor, whatever the number of batches. The program and its buffers are
    not changed, and every batch starts from the program's saved state. A program that draws random numbers draws those
    of the batch's index, in any process; the caller's generators are left as they were.

    Args:
        program: from `torch.export.export`, of a model in eval mode.
        dataloader: any iterable of batches: a tensor, a tuple or list of positional inputs, a dict by input name,
            a pair `(args, kwargs)`, or anything that `transform` turns into one of these.
        transform: a function from a batch to the model's inputs.
        max_batches: stop after this many batches.
        histogram: also count fp32 exponents (256 bins a tensor).
        device: where to run; None is where the program is. A copy of the program is moved, not the program.
        on_nonfinite: NaN or Inf in a batch: "warn" records and warns, "skip" leaves the batch out, "stop" raises.
        progress: show a bar on a terminal.
        checkpoint: a file that keeps what was measured, written every `checkpoint_batches` batches or
            `checkpoint_seconds`, whichever comes first. If it exists, calibration goes on from it: earlier batches
            are read but not run, and the table equals that of an uninterrupted run bit for bit (on the CPU, with the
            same number of threads). The loader's order must repeat; a DataLoader's generators are set back to their
            seeds. The file is removed at the end.
        carry_state: start each batch from what the previous one left in the buffers that the program writes to (a KV
            cache, a counter), instead of from the program's saved state. A `NewSequence` batch starts from the saved
            state again.
        rounding_batches: on this many of the first batches, also measure what rounding each tensor to float16 and
            bfloat16 does to the outputs (`RangeTable.rounding`). Each costs about ten forward passes. 0 measures ranges
            only.

    Raises:
        ProgramError: the program is in train mode, or has no floating-point tensor.
        BatchError: a batch does not match, the dataloader raised, or gave nothing. `error.ranges` has what was
            measured before. With a checkpoint also: the loader shuffles without a seed, or its order did not repeat.
        MismatchError: the checkpoint is of another program, or of other settings.
    """
    if carry_state and checkpoint is not None:
        raise CalibcastError("carry_state=True with a checkpoint: the state that batches left cannot be resumed")
    run = prepare(program, device, histogram, on_nonfinite, carry_state, rounding_batches)
    made_of = {"histogram": str(histogram), "on_nonfinite": on_nonfinite, "max_batches": str(max_batches)}
    made_of["rounding_batches"] = str(rounding_batches)
    pace = None if checkpoint is None else Pace(checkpoint_batches, checkpoint_seconds)
    keeper = Keeper(run, None if checkpoint is None else Path(checkpoint), pace, made_of)
    batches = numbered(_rest(keeper, dataloader), run.signature, transform, max_batches, keeper.position)
    # disable=None: tqdm stays silent where stderr is no terminal.
    total = _length(dataloader, max_batches)
    with tqdm(batches, "calibrate", total, unit="batch", disable=None if progress else True) as bar:
        measure_all(run, _told(run, bar), lambda item: run.measure(*item), keeper)
    if not run.batches:
        raise BatchError(f"all {len(run.skipped)} batches had NaN or Inf and were skipped: nothing was measured")
    table = run.table()
    _warn_nonfinite(run, table)
    _warn_zeros(table)
    _tell_gaps(table)
    if keeper.path is not None:
        keeper.path.unlink(missing_ok=True)
    _log.info("%s", table)
    return table


def _rest(keeper: Keeper, dataloader: Iterable[Any]) -> Iterable[Any]:
    """The batches that are left: all of the loader, or with a checkpoint those after the checkpoint's last batch."""
    if keeper.path is not None:
        refuse_unseeded(dataloader)
        rewind(dataloader)
    try:
        keeper.resume()
    except MismatchError as error:
        raise MismatchError(f"{error}: delete {keeper.path} to start again") from error
    if keeper.path is None:
        return dataloader
    if keeper.position:
        _log.info("%s: going on after %d batches", keeper.path, keeper.position)
    return keeper.watched(resumed(dataloader, keeper.position, keeper.last_hash))


def _told(run: Run, bar: tqdm[tuple[int, Any, FlatInputs]]) -> Iterator[tuple[Any, tuple[int, FlatInputs]]]:
    """Pass on the batches of a progress bar, and show on it now and then how many tensors are too large for fp16."""
    told = -math.inf
    for index, batch, flat in bar:
        yield batch, (index, flat)
        last = index + 1 == bar.total
        if not bar.disable and (last or time.monotonic() - told > _TELL_SECONDS):
            bar.set_postfix_str(f"{run.observer.above(HALF_MAX)} tensors above {HALF_MAX:g}")
            told = time.monotonic()


def _warn_nonfinite(run: Run, table: RangeTable) -> None:
    bad = table.frame.filter(pl.col("nonfinite_batch").is_not_null())
    # Weights are left out: the warning is about data. It names the earliest batch and the first node in it.
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


def _warn_zeros(table: RangeTable) -> None:
    """Inputs that are zero throughout are more often a mistake in loading than data: their ranges allow anything."""
    zero = table.frame.filter(pl.col("kind") == "input", pl.col("absmax") == 0.0, pl.col("masked") == 0)
    if zero.height:
        names = listed(zero["node"].to_list(), 4)
        warnings.warn(
            f"{counted(zero.height, 'input')} held nothing but zeros, in every batch: {names}. Check how the data are "
            "loaded: ranges from such data say nothing about other data.",
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
