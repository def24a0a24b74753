"""Run a program and its measurements as one CUDA graph, so that a batch costs one launch.

An interpreter launches each kernel from Python. On a GPU that takes longer than the kernels themselves, up to networks
of medium size. The first batch of each input size runs in the interpreter. The second is captured together with the
measuring kernels, and later ones are replayed. What cannot be captured (an operator that reads from the device, or too
little memory for a second copy of the activations) stays in the interpreter, and this is logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from calibcast.calib.device_observer import DeviceObserver, Layout
from calibcast.calib.execution import NodeError, ProgramRunner, Watch

_log = logging.getLogger("calibcast")
_Key = tuple[Any, ...]
# Each captured graph keeps its inputs; the activations share one pool. More sizes are not worth the memory.
MOST_GRAPHS = 8


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Any]
    layout: Layout


class CapturedRunner:
    """Runs batches as `ProgramRunner.run_batch` does, by replaying a CUDA graph where one could be captured."""

    def __init__(self, runner: ProgramRunner, observer: DeviceObserver) -> None:
        self._runner, self._observer = runner, observer
        self._graphs: dict[_Key, _Captured | None] = {}
        self._seen: set[_Key] = set()
        self._pool: Any = None
        self.replayed = 0

    def run_batch(self, flat: Sequence[Any], index: int, watch: Watch) -> None:
        """Run batch `index`, measured by `watch`; its outputs are not kept. Starts the observer's batch."""
        key = _key(flat)
        captured = self._graphs.get(key)
        if captured is None and key in self._seen and key not in self._graphs:
            captured = self._graphs[key] = self._capture(flat, index, watch)
        self._seen.add(key)
        if captured is None:
            self._observer.start(index)
            self._runner.run_batch(flat, index, watch)
            return
        self._observer.start(index, captured.layout)
        for static, value in zip(captured.inputs, flat, strict=True):
            if isinstance(static, torch.Tensor):
                static.copy_(value, non_blocking=True)
        captured.graph.replay()
        self.replayed += 1

    def _capture(self, flat: Sequence[Any], index: int, watch: Watch) -> _Captured | None:
        if len(self._graphs) >= MOST_GRAPHS:
            return None
        inputs = [v.to(self._runner.device, copy=True) if isinstance(v, torch.Tensor) else v for v in flat]
        graph = torch.cuda.CUDAGraph()
        self._observer.start(index)
        torch.cuda.synchronize(self._runner.device)
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._runner.run(inputs, watch)
        except (RuntimeError, NodeError) as error:
            torch.cuda.synchronize(self._runner.device)
            _log.info("batches of this size run in the interpreter, as they cannot be captured: %s", error)
            return None
        self._pool = self._pool or graph.pool()
        return _Captured(graph, inputs, self._observer.layout)


def _key(flat: Sequence[Any]) -> _Key:
    return tuple((v.shape, v.dtype) if isinstance(v, torch.Tensor) else v for v in flat)


def captured_or_plain(runner: ProgramRunner, observer: Any) -> Callable[[Sequence[Any], int, Watch], Any]:
    """How to run a batch with this observer: captured where both are on a GPU, else by the interpreter.

    The returned function also starts the observer's batch.
    """
    if isinstance(observer, DeviceObserver) and runner.device.type == "cuda" and not runner.carries_state:
        return CapturedRunner(runner, observer).run_batch

    def plain(flat: Sequence[Any], index: int, watch: Watch) -> None:
        observer.start(index)
        runner.run_batch(flat, index, watch)

    return plain
