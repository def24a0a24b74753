"""An observer for GPUs: one kernel a tensor instead of some twenty, and nothing else between two nodes.

What a row is (its size, which other row it equals) is known on the host when a node is watched. It is noted there and
brought to the device once for each way in which a program can run, not for each batch.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from calib.columns import BINS
from calib.graph import TensorSpec
from calib.kernel import is_dense
from calib.observer import Observer
from calib.sentinels import MASK_AT_MOST

_log = logging.getLogger("calibcast")
# Elements of one step of one program: four for each of its threads, which is 80 registers (ptxas, sm_90), so that three
# programs fit on a multiprocessor. As many programs as an H200's 132 hold. Each has a place of its own: 20 KB a tensor.
BLOCK, WARPS, PROGRAMS = 1024, 8, 396
_MOST = (1 << 31) - 1
_NOTHING = (math.inf, math.inf, math.inf, -math.inf)  # least, smallest magnitude, lowest mask value, largest
_TYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


@dataclass
class Layout:
    """What one way of running a program writes into which row: sizes of measured rows, and rows that equal others."""

    sizes: dict[int, int] = field(default_factory=dict)
    equals: dict[int, int] = field(default_factory=dict)
    _tensors: tuple[torch.Tensor, ...] | None = None

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Rows, their sizes, rows that equal others, and which: int64, on the device, made once."""
        if self._tensors is None:
            lists = (list(self.sizes), list(self.sizes.values()), list(self.equals), list(self.equals.values()))
            self._tensors = tuple(torch.tensor(values, dtype=torch.int64, device=device) for values in lists)
        return self._tensors


class DeviceObserver(Observer):
    """An `Observer` whose batch is measured by one fused kernel a tensor. Needs Triton, which comes with torch on GPUs.

    Tensors that the kernel does not take (float64, expanded ones, ones with gaps) are measured as `Observer` does.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        device: torch.device,
        histogram: bool,
        masks: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(specs, device, histogram, masks)
        rows = len(specs)
        self._tally = importlib.import_module("calib.triton_kernel").tally
        self._nothing = torch.tensor(_NOTHING, dtype=torch.float32, device=device)
        self._values = self._nothing.repeat(rows, PROGRAMS, 1)
        self._counts = torch.zeros(rows, PROGRAMS, 5, dtype=torch.int32, device=device)
        self._sums = torch.zeros(rows, PROGRAMS, 2, dtype=torch.float64, device=device)
        self._bins = torch.zeros(rows if histogram else 1, BINS, dtype=torch.int64, device=device)
        self.layout = Layout()
        self._decoded = False

    def start(self, index: int, layout: Layout | None = None) -> None:
        """Begin batch `index`. `layout`: of a run that is replayed, in which nothing is watched."""
        super().start(index)
        self._values.copy_(self._nothing.expand_as(self._values))
        for array in (self._counts, self._sums, self._bins):
            array.zero_()
        self.layout = Layout() if layout is None else layout
        self._decoded = False

    def first_nonfinite(self) -> int | None:
        self._decode()
        return super().first_nonfinite()

    def finish(self) -> None:
        self._decode()
        super().finish()

    def _write(self, row: int, tensor: torch.Tensor) -> None:
        size = tensor.numel()
        elsewhere = tensor.device != self._values.device  # weights are measured where they are
        if elsewhere or tensor.dtype not in _TYPES or tensor.is_neg() or not is_dense(tensor) or size > _MOST - BLOCK:
            super()._write(row, tensor)
            return
        masked = row in self._masks
        programs = min(PROGRAMS, -(-size // BLOCK))
        flat = tensor.detach().as_strided((size,), (1,), tensor.storage_offset())
        self._tally[(programs,)](
            flat, self._values, self._counts, self._sums, self._bins, size, row, MASK_AT_MOST if masked else 0.0,
            PLACES=PROGRAMS, MASKED=masked, HISTOGRAM=self._histogram, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        self.layout.sizes[row] = size

    def _copy(self, source: int, row: int) -> None:
        root = self.layout.equals.get(source, source)
        if root in self.layout.sizes:
            self.layout.equals[row] = root
        else:
            super()._copy(source, row)

    def _decode(self) -> None:
        """Bring what the kernels wrote into the batch's rows. Once a batch, for all rows at once."""
        if self._decoded:
            return
        self._decoded = True
        batch = self._batch
        rows, sizes, copies, sources = self.layout.tensors(self._values.device)
        values = self._values[rows]
        low, small, lowest = values[:, :, :3].amin(1).double().unbind(1)
        high = values[:, :, 3].amax(1).double()
        batch.values[rows] = torch.cat([torch.stack([low, high, small], 1), self._sums[rows].sum(1)], 1)
        batch.counts[rows] = torch.cat([sizes[:, None], self._counts[rows].sum(1)], 1)
        batch.batches[rows] = 1
        if batch.histograms is not None:
            batch.histograms[rows] = self._bins[rows]
        batch.hidden[rows, 2] = torch.minimum(batch.hidden[rows, 2], lowest)
        for array in (batch.values, batch.counts, batch.batches, batch.histograms):
            if array is not None:
                array[copies] = array[sources]
        batch.hidden[copies, 2] = batch.hidden[sources, 2]


def fused_problem(device: torch.device) -> str | None:
    """Why tensors on `device` cannot be measured by one kernel each; None when they can."""
    if device.type != "cuda":
        return f"{device.type} is no GPU"
    try:
        importlib.import_module("calib.triton_kernel")
    except Exception as error:  # Triton looks for a driver and a compiler when it is imported
        return f"Triton does not import: {type(error).__name__}: {error}"
    return None


def observer_for(specs: Sequence[TensorSpec], device: torch.device, histogram: bool, masks: frozenset[str]) -> Observer:
    """The fastest observer that works on `device`: the fused one is tried out before it is trusted."""
    problem = fused_problem(device)
    if problem is None:
        try:
            _try_out(device, histogram)
            return DeviceObserver(specs, device, histogram, masks)
        except Exception as error:  # Triton compiles here, with whatever compiler and driver there are
            problem = f"the fused kernel does not work here: {type(error).__name__}: {error}"
    if device.type == "cuda":
        _log.warning("calibration measures without the fused kernel, which is slower: %s", problem)
    return Observer(specs, device, histogram, masks)


def _try_out(device: torch.device, histogram: bool) -> None:
    spec = TensorSpec("x", 0, "", "", "", "activation", "float32", ())
    observer = DeviceObserver([spec], device, histogram)
    observer.start(0)
    observer.measure("x", torch.tensor([-2.0, 0.0, 0.5, float("nan")], device=device))
    observer.finish()
    found, counts = observer.total.values[0].tolist(), observer.total.counts[0].tolist()
    if found != [-2.0, 0.5, 0.5, -1.5, 4.25] or counts != [4, 1, 0, 0, 1, 0]:
        raise RuntimeError(f"it measures [-2, 0, 0.5, nan] as {found}, {counts}")
