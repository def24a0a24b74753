"""A builder process that is kept for the next build: starting one takes seconds, most of them imports.

At most one is kept. It is started early where a build is sure to come; a command forks it from itself. It ends by
itself when no job has come for a while, which frees its memory and its CUDA context, and it ends with this process. It
is never used again after a build that failed, hung or crashed.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from calibcast.engines.tensorrt.builder.forking import Forked, can_fork, forked

PROCESS = "calibcast.engines.tensorrt.builder.process"
# Nothing that is imported is garbage, so a builder does not look for any until it has started.
_START = f"import gc; gc.disable(); from {PROCESS} import main; main()"
LOG, ANSWERED, READY, EARLY = "builder.log", "answered", "ready", "early"
NO_CUDA = 75  # the status with which a forked builder ends that cannot use the GPU
# Seconds without a job after which a builder ends by itself. The parent does not take a builder that is about to end.
IDLE = 60.0
_LATE = IDLE - 10.0
_Key = tuple[str, tuple[str, ...], bool, str, tuple[tuple[str, str], ...]]
# torch, polars and pytest set these environment variables in a running process.
_SET_ON_THE_WAY = {"TORCHINDUCTOR_CACHE_DIR", "_RJEM_MALLOC_CONF", "PYTEST_CURRENT_TEST", "CUDA_MODULE_LOADING"}
# Environment variables that begin in this way may be read while libraries are imported, or when CUDA starts.
_READ_AT_START = ("CUDA", "LD_", "NVIDIA", "PYTORCH", "TENSORRT", "TORCH", "TRT")


@dataclass(eq=False)
class Worker:
    """A builder process. `ask` gives it the folder of a job; its answers come as `lines`.

    key: what it has in common with the jobs that it has done; None before the first. ready: it has imported, or
    imports, Torch-TensorRT. environment: that of this process when the builder was started.
    """

    process: subprocess.Popen[bytes] | Forked
    start_log: IO[bytes]
    key: _Key | None = None
    ready: bool = False
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    lines: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)
    owner: int = field(default_factory=os.getpid)
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        threading.Thread(target=_read, args=(self.process, self.lines), daemon=True).start()

    def get_ready(self, early: bool = False) -> None:
        """Have the builder import Torch-TensorRT, unless it does already. early: there is time before the first job."""
        if not self.ready:
            self.ready = True
            self._send({READY: EARLY if early else "now"})

    def ask(self, folder: Path) -> bool:
        """Give the builder a job; False when its process has ended meanwhile."""
        assert self.key is not None
        names = {*os.environ, *self.environment}
        changed = {n: os.environ.get(n) for n in names if os.environ.get(n) != self.environment.get(n)}
        search_path = self.key[0]
        return self._send({
            "folder": str(folder), "working_folder": os.getcwd(), "search_path": search_path,
            "environment": {**changed, "PYTHONPATH": search_path},
        })  # fmt: skip

    def _send(self, request: Mapping[str, Any]) -> bool:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except (BrokenPipeError, OSError):
            return False
        return True

    def same_jobs(self, search_path: str) -> _Key:
        """The key of jobs as the builder has done, for this process as it is now."""
        return _key(search_path, () if self.key is None else self.key[1], self.key is not None and self.key[2])

    def serves(self, key: _Key, plain: bool) -> bool:
        """Whether a job with this key may be given to the builder."""
        if time.monotonic() - self.since > _LATE or self.process.poll() is not None:
            return False
        if self.key is not None:
            return self.key == key
        return not (plain and self.ready) and _read_at_start(self.environment) == _read_at_start(os.environ)

    def said_at_start(self) -> str:
        """What the builder and its libraries printed before its first job."""
        self.start_log.seek(0)
        return self.start_log.read().decode(errors="replace")

    def end(self) -> int:
        """End the builder and the processes that it started. Returns its exit status."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        for stream in (self.process.stdin, self.start_log):
            try:
                if stream is not None:
                    stream.close()
            except OSError:  # data not yet written to it are no longer needed
                pass
        return self.process.wait()


def started(search_path: str) -> Worker:
    """A new builder, in a Python of its own. search_path: where it imports from."""
    log = _log()
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _START],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, "PYTHONPATH": search_path},
        start_new_session=True,  # so that processes that the builder starts end with it
    )
    return Worker(process, log)


def fork_early(ready: bool) -> None:
    """Fork a builder for a build that may come, and keep it; nothing where this process cannot be forked safely.

    Imports torch. ready: the build will be one of TensorRT, so the builder gets ready for it now.
    """
    if not can_fork():
        return
    log = _log()
    process = forked(log)
    if process is None:
        return
    worker = Worker(process, log)
    if ready:
        worker.get_ready(early=True)
    keep(worker)


def _log() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="calibcast-builder-")  # it lives as long as the worker


def _read(process: subprocess.Popen[bytes] | Forked, lines: queue.SimpleQueue[bytes | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _key(search_path: str, imports: tuple[str, ...], plain: bool) -> _Key:
    """What the jobs of a builder must have in common: the search path, the imports, whether Torch-TensorRT is there,
    the working folder and the environment."""
    surroundings = tuple(sorted((name, value) for name, value in os.environ.items() if name not in _SET_ON_THE_WAY))
    return search_path, imports, plain, os.getcwd(), surroundings


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {n: v for n, v in environment.items() if n.startswith(_READ_AT_START) and n not in _SET_ON_THE_WAY}


class _Shelf:
    """Holds the one worker that is kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: Worker | None = None

    def take(self, search_path: str, imports: tuple[str, ...], plain: bool = False) -> Worker:
        """The worker for a job: the kept one, or a new one. plain: the job needs no Torch-TensorRT."""
        key = _key(search_path, imports, plain)
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None and kept.owner != os.getpid():  # a forked process must not use its parent's
            kept = None
        if kept is not None and not kept.serves(key, plain):
            kept.end()
            kept = None
        worker = started(search_path) if kept is None else kept
        worker.key = key
        if not plain:
            worker.get_ready()
        return worker

    def keep(self, worker: Worker) -> None:
        worker.since = time.monotonic()
        with self._lock:
            before, self._kept = self._kept, worker
        if before is not None and before is not worker and before.owner == os.getpid():
            before.end()

    def prepare(self, search_path: str) -> None:
        """Have a builder get ready, the kept one or a new one, for a build with TensorRT that is sure to come."""
        kept = self._kept
        if kept is None or kept.owner != os.getpid() or not kept.serves(kept.same_jobs(search_path), False):
            kept = started(search_path)
        kept.get_ready(early=True)
        self.keep(kept)

    def kept(self) -> Worker | None:
        """The worker that is kept now."""
        return self._kept

    def clear(self) -> None:
        """End the worker that is kept, if there is one."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None and kept.owner == os.getpid():
            kept.end()


_SHELF = _Shelf()
atexit.register(_SHELF.clear)
take, keep, prepare, clear, kept = _SHELF.take, _SHELF.keep, _SHELF.prepare, _SHELF.clear, _SHELF.kept
