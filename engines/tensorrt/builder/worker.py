"""A builder process that is kept for the next build: starting one takes seconds, most of them imports.

At most one is kept. It is started early where a build is sure to come. It ends by itself when no job has come for a
while, which frees its memory and its CUDA context, and it ends with this process. It is never used again after a build
that failed, hung or crashed.
"""

from __future__ import annotations

import atexit
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

PROCESS = "calibcast.engines.tensorrt.builder.process"
LOG, ANSWERED, EARLY, PLAIN = "builder.log", "answered", "--early", "--plain"
# Seconds without a job after which a builder ends by itself. The parent does not take a builder that is about to end.
IDLE = 60.0
_LATE = IDLE - 10.0
_Key = tuple[object, ...]
# torch, polars and pytest set these environment variables in a running process.
_SET_ON_THE_WAY = {"TORCHINDUCTOR_CACHE_DIR", "_RJEM_MALLOC_CONF", "PYTEST_CURRENT_TEST"}


@dataclass(eq=False)
class Worker:
    """A builder process. `ask` gives it the folder of a job; its answers come as `lines`."""

    key: _Key
    process: subprocess.Popen[bytes]
    start_log: IO[bytes]
    lines: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)
    owner: int = field(default_factory=os.getpid)
    since: float = field(default_factory=time.monotonic)

    def ask(self, folder: Path) -> bool:
        """Give the builder a job; False when its process has ended meanwhile."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{folder}\n".encode())
            self.process.stdin.flush()
        except (BrokenPipeError, OSError):
            return False
        return True

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


def started(search_path: str, imports: tuple[str, ...] = (), early: bool = False, plain: bool = False) -> Worker:
    """A new builder. search_path: where it imports from. imports: modules that its job will import. early: there is
    time to get ready before the first job. plain: it imports no Torch-TensorRT."""
    log = tempfile.TemporaryFile(prefix="calibcast-builder-")  # noqa: SIM115 - it lives as long as the worker
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", PROCESS, *([EARLY] if early else []), *([PLAIN] if plain else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, "PYTHONPATH": search_path},
        start_new_session=True,  # so that processes that the builder starts end with it
    )
    worker = Worker(_key(search_path, imports, plain), process, log)
    threading.Thread(target=_read, args=(process, worker.lines), daemon=True).start()
    return worker


def _read(process: subprocess.Popen[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _key(search_path: str, imports: tuple[str, ...], plain: bool) -> _Key:
    """What a builder and a job must have in common: the search path, the imports, whether Torch-TensorRT is there, the
    working folder and the environment."""
    surroundings = tuple(sorted((name, value) for name, value in os.environ.items() if name not in _SET_ON_THE_WAY))
    return search_path, imports, plain, os.getcwd(), surroundings


class _Shelf:
    """Holds the one worker that is kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: Worker | None = None

    def take(self, search_path: str, imports: tuple[str, ...], early: bool = False, plain: bool = False) -> Worker:
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is None or kept.owner != os.getpid():  # a forked process must not use its parent's
            return started(search_path, imports, early, plain)
        late = time.monotonic() - kept.since > _LATE
        if late or kept.process.poll() is not None or kept.key != _key(search_path, imports, plain):
            kept.end()
            return started(search_path, imports, early, plain)
        return kept

    def keep(self, worker: Worker) -> None:
        worker.since = time.monotonic()
        with self._lock:
            before, self._kept = self._kept, worker
        if before is not None and before.owner == os.getpid():
            before.end()

    def prepare(self, search_path: str, imports: tuple[str, ...]) -> None:
        self.keep(self.take(search_path, imports, early=True))

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
