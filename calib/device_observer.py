"""An observer for GPUs: one kernel per tensor instead of about twenty, and no waiting between nodes.

The host knows the size of a row, and whether it equals another row, when a node is watched. It notes both, and
copies them to the device once per input size, not once per batch.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from calibcast.calib.graph import TensorSpec
from calibcast.calib.hidden import Slices, SlicesInMemory, slices_of
from calibcast.calib.memory_layout import memory_levels
from calibcast.calib.observer import Observer
from calibcast.calib.sentinels import MASK_AT_MOST
from calibcast.calib.statistic_names import BINS
from torch import fx

_log = logging.getLogger("calibcast")
# BLOCK: elements of a block, eight for each thread of a program (32 with tiles). PROGRAMS: as many as the 132
# multiprocessors of an H100 or H200 hold at once. Each writes to a place of its own: 20 KB a tensor in all. WARPS: four
# took 0.86 of the time of eight for histograms, and as long for ranges (H100, 25.7 million elements).
BLOCK, WARPS, PROGRAMS = 1024, 4, 396
# The most elements of a tensor: int32 must also hold the positions that programs step to beyond its end.
_MOST = (1 << 31) - (1 << 20)
_TYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
# Elements that a program of `sum_slices` takes at a time.
_GROUP = 4096
# A program takes about 0.15 us per step (H100). Above this many steps, torch's own sums are faster, since they split a
# slice among programs.
_STEPS = 512


@dataclass
class Layout:
    """Which rows one way of running a program writes.

    sizes: elements of each measured tensor, by row. equals: each row whose tensor was already measured for another row,
    to that row. attention: rows of attention operators; the sums of their keys are in a tensor of their own.
    """

    sizes: dict[int, int] = field(default_factory=dict)
    equals: dict[int, int] = field(default_factory=dict)
    attention: list[int] = field(default_factory=list)
    _tensors: tuple[torch.Tensor, torch.Tensor] | None = None

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [3, R]: rows, the row that each one's tensor was measured for, its size; and `attention`. Made once."""
        if self._tensors is None:
            roots = {row: row for row in self.sizes} | self.equals
            lists = (list(roots), list(roots.values()), [self.sizes[root] for root in roots.values()])
            # Pinned memory: to copy from any other memory, the host would wait for the device.
            pinned = device.type == "cuda"
            where, attention = (
                torch.tensor(rows, dtype=torch.int64, pin_memory=pinned).to(device, non_blocking=True)
                for rows in (lists, self.attention)
            )
            self._tensors = where, attention
        return self._tensors


class DeviceObserver(Observer):
    """An `Observer` whose batch is measured by one fused kernel a tensor. Needs Triton, which comes with torch on GPUs.

    Tensors that the kernel does not take (float64, or more than two strides) are measured as in `Observer`.
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
        self._tally = importlib.import_module("calibcast.calib.triton_kernel").tally
        self._sum_slices = importlib.import_module("calibcast.calib.triton_slices").sum_slices
        self._gather = importlib.import_module("calibcast.calib.triton_gather").gather
        self._values = torch.empty(rows, PROGRAMS, 4, dtype=torch.float32, device=device)
        self._counts = torch.empty(rows, PROGRAMS, 5, dtype=torch.int32, device=device)
        self._sums = torch.empty(rows, PROGRAMS, 2, dtype=torch.float64, device=device)
        self._bins = torch.zeros(rows if histogram else 1, BINS, dtype=torch.int64, device=device)
        self._keys = torch.zeros(rows, dtype=torch.float64, device=device)
        self.layout = Layout()
        self._decoded = False

    def start(self, index: int, layout: Layout | None = None) -> None:
        """Begin batch `index`. `layout`: that of the captured run, for a replay, in which no node is watched."""
        super().start(index)
        self._bins.zero_()
        self._keys.zero_()
        self.layout = Layout() if layout is None else layout
        self._decoded = False

    def first_nonfinite(self) -> int | None:
        self._decode()
        return super().first_nonfinite()

    def finish(self) -> None:
        self._decode()
        super().finish()

    def _write(self, row: int, tensor: torch.Tensor) -> None:
        size, levels = tensor.numel(), memory_levels(zip(tensor.shape, tensor.stride(), strict=True))
        elsewhere = tensor.device != self._values.device  # weights are measured where they are
        if elsewhere or tensor.dtype not in _TYPES or tensor.is_neg() or len(levels) > 2 or size > _MOST:
            super()._write(row, tensor)
            return
        masked = row in self._masks
        (width, step), pitch = levels[0], levels[1][1] if len(levels) > 1 else 0
        tiled = step == 1 and width % (4 * BLOCK) == 0 and pitch % 4 == 0
        self._tally[(min(PROGRAMS, -(-size // BLOCK)),)](
            _start_of(tensor), self._values, self._counts, self._sums, self._bins, size, row,
            MASK_AT_MOST if masked else 0.0, width, step, pitch,
            GAPS=0 if step == len(levels) == 1 else 1 if tiled else 2, PLACES=PROGRAMS, MASKED=masked,
            HISTOGRAM=self._histogram, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        self.layout.sizes[row] = size

    def _copy(self, source: int, row: int) -> None:
        root = self.layout.equals.get(source, source)
        if root in self.layout.sizes:
            self.layout.equals[row] = root
        else:
            super()._copy(source, row)

    def _look_inside(self, row: int, node: fx.Node, arguments: dict[fx.Node, Any]) -> None:
        parts = slices_of(node, arguments)
        places = [found for slices in parts if (found := self._places_of(slices)) is not None]
        if not parts or len(places) < len(parts):
            super()._look_inside(row, node, arguments)
            return
        hidden = self._batch.hidden
        self._sum(parts[0], places[0], hidden, row * hidden.stride(0))
        if len(parts) == 2:
            self._sum(parts[1], places[1], self._keys, row)
            self.layout.attention.append(row)

    def _places_of(self, slices: Slices) -> SlicesInMemory | None:
        """Where the slices lie, for `sum_slices`; None where it cannot take them, or would be slow."""
        x = slices.x
        if x.device != self._values.device or x.dtype not in _TYPES or x.is_neg() or x.numel() > _MOST:
            return None
        places = slices.in_memory()
        return places if places is not None and _steps(places) <= _STEPS else None

    def _sum(self, slices: Slices, places: SlicesInMemory, found: torch.Tensor, place: int) -> None:
        rows, columns = _group(places)
        self._sum_slices[(_programs(places),)](
            _start_of(slices.x), found.view(torch.int64), place,
            places.count, places.length, places.apart, places.width, places.step, places.pitch,
            SQUARES=slices.squares, SPREAD=slices.spread, ADJACENT=places.apart == 1, ROWS=rows, COLUMNS=columns,
            num_warps=8 if columns > 1 else 4,
        )  # fmt: skip

    def _decode(self) -> None:
        """Copy the kernels' results into the batch's rows, once per batch and for all rows at once."""
        if self._decoded:
            return
        self._decoded = True
        batch = self._batch
        where, attention = self.layout.tensors(self._values.device)
        if where.shape[1]:
            bins = self._bins if batch.histograms is None else batch.histograms
            self._gather[(where.shape[1],)](
                where, where.shape[1], self._values, self._counts, self._sums, self._bins,
                batch.values, batch.counts, batch.batches, batch.hidden, bins,
                PLACES=PROGRAMS, LANES=_power(PROGRAMS), HISTOGRAM=self._histogram, BLOCK=BLOCK,
            )  # fmt: skip
        if len(attention):
            logits = (batch.hidden[attention, 0] * self._keys[attention]).sqrt()
            batch.hidden[attention, 0] = logits.nan_to_num(nan=math.inf, posinf=math.inf)


def _group(places: SlicesInMemory) -> tuple[int, int]:
    """How many slices a program takes at a time, and how many elements of each."""
    columns = min(_power(places.length), 1024) if places.apart == 1 else 1
    # At least as many slices as lie in one cache line, but not so many that some programs have none.
    fair = _power(max(1, places.count // (2 * PROGRAMS)))
    return min(_GROUP // columns, 1024, max(32, fair) if columns == 1 else 1024, _power(places.count)), columns


def _programs(places: SlicesInMemory) -> int:
    return min(-(-places.count // _group(places)[0]), 2 * PROGRAMS)


def _steps(places: SlicesInMemory) -> int:
    """The number of steps that one program of `sum_slices` takes."""
    rows, columns = _group(places)
    return -(-places.count // (rows * _programs(places))) * -(-places.length // columns)


def _start_of(tensor: torch.Tensor) -> torch.Tensor:
    """A view of one element at the tensor's start, which tells a kernel where its memory begins."""
    return tensor.detach().as_strided((1,), (1,), tensor.storage_offset())


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one: Triton launches and CUDA graphs use the current GPU, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _power(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def fused_problem(device: torch.device) -> str | None:
    """Why tensors on `device` cannot be measured by one kernel each; None when they can."""
    if device.type != "cuda":
        return f"{device.type} is no GPU"
    try:
        importlib.import_module("calibcast.calib.triton_kernel")
    except Exception as error:  # Triton looks for a driver and a compiler when it is imported
        return f"Triton does not import: {type(error).__name__}: {error}"
    return None


def observer_for(specs: Sequence[TensorSpec], device: torch.device, histogram: bool, masks: frozenset[str]) -> Observer:
    """The fastest observer that works on `device`: the fused one is tried out before it is trusted."""
    problem = fused_problem(device)
    if problem is None:
        try:
            with on(device):
                _try_out(device, histogram)
            return DeviceObserver(specs, device, histogram, masks)
        except Exception as error:  # Triton compiles here, with whatever compiler and driver there are
            problem = f"the fused kernel does not work here: {type(error).__name__}: {error}"
    if device.type == "cuda":
        _log.warning("calibration measures without the fused kernel, which is slower: %s", problem)
    return Observer(specs, device, histogram, masks)


def _try_out(device: torch.device, histogram: bool) -> None:
    """Measure a tensor with each variant of the kernels, which compiles them. Raises RuntimeError if one is wrong."""
    kinds = ("dense", "gaps", "masked")
    specs = [TensorSpec(kind, 0, "", "", "", "activation", "float32", ()) for kind in kinds]
    observer = DeviceObserver(specs, device, histogram, frozenset({"masked"}))
    values = torch.tensor([-2.0, 0.0, 0.5, float("nan")], device=device)
    observer.start(0)
    observer.measure("dense", values)
    observer.measure("gaps", values.repeat_interleave(3)[::3])
    observer.measure("masked", torch.cat([values, values.new_tensor([-1e30])]))
    slices = Slices(values.new_tensor([[1.0, 3.0], [2.0, 2.5]]), [1], squares=True, spread=2)
    places = slices.in_memory()
    assert places is not None
    observer._sum(slices, places, observer._batch.hidden, 0)
    observer.finish()
    total = observer.total
    found, counts = total.values.tolist(), total.counts.tolist()
    if found != [[-2.0, 0.5, 0.5, -1.5, 4.25]] * 3 or counts != [[4, 1, 0, 0, 1, 0]] * 2 + [[5, 1, 0, 0, 1, 1]]:
        raise RuntimeError(f"it measures [-2, 0, 0.5, nan] as {found}, {counts}")
    if (sums := total.hidden[0, :2].tolist()) != [10.25, 0.0625]:
        raise RuntimeError(f"it sums the squares of [[1, 3], [2, 2.5]] as {sums}")
