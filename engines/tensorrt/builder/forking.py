"""A builder process that is forked from a command, once the command has imported torch: half of what a builder imports.

Only a command of ours does this, before it runs anything of the user's. A fork copies one thread, and CUDA does not
survive one; so the process must have one thread, and must not have imported torch before.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn

_THREADS, _FILES = Path("/proc/self/task"), Path("/proc/self/fd")
# What a builder and the command itself import. Their threads, OpenBLAS's, end by themselves before a fork.
_SHARED = ("torch", "torch._dynamo", "torch.export._trace")


class Forked:
    """A forked process, with what a worker uses of `subprocess.Popen`."""

    def __init__(self, pid: int, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self._status: int | None = None

    def poll(self) -> int | None:
        """The exit status; negative for a signal; None while the process runs."""
        return self._waited(os.WNOHANG)

    def wait(self) -> int:
        """The exit status, when the process has ended."""
        status = self._waited(0)
        assert status is not None
        return status

    def _waited(self, options: int) -> int | None:
        if self._status is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # somebody else has waited for it, as `signal.SIGCHLD` ignored does
                self._status = 0
            else:
                self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status


def can_fork() -> bool:
    """Whether a builder may be forked from this process: on Linux, with one thread, before torch is imported."""
    alone = _THREADS.is_dir() and len(list(_THREADS.iterdir())) == 1
    return alone and not {"torch", "numpy", "polars"} & set(sys.modules)


def forked(log: IO[bytes]) -> Forked | None:
    """A builder process that waits for its first line. It prints to `log`. Imports torch here, before the fork; None
    where that has started CUDA."""
    for name in _SHARED:
        importlib.import_module(name)
    if any(name.startswith("/dev/nvidia") for name in _open_files().values()):
        return None
    to_read, to_ask = os.pipe()
    to_hear, to_tell = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    pid = os.fork()
    if pid == 0:
        _build((to_read, to_tell, log.fileno()))
    os.close(to_read)
    os.close(to_tell)
    return Forked(pid, os.fdopen(to_ask, "wb"), os.fdopen(to_hear, "rb"))


def _open_files() -> dict[int, str]:
    """Descriptor -> what it is, of the files that this process has open."""
    found = {}
    for path in _FILES.iterdir():
        with suppress(OSError):  # the descriptor by which the folder is read
            found[int(path.name)] = os.readlink(path)
    return found


def _build(streams: tuple[int, int, int]) -> NoReturn:
    """Be a builder, whatever the command has set up for itself. streams: its input, output and errors."""
    try:
        os.setsid()  # so that processes that the builder starts end with it
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for place, stream in enumerate([os.dup(stream) for stream in streams]):
            os.dup2(stream, place)
        for inherited in _open_files():
            if inherited > 2:
                os.close(inherited)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
        importlib.import_module("calibcast.engines.tensorrt.builder.process").main(forked=True)
    except BaseException:  # nothing of the command's own may run here
        traceback.print_exc()
    finally:
        os._exit(1)
