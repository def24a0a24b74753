"""Streams the tensors of a running program into preallocated rows. The only mutable object of a calibration."""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from calibcast.calib.execution import tensors_of
from calibcast.calib.graph import TensorSpec
from calibcast.calib.hidden import hidden_values
from calibcast.calib.kernel import HostKernel, measure_on_device
from calibcast.calib.memory_layout import is_dense
from calibcast.calib.plain_tensors import is_plain
from calibcast.calib.sentinels import MASK_AT_MOST
from calibcast.calib.small_tensors import SmallTensors
from calibcast.calib.statistics import Statistics
from torch import fx

Row = tuple[str, int]  # (qualified node name, output position)
# Tells whether a tensor still holds what was measured: address, size, type and version counter.
_Identity = tuple[int, int, torch.dtype, int]


class Observer:
    """Statistics of every row, per batch and in total: a fixed number of bytes, allocated once.

    One batch is measured into its own rows and merged at its end, so that a batch can be dropped whole.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        device: torch.device,
        histogram: bool,
        masks: frozenset[str] = frozenset(),
    ) -> None:
        self._rows: dict[Row, int] = {(spec.node, spec.output): i for i, spec in enumerate(specs)}
        self._masks = {row for (name, _), row in self._rows.items() if name in masks}
        self._histogram = histogram
        self._kernel = HostKernel(histogram) if device.type == "cpu" else None
        self._small = SmallTensors(histogram) if self._kernel is not None else None
        self._copies: dict[int, int] = {}
        self._batch = Statistics.empty(len(specs), histogram, device)
        self.total = Statistics.empty(len(specs), histogram, device)
        self._index = 0
        self._seen: dict[int, _Identity] = {}

    def start(self, index: int) -> None:
        """Begin batch `index`."""
        self._batch.clear()
        self._seen.clear()
        self._copies.clear()
        if self._small is not None:
            self._small.clear()
        self._index = index

    def watch(self, name: str, node: fx.Node, result: Any, arguments: dict[fx.Node, Any]) -> None:
        """Measure what `node` gave. A `calib.execution.Watch`."""
        for output, tensor in tensors_of(node, result):
            row = self._rows.get((name, output))
            # A run may give what the export did not foresee: a fake tensor is never quantised.
            if row is not None and tensor.numel() and is_plain(tensor):
                self._record(row, name, node, tensor, arguments)
        row = self._rows.get((name, 0))
        if row is not None:
            self._look_inside(row, node, arguments)

    def measure(self, name: str, tensor: torch.Tensor) -> None:
        """Measure a tensor that no node computes: a parameter, a buffer or a constant."""
        row = self._rows.get((name, 0))
        if row is not None and tensor.numel():
            self._write(row, tensor)

    def first_nonfinite(self) -> int | None:
        """The first row of the batch so far that has NaN or Inf. Waits for the device."""
        self._settle()
        rows = self._batch.nonfinite().nonzero()
        return int(rows[0]) if len(rows) else None

    def finish(self) -> None:
        """Merge the batch into the total."""
        self._settle()
        batch = self._batch
        batch.absmax_batch.copy_(torch.where(batch.batches > 0, self._index, batch.absmax_batch))
        batch.nonfinite_batch.copy_(torch.where(batch.nonfinite() > 0, self._index, batch.nonfinite_batch))
        self.total.merge(batch)

    def above(self, limit: float) -> int:
        """How many tensors have passed `limit` in magnitude so far. Waits for the device."""
        return int((self.total.absmax() > limit).sum())

    def _look_inside(self, row: int, node: fx.Node, arguments: dict[fx.Node, Any]) -> None:
        hidden = hidden_values(node, arguments)
        if hidden is not None:
            self._batch.hidden[row, :2] = hidden

    def _record(self, row: int, name: str, node: fx.Node, tensor: torch.Tensor, arguments: dict[fx.Node, Any]) -> None:
        identity = _identity(tensor)
        source = self._same_elements(row, name, node, identity, arguments) if identity is not None else None
        if source is None:
            self._write(row, tensor)
        else:
            self._copy(source, row)
        if identity is not None:
            self._seen[row] = identity

    def _same_elements(
        self, row: int, name: str, node: fx.Node, identity: _Identity, arguments: dict[fx.Node, Any]
    ) -> int | None:
        """The row of an argument with exactly the same elements: `node` is a view, a permutation or an idle dropout."""
        prefix = name.removesuffix(node.name)
        for argument in node.all_input_nodes:
            source = self._rows.get(_row_of(argument, prefix))
            if source is not None and self._seen.get(source) == identity and self._alike(source, row):
                value = arguments.get(argument)
                if isinstance(value, torch.Tensor) and _identity(value) == identity:
                    return source
        return None

    def _alike(self, source: int, row: int) -> bool:
        """Whether two rows are measured in the same way: mask values are counted apart in both, or in neither."""
        return (source in self._masks) == (row in self._masks)

    def _write(self, row: int, tensor: torch.Tensor) -> None:
        small = self._small
        if small is not None and row not in self._masks and small.takes(tensor):
            if not small.has_room(tensor):
                self._take_small(small)
            small.put(row, tensor)
        else:
            self._write_alone(row, tensor)

    def _write_alone(self, row: int, tensor: torch.Tensor) -> None:
        batch = self._batch
        at_most = MASK_AT_MOST if row in self._masks else None
        mask_min: float | torch.Tensor
        if self._kernel is not None and tensor.device.type == "cpu":
            tally = self._kernel.measure(tensor, at_most)
            values = torch.tensor(tally.values, dtype=torch.float64)
            counts, bins, mask_min = torch.tensor(tally.counts), tally.histogram, tally.mask_min
        else:
            values, counts, bins, mask_min = measure_on_device(tensor, self._histogram, at_most)
        if at_most is not None:
            batch.hidden[row, 2] = mask_min
        batch.values[row] = values
        batch.counts[row] = counts
        if batch.histograms is not None and bins is not None:
            batch.histograms[row] = bins
        batch.batches[row].fill_(1)

    def _copy(self, source: int, row: int) -> None:
        if self._small is None:
            self._copy_rows(source, row)
        else:  # the source may not have been measured yet
            self._copies[row] = self._copies.get(source, source)

    def _take_small(self, small: SmallTensors) -> None:
        """Copy the statistics of buffered small tensors into the batch's rows."""
        found = small.take()
        if found is None:
            return
        batch, rows = self._batch, found.rows
        batch.values[rows] = found.values
        batch.counts[rows] = found.counts
        batch.batches[rows] = 1
        if batch.histograms is not None and found.histograms is not None:
            batch.histograms[rows] = found.histograms

    def _settle(self) -> None:
        """Measure what is buffered, then copy rows that equal another row."""
        if self._small is not None:
            self._take_small(self._small)
        if self._copies:
            self._copy_rows(list(self._copies.values()), list(self._copies))
            self._copies.clear()

    def _copy_rows(self, sources: int | list[int], rows: int | list[int]) -> None:
        batch = self._batch
        for array in (batch.values, batch.counts, batch.histograms, batch.batches):
            if array is not None:
                array[rows] = array[sources]
        batch.hidden[rows, 2] = batch.hidden[sources, 2]


def _row_of(node: fx.Node, prefix: str) -> Row:
    """The row under which the tensor of an argument was measured; a `getitem` stands for an output of its producer."""
    if node.target is getitem and isinstance(node.args[1], int):
        producer = node.args[0]
        assert isinstance(producer, fx.Node)
        return prefix + producer.name, node.args[1]
    return prefix + node.name, 0


def _identity(tensor: torch.Tensor) -> _Identity | None:
    # Tensors made under torch.inference_mode keep no version, so nothing tells whether they were written to.
    # A lazily negated view has the address of its source, but other values.
    if tensor.is_inference() or tensor.is_neg() or not is_dense(tensor):
        return None
    return tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor._version
