"""The running statistics of an engine's ends, on the device that it runs on, read without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from calibcast.calib.device_observer import observer_for, on
from calibcast.calib.input_sizes import count_size
from calibcast.calib.range_schema import Calibration
from calibcast.calib.range_statistics import frames_of
from calibcast.calib.ranges import RangeTable
from calibcast.calib.statistics import Statistics
from calibcast.engines.monitoring.ends import End
from calibcast.engines.monitoring.findings import Seen


class Tally:
    """Statistics of each end over the watched calls, with the kernels, bins and merging of calibration.

    It takes one call at a time: the caller holds a lock. Calls may come on different streams of a GPU.
    """

    def __init__(self, ends: Sequence[End], device: torch.device) -> None:
        self._ends, self._device = tuple(ends), device
        masks = frozenset(str(i) for i, end in enumerate(ends) if end.is_mask)
        # Rows are named by number: two outputs of an operator are two rows, but an observer keeps one for each name.
        specs = [replace(end.spec, node=str(i), output=0) for i, end in enumerate(ends)]
        with torch.inference_mode(False):  # a tensor made in inference mode cannot be written to outside it
            self._observer = observer_for(specs, device, True, masks)
        on_gpu = device.type == "cuda"
        # torch has no type annotations for its events.
        self._measured: Any = cast("Any", torch.cuda).Event() if on_gpu else None
        self._copied: Any = cast("Any", torch.cuda).Event() if on_gpu else None
        self._host: list[torch.Tensor] = []
        self.sizes: dict[str, list[dict[str, int]]] = {}
        self.watched = 0

    def add(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Add one call. On a GPU this only queues work on the device, behind the engine's."""
        with on(self._device), torch.no_grad():
            self._wait()
            self._observer.start(self.watched)
            for row, end in enumerate(self._ends):
                value = (inputs if end.is_input else outputs)[end.place]
                if isinstance(value, torch.Tensor):
                    self._observer.measure(str(row), value.detach())
                    if end.is_input:
                        self._note_sizes(end.name, value)
            self._observer.finish()
            self.watched += 1
            if self._measured is not None:
                self._measured.record()

    def _wait(self) -> None:
        """Make the current stream wait for the last measurement, which may be on another stream. The host does not
        wait."""
        if self._measured is not None:
            torch.cuda.current_stream(self._device).wait_event(self._measured)

    def _note_sizes(self, name: str, value: torch.Tensor) -> None:
        counts = self.sizes.setdefault(name, [{} for _ in value.shape])
        for dimension, size in zip(counts, value.shape, strict=True):
            count_size(dimension, str(int(size)))

    def ask(self) -> None:
        """Queue a copy to the host of the numbers that findings are made from, behind the measurements."""
        total = self._observer.total
        if self._copied is None:
            self._host = [total.values, total.counts]
            return
        with on(self._device):
            self._wait()
            if not self._host:
                self._host = [torch.empty_like(t, device="cpu", pin_memory=True) for t in (total.values, total.counts)]
            for host, array in zip(self._host, (total.values, total.counts), strict=True):
                host.copy_(array, non_blocking=True)
            self._copied.record()

    def ready(self) -> bool:
        """Whether the numbers that `ask` copies have arrived. Does not wait."""
        return self._copied is None or bool(self._copied.query())

    def seen(self) -> list[Seen]:
        """The numbers that `ask` copied; call it when they are ready."""
        values, counts = (array.tolist() for array in self._host)
        return [Seen(v[0], v[1], c[1], c[2], c[3]) for v, c in zip(values, counts, strict=True)]

    def statistics(self) -> Statistics:
        """All statistics so far, on the host. Waits for the device, also for the copy of `ask`."""
        for event in (self._measured, self._copied):
            if event is not None:
                event.synchronize()
        return self._observer.total.to("cpu", copy=True)

    def table(self, calibration: Calibration) -> RangeTable:
        """The range table of the ends. Waits for the device."""
        frame, hidden = frames_of([end.spec for end in self._ends], self.statistics())
        return RangeTable(frame, calibration, hidden)
