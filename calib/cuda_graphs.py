"""Record work on a GPU once, as a CUDA graph, and replay it on other inputs: a replay costs one launch.

Launched one by one from Python, small kernels take the host longer than the GPU. What cannot be recorded (an operator
that reads from the device, or too little memory) is left to the caller, and that is logged once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, TypeVar

import torch
from calibcast.calib.execution import NodeError

_log = logging.getLogger("calibcast")
T = TypeVar("T")
P = TypeVar("P")
# Work that cannot be recorded at first may be so once it has run: libraries set themselves up in their first call.
_TRIES = 2
_ONE_AT_A_TIME = threading.Lock()


def recorded(device: torch.device, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """Record what `work` asks of the GPU, without running it. Returns the result of `work`, whose tensors have no
    values yet, and what runs the recording: each time, the same tensors get new values.

    Memory that `work` frees is used again further on. So what is to be written before a replay must be allocated before
    the recording. Raises RuntimeError where something cannot be recorded.
    """
    graph, stream = torch.cuda.CUDAGraph(), _stream(device)
    torch.cuda.synchronize(device)
    # Not by `torch.cuda.graph`, which gives all free memory back to the driver first.
    with _ONE_AT_A_TIME, torch.cuda.stream(stream):
        # Relaxed, since libraries may allocate as they are called for the first time.
        graph.capture_begin(capture_error_mode="relaxed")
        try:
            result = work()
        except BaseException:
            for clear_up in (graph.capture_end, partial(torch.cuda.synchronize, device)):
                with suppress(RuntimeError):  # of the same cause
                    clear_up()
            raise
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return result, graph.replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: libraries keep tens of MB for each stream that they were called on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Recording(Generic[T]):
    """key: what the inputs had in common with those of later calls. inputs: those that the recording reads."""

    key: Any
    inputs: list[Any]
    result: T
    replay: Callable[[], None]


class Replays(Generic[T, P]):
    """Does work on batch after batch by replaying one recording, for as long as the inputs keep their sizes.

    The recording of other sizes takes the place of the last one, as each holds the memory of a whole run.
    """

    def __init__(
        self,
        device: torch.device,
        work: Callable[[list[Any], P], T],
        prepare: Callable[[list[Any]], P],
        fixed: Sequence[bool] = (),
        record: Callable[[torch.device, Callable[[], T]], tuple[T, Callable[[], None]]] = recorded,
        forget: Callable[[T], None] = lambda result: None,
    ) -> None:
        """work: gets the inputs, and what `prepare` made of them before the recording. fixed: those that are the same
        tensors in each call, such as weights. forget: called with a result that is no longer needed.
        """
        self._device, self._work, self._prepare, self._fixed, self._record = device, work, prepare, fixed, record
        self._forget = forget
        self._held: _Recording[T] | None = None
        self._failures = 0
        self.replayed = 0

    def of(self, inputs: Sequence[Any], before: Callable[[T], None] = lambda result: None) -> T | None:
        """The result for these inputs; the next call overwrites its tensors. None where it cannot be recorded.

        before: called when the inputs are in place, before the device computes the result.
        """
        key = _key(inputs)
        if self._held is None or self._held.key != key:
            self._let_go()  # first, so that its memory can be used
            self._held = self._recorded(key, inputs) if self._failures < _TRIES else None
        if (held := self._held) is None:
            return None
        for static, value in zip(held.inputs, inputs, strict=True):
            if isinstance(static, torch.Tensor) and static is not value:
                static.copy_(value, non_blocking=True)
        before(held.result)
        held.replay()
        self.replayed += 1
        return held.result

    def give_up(self) -> None:
        """Record nothing more, and free the memory of the recording."""
        self._let_go()
        self._failures = _TRIES

    def _let_go(self) -> None:
        if self._held is not None:
            self._forget(self._held.result)
        self._held = None

    def _recorded(self, key: Any, inputs: Sequence[Any]) -> _Recording[T] | None:
        fixed = [*self._fixed, *[False] * (len(inputs) - len(self._fixed))]
        own = [
            value.clone() if isinstance(value, torch.Tensor) and not same else value
            for value, same in zip(inputs, fixed, strict=True)
        ]
        try:
            prepared = self._prepare(own)
            result, replay = self._record(self._device, lambda: self._work(own, prepared))
        except (RuntimeError, NodeError) as error:
            self._failures += 1
            if self._failures == _TRIES:
                _log.info("batches are launched kernel by kernel, as they cannot be recorded: %s", error)
            return None
        return _Recording(key, own, result, replay)


def _key(inputs: Sequence[Any]) -> Any:
    return tuple(
        (v.shape, v.stride(), v.dtype, v.device) if isinstance(v, torch.Tensor) else (type(v), repr(v)) for v in inputs
    )
