"""`compare`: a program and its cast graph in lockstep, node by node, on the user's data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterable
from typing import Any

import polars as pl
import torch
from calibcast.calib.batches import numbered, signature_of
from calibcast.calib.execution import ProgramRunner, Ran, naming_batch, require_program, tensors_of
from calibcast.calib.flattening import inlined_name
from calibcast.calib.graph import TensorSpec, dtype_name, tensor_specs
from calibcast.calib.masks import mask_tensors
from calibcast.calib.plain_tensors import is_plain
from calibcast.calib.random_draws import JUDGED, Draws
from calibcast.calib.sentinels import MASK_AT_MOST
from calibcast.calib.uninitialised import undefined_tensors
from calibcast.passes.comparison_result import CULPRIT_DB, SCHEMA, Comparison, NonfiniteNode
from calibcast.passes.graph_match import check_match
from calibcast.passes.lineage import readings
from calibcast.passes.tensor_errors import TensorErrors, decibels_of_changed, rounding_db
from torch.export import ExportedProgram
from tqdm.auto import tqdm

_log = logging.getLogger("calibcast")


def compare(  # noqa: PLR0913 - as calibrate
    program: ExportedProgram,
    mixed: ExportedProgram,
    dataloader: Iterable[Any],
    transform: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Comparison:
    """Run `program` and `mixed`, its cast graph, node by node in turns, and compare what each node gives.

    Both free each tensor after its last reader, so memory is that of two forward passes, plus a few numbers per tensor.
    Both programs are left unchanged. Random numbers are the same for both, and the caller's generators are left as they
    were.

    Args:
        program: the reference, as exported.
        mixed: from `insert_casts(program, plan)`; it may have been saved and loaded.
        dataloader, transform, max_batches, device: as in `calibrate`.

    Raises:
        MismatchError: `mixed` was not made from `program`. BatchError: as in `calibrate`.
    """
    require_program(program)
    require_program(mixed, "mixed", "Give what insert_casts(program, plan) returns.")
    comparing = _Comparing.of(program, mixed, device)
    batches = numbered(dataloader, signature_of(program), transform, max_batches)
    with tqdm(batches, "compare", max_batches, unit="batch", disable=None if progress else True) as bar:
        for index, _, flat in bar:
            with naming_batch(flat, index), torch.no_grad(), comparing.draws.of_batch(index):
                comparing.run(flat, index)
    comparison = comparing.result()
    _log.info("%s", comparison)
    return comparison


class _Comparing:
    """Two programs, and what has been compared of them so far."""

    def __init__(self, ours: ProgramRunner, theirs: ProgramRunner, specs: list[TensorSpec]) -> None:
        self._ours, self._theirs, self._specs = ours, theirs, specs
        self.draws = Draws.of(ours.program, theirs.program, stream=JUDGED)
        self._rows = {(spec.node, spec.output): row for row, spec in enumerate(specs)}
        self._weights = {spec.node for spec in specs if spec.kind not in {"activation", "input"}}
        self._named = {spec.node for spec in specs}
        self._undefined = undefined_tensors(theirs.program)
        self._masks = mask_tensors(theirs.program)
        exact = [row for row, spec in enumerate(specs) if not may_be_near(getattr(torch, spec.dtype))]
        self._errors = TensorErrors(len(specs), theirs.device, exact)
        self._types: dict[int, torch.dtype] = {}
        self._batches = 0

    @classmethod
    def of(cls, program: ExportedProgram, mixed: ExportedProgram, device: Any) -> _Comparing:
        check_match(program, mixed)
        theirs = ProgramRunner(program, device)
        return cls(ProgramRunner(mixed, theirs.device), theirs, tensor_specs(program, lambda _: True))

    def run(self, flat: list[Any], index: int) -> None:
        """One batch through both."""
        flat = self._theirs.to_device(flat)
        ours = self.draws.alone(self._ours.steps(flat))
        for theirs in self.draws.alone(self._theirs.steps(flat)):
            # A weight is the same in every batch.
            if theirs.name in self._named and not (self._batches and theirs.name in self._weights):
                self._compare(_advanced(ours, theirs.name), theirs, index)
        for _ in ours:
            pass
        self._batches += 1

    def _compare(self, ours: Ran, theirs: Ran, index: int) -> None:
        mine = dict(tensors_of(ours.node, ours.result))
        masked = MASK_AT_MOST if theirs.name in self._masks else None
        for output, tensor in tensors_of(theirs.node, theirs.result):
            row = self._rows.get((theirs.name, output))
            if row is None or output not in mine:
                continue
            if not (is_plain(tensor) and is_plain(mine[output])):
                continue
            self._types[row] = mine[output].dtype
            if theirs.name not in self._undefined:
                self._errors.update(row, mine[output], tensor, index, masked)

    def result(self) -> Comparison:
        columns = self._errors.columns()
        inputs, losses = self._losses(columns)
        types = [dtype_name(self._types[row]) if row in self._types else None for row in range(len(self._specs))]
        frame = pl.DataFrame(
            {
                **{name: [getattr(s, name) for s in self._specs] for name in ("node", "output", "op", "module")},
                **{name: [getattr(s, name) for s in self._specs] for name in ("source", "kind")},
                "dtype": types,
                "dtype_reference": [spec.dtype for spec in self._specs],
                "input_sqnr_db": inputs,
                "loss_db": losses,
                **columns,
            },
            schema=SCHEMA,
        )
        culprits = frame.filter(pl.col("loss_db") > CULPRIT_DB)
        worst = [pl.col("nonfinite_alone") == 0, pl.col("unlike") == 0, pl.Series("worth", _worth(columns))]
        return Comparison(
            frame=frame.sort(worst, maintain_order=True),
            culprits=culprits.sort("loss_db", descending=True, maintain_order=True),
            batches=self._batches,
            first_nonfinite=NonfiniteNode.first(frame),
        )

    def _losses(self, columns: dict[str, list[Any]]) -> tuple[list[float], list[float]]:
        """`input_sqnr_db` and `loss_db` of each row."""
        reads = readings(self._theirs.program.graph_module)
        sqnr = [
            -math.inf if alone else math.inf if math.isnan(db) else db
            for db, alone in zip(_worth(columns), columns["nonfinite_alone"], strict=True)
        ]
        changed = [t for row, t in self._types.items() if dtype_name(t) != self._specs[row].dtype]
        rounding = min((rounding_db(dtype) for dtype in changed), default=math.inf)
        inputs, losses = [], []
        for row, spec in enumerate(self._specs):
            rows = [self._rows[read] for read in reads.get(spec.node, ()) if read in self._rows]
            worst = min((sqnr[i] for i in rows), default=math.inf)
            inputs.append(worst)
            before = min(worst, rounding)
            losses.append(before - sqnr[row] if sqnr[row] < before else 0.0)
        return inputs, losses


def may_be_near(dtype: torch.dtype) -> bool:
    """Whether the distance between values of this type means something: not for indices, labels and masks."""
    return dtype.is_floating_point or dtype.is_complex


def _worth(columns: dict[str, list[Any]]) -> list[float]:
    """The SQNR of each row; for an integer row, the SQNR that its changed share counts as."""
    rows = zip(columns["sqnr_db"], columns["changed"], strict=True)
    return [decibels_of_changed(changed) if db is None else db for db, changed in rows]


def _advanced(steps: Generator[Ran, None, Any], name: str) -> Ran:
    """Run the cast graph until it has run the node that stands for `name`."""
    for ran in steps:
        if inlined_name(ran.name) == inlined_name(name):
            return ran
    raise AssertionError(f"{name} was checked to be in both graphs")
