"""Measures over a few batches what rounding at each edge does to the outputs. It never makes a batch fail."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from calibcast.calib.cuda_graphs import Replays
from calibcast.calib.errors import MismatchError, first_line
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.flat_regions import flat_regions
from calibcast.calib.flattening import flatten, qualified_name
from calibcast.calib.gc_pause import paused
from calibcast.calib.graph import input_targets, tensor_values
from calibcast.calib.masks import mask_tensors
from calibcast.calib.random_draws import any_may_draw, random_state, set_random_state
from calibcast.calib.rounding import fp32_kernels
from calibcast.calib.rounding_channel import ending_in_channel
from calibcast.calib.rounding_edges import Edge, output_types, rounding_edges
from calibcast.calib.rounding_findings import Findings, Found
from calibcast.calib.rounding_groups import Rounder
from calibcast.calib.rounding_statistics import RoundingRecord, RoundingStatistics
from calibcast.calib.rounding_step_sweep import with_steps
from calibcast.calib.rounding_sums import kernel_for
from calibcast.calib.rounding_sweep import LOW_TYPES, Sweep, draw_signs, empty_signs
from calibcast.calib.rounding_table import MOST_OUTPUTS
from calibcast.calib.rounding_tape import Tape, record
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

_log = logging.getLogger("calibcast")


class RoundingObserver:
    """Evidence from the first `most` batches that it is shown; see `calib.rounding_sweep` for how it is measured.

    An edge or a whole batch that cannot be measured is noted with the reason, and left to other rules. Memory: the
    activations of one batch, and about as much again while it is swept; on a GPU, a CUDA graph keeps it until the last.
    """

    def __init__(self, runner: ProgramRunner, most: int) -> None:
        self._runner, self._most = runner, most
        self.record = self._empty() if most > 0 else RoundingRecord()

    def measure(self, flat: Sequence[Any], index: int, state: Mapping[str, torch.Tensor]) -> None:
        """Measure batch `index`, unless `most` were shown. `state`: what the program's buffers held before it."""
        if self.record.seen >= self._most:
            return
        self.record = replace(self.record, seen=self.record.seen + 1)
        try:
            with paused(), _process_left_alone(), fp32_kernels():
                measured = self._sweep(flat, index, state)
        except Exception as error:
            reason = f"batch {index}: {type(error).__name__}: {first_line(error)}"
            _log.warning("no evidence of rounding from %s", reason)
            measured = {(edge, low): reason for edge in self._edges for low in LOW_TYPES}
        if self.record.seen >= self._most and self._replays is not None:
            self._replays.give_up()
        self._take(measured, index)

    def of_channel(
        self, flat: Sequence[Any], state: Mapping[str, torch.Tensor], output: int, channel: int, expected: torch.Tensor
    ) -> dict[torch.dtype, dict[Edge, float]]:
        """The noise that each edge makes in one channel of one output of one batch; edges that lack evidence are left
        out. output: among the program's own. expected: what the program gives there.
        """
        place = [i for i, users in enumerate(self._results) if users][output]
        graph = ending_in_channel(self._graph, place, channel, expected)
        with _process_left_alone(), fp32_kernels():
            operands = [_plain(value) for value in self._runner.operands(self._runner.to_device(flat), state)]
            tape = record(graph, operands, self._runner.moved_to)
            found = Sweep(tape, self._by_reader, Rounder(tape, *self._names), 0, coherent=True).run()
        noises: dict[torch.dtype, dict[Edge, float]] = {low: {} for low in LOW_TYPES}
        for (edge, low), result in found.items():
            if isinstance(result, Found):
                noises[low][edge] = sum(result.noise)
        return noises

    def restore(self, record: RoundingRecord) -> None:
        """Continue from the record of an earlier run of the same program.

        Raises MismatchError where its edges differ.
        """
        if not record.has_edges_of(self.record):
            raise MismatchError("the checkpoint has other edges of rounding")
        self.record = replace(record.copy(), edges=self.record.edges)

    @cached_property
    def _edges(self) -> tuple[Edge, ...]:
        return rounding_edges(self._runner.program)

    @cached_property
    def _graph(self) -> fx.GraphModule:
        return flatten(self._runner.program.graph_module)

    @cached_property
    def _results(self) -> list[bool]:
        """Which of the graph's results are the user's."""
        return [s.kind == OutputKind.USER_OUTPUT for s in self._runner.program.graph_signature.output_specs]

    def _empty(self) -> RoundingRecord:
        kinds = output_types(self._runner.program, self._graph)
        apart = sum(kind.is_floating_point for kind in kinds) <= MOST_OUTPUTS
        columns = max(1, len(kinds)) if apart else 1
        return RoundingRecord(self._edges, apart, RoundingStatistics.empty(len(self._edges), columns))

    @cached_property
    def _by_reader(self) -> dict[str, list[Edge]]:
        inside = {qualified_name(node) for node in flat_regions(self._graph.graph)}
        found: dict[str, list[Edge]] = {}
        for edge in self._edges:
            if edge.node not in inside:
                found.setdefault(edge.node, []).append(edge)
        return found

    @cached_property
    def _rows(self) -> dict[tuple[Edge, torch.dtype], int]:
        return {key: row for row, key in enumerate((edge, low) for edge in self._edges for low in LOW_TYPES)}

    @cached_property
    def _names(self) -> tuple[frozenset[str], frozenset[str]]:
        """The names of masks, and those of weights."""
        return mask_tensors(self._runner.program), frozenset(input_targets(self._runner.program))

    def _sweep(self, flat: Sequence[Any], index: int, state: Mapping[str, torch.Tensor]) -> Findings:
        operands = [_plain(value) for value in self._runner.operands(self._runner.to_device(flat), state)]
        if self._replays is not None and not state:
            launched = self._replays.of(operands, lambda pair: draw_signs(pair[1], index))
            if launched is not None:
                if (found := launched[0].finish(index)) is not None:
                    return with_steps(launched[0], index, found)
                self._replays.give_up()
        sweep = self._begun(operands, index)
        return sweep.run(partial(with_steps, sweep, index))

    def _begun(self, operands: Sequence[Any], index: int, signs: Sequence[torch.Tensor] | None = None) -> Sweep:
        tape = record(self._graph, operands, self._runner.moved_to)
        outputs = [value for value, users in zip(tape.outputs, self._results, strict=True) if users]
        tape = Tape(tape.calls, tape.made, outputs)
        return Sweep(tape, self._by_reader, Rounder(tape, *self._names), index, signs=signs)

    def _signs(self, operands: Sequence[Any]) -> list[torch.Tensor]:
        """Tensors for the random signs. They are not allocated while the sweep is recorded: a recording uses memory
        again, so it would write over what is drawn before it runs.
        """
        if self._known_outputs:
            return empty_signs(self._known_outputs, self._runner.device)
        tape = record(self._graph, operands, self._runner.moved_to)
        given = [value for value, users in zip(tape.outputs, self._results, strict=True) if users and value is not None]
        signs = empty_signs([value.tensor for value in given])
        tape.forget()
        return signs

    @cached_property
    def _known_outputs(self) -> list[torch.Tensor]:
        """The user's results, as the export has noted them; none where their sizes are open, or where the program is on
        several devices: then a run tells. The program may have moved since the export.
        """
        results = pytree.tree_leaves(next(iter(reversed(self._graph.graph.nodes))).args[0])
        given = [node for node, users in zip(results, self._results, strict=True) if users]
        values = [node.meta.get("val") if isinstance(node, fx.Node) else None for node in given]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        devices = {value.device for node in self._graph.graph.nodes for _, value in tensor_values(node)}
        fixed = all(isinstance(size, int) for value in tensors for size in value.shape)
        return tensors if fixed and len(devices) == 1 and len(tensors) == len(given) else []

    def _launched(self, operands: Sequence[Any], signs: list[torch.Tensor]) -> tuple[Sweep, list[torch.Tensor]]:
        sweep = self._begun(operands, 0, signs)
        try:
            sweep.launch()
        except BaseException:
            sweep.forget()
            raise
        return sweep, signs

    @cached_property
    def _replays(self) -> Replays[tuple[Sweep, list[torch.Tensor]], list[torch.Tensor]] | None:
        """Sweeps by a CUDA graph, from the first batch on; None where the program cannot be recorded."""
        if self._runner.device.type != "cuda" or any_may_draw(self._runner.program) or flat_regions(self._graph.graph):
            return None
        kernel_for(torch.empty(0, device=self._runner.device).device)  # tried out before a recording begins
        specs = self._runner.program.graph_signature.input_specs
        fixed = [spec.kind != InputKind.USER_INPUT for spec in specs]
        return Replays(
            self._runner.device, self._launched, self._signs, fixed, forget=lambda launched: launched[0].forget()
        )

    def _take(self, measured: Findings, index: int) -> None:
        into = self.record.statistics
        batch = RoundingStatistics.empty(len(self._edges), into.noise.shape[1])
        found: dict[int, Found] = {}
        for key, row in self._rows.items():
            result = measured.get(key, "it is inside a region that is run as a whole")
            if isinstance(result, Found):
                found[row] = result
            else:
                batch.missing[row] = result
        if found:
            rows, results = torch.tensor(list(found)), list(found.values())
            batch.noise[rows] = torch.tensor([result.noise for result in results], dtype=torch.float64)
            batch.worst[rows], batch.worst_batch[rows] = batch.noise[rows].sum(1), index
            batch.local[rows] = torch.tensor([result.local for result in results], dtype=torch.float64)
            for name in ("nonfinite", "steps", "ran"):
                getattr(batch, name)[rows] = torch.tensor([int(getattr(result, name)) for result in results])
            batch.batches[rows] = 1
        into.merge(batch)


def _plain(value: Any) -> Any:
    """A tensor that autograd accepts: it refuses those made under `torch.inference_mode`."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


@contextmanager
def _process_left_alone() -> Iterator[None]:
    """Restore the random state at the end, also after an error, and allow gradients inside."""
    state = random_state()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        set_random_state(state)
